"""Runs an engine in a process of its own, listens to it, and says how it failed.

What an engine writes is of its own making, and may be without end: a bounded rest of it is
kept, for the exception, and a line of it is quoted without anything that a terminal obeys.
"""

from __future__ import annotations

import logging
import os
import queue
import re
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from phirt.devices.child import describe_exit, kill_family
from phirt.errors import EngineFailedError
from phirt.silence import TELEMETRY

__all__ = ["Log", "last_words", "offline_environment", "run_logged", "run_module"]

_logger = logging.getLogger(__name__)

_CHILD = Path(__file__).with_name("child.py")

_LOG_CHARACTERS = 32_768
_LINE_CHARACTERS = 2000
_QUOTED_CHARACTERS = 300
_WAITING_LINES = 1000
_READ_BYTES = 1 << 16
_STEP_S = 0.2  # how soon Ctrl-C is noticed where the system does not interrupt a wait
_DYING_S = 5.0

_TRACEBACK = "Traceback (most recent call last):"
_RAISED = re.compile(r"[A-Za-z_][\w.]*(:|$)")
# Tokens, and folders that the user may have named for what is kept between runs.
_HUB_VARIABLES = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HUGGINGFACE_HUB_CACHE",
    "TRANSFORMERS_CACHE",
    "PYTORCH_TRANSFORMERS_CACHE",
)

if sys.platform == "win32":
    _CREATION_FLAGS = subprocess.CREATE_NO_WINDOW
else:
    _CREATION_FLAGS = 0


class Log:
    """The last lines that a process wrote, some ten thousand characters of them."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque()
        self._characters = 0

    def add(self, line: str) -> None:
        """Take a line, and give up the oldest ones that it has no room beside."""
        self._lines.append(line)
        self._characters += len(line) + 1
        while self._characters > _LOG_CHARACTERS:
            self._characters -= len(self._lines.popleft()) + 1

    def __str__(self) -> str:
        return "\n".join(self._lines)


def run_module(
    python: Path,
    module: str,
    arguments: Sequence[str],
    *,
    engine: str,
    work_dir: Path,
    on_line: Callable[[str], None],
) -> str:
    """Run ``python -m MODULE`` without a network, and end it if anything goes wrong here.

    Args:
        python: The interpreter that has the module.
        module: The module.
        arguments: Its arguments.
        engine: What to call it in a message.
        work_dir: A folder for its temporary files and caches; it is run there.
        on_line: Called with every line that it writes. What it raises ends the process.

    Returns:
        The last that it wrote.

    Raises:
        EngineFailedError: It ended with an error, or could not be started.
    """
    command = [str(python), "-P", str(_CHILD), module, *arguments]
    environment = offline_environment(work_dir, own=_is_this_python(python))
    return run_logged(
        command, engine=engine, environment=environment, folder=work_dir, on_line=on_line
    )


def run_logged(
    command: Sequence[str],
    *,
    engine: str,
    environment: Mapping[str, str],
    folder: Path,
    on_line: Callable[[str], None],
) -> str:
    """Run a command and listen to it; whatever is raised here ends it and all that it started.

    Args:
        command: The program and its arguments.
        engine: What to call it in a message.
        environment: All of its environment variables.
        folder: Where it is run.
        on_line: Called with every line that it writes, standard error's among them.

    Returns:
        The last that it wrote.

    Raises:
        EngineFailedError: It ended with an error, or could not be started.
    """
    log = Log()
    _logger.debug("Running %s", command)
    with _running(command, engine, environment, folder) as process:
        # Closed here, and not when the collector comes to it: its thread ends with it.
        with closing(_lines(process)) as lines:
            for line in lines:
                _logger.debug("%s: %s", engine, line)
                log.add(line)
                on_line(line)
        code = process.returncode
    if code == 0:
        return str(log)
    said = last_words(str(log))
    ended = describe_exit(code, windows=os.name == "nt").removesuffix(" and without an answer")
    raise EngineFailedError(
        f"The engine {engine!r} failed: {said or 'it said nothing'} ({ended}; the exception's "
        "`log` has the last that it wrote).",
        log=str(log),
    )


def last_words(log: str) -> str:
    """The line that says why a program failed.

    What its last traceback raised; or the last that it called an error, as pip does; or its
    last line.

    Args:
        log: What it wrote.
    """
    _, found, after = log.rpartition(_TRACEBACK)
    lines = [line for line in after.splitlines() if line.strip()]
    raised = [line for line in lines if found and _RAISED.match(line)]
    errors = [line for line in lines if line.lower().startswith("error:")]
    line = (raised[:1] or errors[-1:] or lines[-1:] or [""])[0]
    plain = "".join(char if char.isprintable() else " " for char in line).strip()
    return plain if len(plain) <= _QUOTED_CHARACTERS else plain[:_QUOTED_CHARACTERS] + "..."


def offline_environment(work_dir: Path, *, own: bool) -> dict[str, str]:
    """The environment variables of an engine: no hub, no telemetry, nothing left behind.

    Args:
        work_dir: A folder for its temporary files and caches.
        own: Whether it runs on this process's interpreter, and is to find what this one finds.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in _HUB_VARIABLES}
    for name in ("PYTHONPATH", "PYTHONHOME"):  # of this interpreter, not of another
        if not own:
            inherited.pop(name, None)
    if own:
        inherited["PYTHONPATH"] = os.pathsep.join(_import_path())
    for telemetry in TELEMETRY.values():
        if telemetry.variables and not any(map(inherited.get, telemetry.variables)):
            inherited[telemetry.variables[0]] = "1"
    temporary, hub = work_dir / "tmp", work_dir / "huggingface"
    temporary.mkdir(parents=True, exist_ok=True)
    return inherited | {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HOME": str(hub),
        "HF_HUB_CACHE": str(hub / "hub"),
        "HF_MODULES_CACHE": str(hub / "modules"),
        "HF_TOKEN_PATH": str(hub / "token"),
        **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary)),
        **plain_output(),
    }


def plain_output() -> dict[str, str]:
    """Variables that make a Python write its lines when it has them, in UTF-8."""
    return {
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8:backslashreplace",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def _is_this_python(python: Path) -> bool:
    # Not resolved: the interpreter of a virtual environment is often a link to another.
    return python == Path(sys.executable)


def _import_path() -> Iterator[str]:
    for entry in dict.fromkeys(sys.path):
        with suppress(OSError):  # the current folder may have been removed
            yield str(Path(entry).absolute())


@contextmanager
def _running(
    command: Sequence[str], engine: str, environment: Mapping[str, str], folder: Path
) -> Iterator[subprocess.Popen[bytes]]:
    try:
        process = subprocess.Popen(  # noqa: S603  # the caller's own interpreter, no shell
            command,
            # Never written to: its end tells the child that this process is gone.
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            cwd=folder,
            creationflags=_CREATION_FLAGS,
        )
    except OSError as error:
        raise EngineFailedError(f"The engine {engine!r} cannot be started: {error}.") from error
    try:
        yield process
    finally:
        _end(process)
        if process.stdin is not None:
            process.stdin.close()


def _end(process: subprocess.Popen[bytes]) -> None:
    # Once it has ended, its number may be another's.
    if process.poll() is None:
        kill_family(process)


def _lines(process: subprocess.Popen[bytes]) -> Generator[str, None, None]:
    """Every line that a process writes, until it ends; it is ended where nobody reads on.

    They are read by a thread: Windows interrupts no one who waits for a pipe.
    """
    lines: queue.Queue[str | None] = queue.Queue(_WAITING_LINES)
    ended = threading.Event()
    assert process.stdout is not None  # noqa: S101  # it was asked for
    reader = threading.Thread(
        target=_read, args=(process.stdout, lines, ended), name="phirt-engine", daemon=True
    )
    reader.start()
    try:
        while True:
            try:
                line = lines.get(timeout=_STEP_S)
            except queue.Empty:
                # What it started may hold the pipe open for ever.
                if process.poll() is not None:
                    return
                continue
            if line is None:
                # It may go on without its output; whoever waits for that does so next.
                _wait(process)
                return
            yield line
    finally:
        ended.set()
        _end(process)
        reader.join(_DYING_S)


def _read(stream: BinaryIO, lines: queue.Queue[str | None], ended: threading.Event) -> None:
    with stream:  # closed by who reads from it, and nobody else
        for line in chain(_split(stream), [None]):
            while not ended.is_set():
                with suppress(queue.Full):
                    lines.put(line, timeout=_STEP_S)
                    break


def _split(stream: BinaryIO) -> Iterator[str]:
    """Lines, of which a bar of progress writes many into one: it ends them with a return."""
    rest = b""
    while chunk := os.read(stream.fileno(), _READ_BYTES):
        *whole, rest = re.split(rb"[\r\n]+", rest + chunk)
        rest = rest[-_LINE_CHARACTERS:]
        for line in whole:
            if line.strip():
                yield line.decode("utf-8", errors="replace")[:_LINE_CHARACTERS].rstrip()
    if rest.strip():
        yield rest.decode("utf-8", errors="replace").rstrip()


def _wait(process: subprocess.Popen[bytes]) -> int:
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(_STEP_S)
