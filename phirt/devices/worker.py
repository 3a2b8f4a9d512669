"""A Python of its own that stays alive, and answers one request after another.

It is for what must be asked several times of one process, as a loaded model is: `run_child`
of `phirt.devices.child` starts one for each question. Requests go to its standard input, a
line each; answers come as files, since runtimes print whatever they like.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from phirt.devices.child import (
    CREATION_FLAGS,
    PREFIX,
    child_environment,
    describe_exit,
    end_with_parent,
    kill_family,
    last_words,
    obstacle,
)

__all__ = ["Worker", "WorkerEndedError", "requests"]

# How soon an answer is noticed: at once at first, and later without taking time from who works.
_SHORTEST_S, _LONGEST_S = 0.005, 0.05
_CLOSING_S = 2.0


class WorkerEndedError(Exception):
    """A worker gave no answer and is gone; the message says why, without its full stop."""


class Worker:
    """A child process that serves `requests`.

    Args:
        module: The module that is run, which iterates `requests`; it finds the same packages
            as this process.
        environment: Variables to set for it, beside those of this process.

    Raises:
        WorkerEndedError: No process can be started.
    """

    def __init__(self, module: str, *, environment: Mapping[str, str] | None = None) -> None:
        hindrance = obstacle()
        if hindrance is not None:
            raise WorkerEndedError(hindrance)
        self._count = 0
        self._process: subprocess.Popen[bytes] | None = None
        with contextlib.ExitStack() as undo:
            self._start(module, dict(environment or {}), undo)
            undo.pop_all()

    def _start(self, module: str, environment: dict[str, str], undo: contextlib.ExitStack) -> None:
        try:
            self._folder = tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True)
            undo.callback(self._folder.cleanup)
            self._output = Path(self._folder.name, "output.txt")
            with self._output.open("wb") as sink:
                self._process = subprocess.Popen(  # noqa: S603  # this interpreter, a module of phirt
                    [sys.executable, "-P", "-m", module, self._folder.name],
                    stdin=subprocess.PIPE,
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                    env=child_environment(self._folder.name) | environment,
                    creationflags=CREATION_FLAGS,
                )
        except OSError as error:
            raise WorkerEndedError(f"no process could be started: {error}") from error

    def ask(self, request: str, *, timeout_s: float) -> str:
        """Send a request and wait for its answer.

        Args:
            request: One line of text.
            timeout_s: Seconds after which the process is killed, with whatever it started.

        Raises:
            WorkerEndedError: It crashed, was late, or had ended before.
        """
        process = self._process
        if process is None:
            raise WorkerEndedError("was closed")
        answer = self._answer(self._count)
        self._count += 1
        try:
            self._send(process, request)
            self._wait(process, answer, timeout_s)
            text = answer.read_text(encoding="utf-8")
            answer.unlink()
        except BaseException:
            self.close(kill=True)
            raise
        return text

    def close(self, *, kill: bool = False) -> None:
        """End the process. Calling it again does nothing.

        Args:
            kill: Do not wait for it to end by itself.
        """
        process, self._process = self._process, None
        if process is None:
            return
        try:
            with contextlib.suppress(OSError):
                if process.stdin is not None:
                    process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0 if kill else _CLOSING_S)
        finally:
            if process.returncode is None:
                kill_family(process)
            self._folder.cleanup()

    def _send(self, process: subprocess.Popen[bytes], request: str) -> None:
        assert process.stdin is not None  # noqa: S101  # it was asked for
        # One that has ended does not read; how it ended is told below.
        with contextlib.suppress(OSError):
            process.stdin.write(request.encode() + b"\n")
            process.stdin.flush()

    def _wait(self, process: subprocess.Popen[bytes], answer: Path, timeout_s: float) -> None:
        end, pause = time.monotonic() + timeout_s, _SHORTEST_S
        while not answer.is_file():
            code = process.poll()
            # What was written before it ended counts.
            if code is not None and not answer.is_file():
                reason = describe_exit(code, windows=os.name == "nt")
                raise WorkerEndedError(reason + last_words(self._output))
            if time.monotonic() > end:
                said = last_words(self._output)
                raise WorkerEndedError(f"gave no answer within {timeout_s:.3g} s{said}")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_S)

    def _answer(self, number: int) -> Path:
        return Path(self._folder.name, _name(number))


def requests() -> Iterator[tuple[str, Answer]]:
    """In a worker: the requests, each with the function that takes its answer.

    It ends when there will be no more, or nobody is left who would ask.
    """
    folder = Path(sys.argv[1])
    end_with_parent(folder)
    for number, line in enumerate(sys.stdin.buffer):
        yield line.decode().rstrip("\n"), Answer(folder / _name(number))
    # Whoever asked closed it, or is gone and removes nothing any more.
    if folder.name.startswith(PREFIX):
        shutil.rmtree(folder, ignore_errors=True)


class Answer:
    """Takes the answer to one request.

    Args:
        path: The file that it becomes.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, text: str) -> None:
        """Give it; whoever waits sees all of it or nothing."""
        partial = self._path.with_suffix(".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(self._path)


def _name(number: int) -> str:
    return f"answer-{number}.json"
