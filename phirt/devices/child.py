"""Runs a module of phirt's in a Python of its own, with a time limit.

A runtime may abort, meet an instruction that the processor lacks, or hang in a driver while it
merely looks for devices. In a process of its own that costs the application nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

__all__ = [
    "CHILD",
    "CREATION_FLAGS",
    "PASSING",
    "PREFIX",
    "ChildEnd",
    "Ending",
    "child_environment",
    "describe_exit",
    "end_with_parent",
    "kill_family",
    "last_words",
    "obstacle",
    "run_child",
]

CHILD = "PHIRT_PROBE_CHILD"
"""Set in a child's environment, to who started it: a child starts none of its own."""

PASSING = 75
"""Exit status of a child whose answer is of the moment: `EX_TEMPFAIL` of sysexits.h."""

Ending: TypeAlias = Literal["answered", "crashed", "timed out", "not run"]

PREFIX = "phirt-child-"
"""What the name of a child's folder begins with."""

_TAIL_BYTES = 8192
_TAIL_LINES = 3
_TAIL_CHARACTERS = 400

if sys.platform == "win32":
    CREATION_FLAGS = subprocess.CREATE_NO_WINDOW
else:
    CREATION_FLAGS = 0
"""For `subprocess.Popen`: on Windows, no console window."""

# What a process of Python is called. In an application that embeds Python, sys.executable may
# be the application, and would start a second one.
_PYTHON = re.compile(r"(python|pypy|graalpy)", re.IGNORECASE)

# What others send, and nobody to himself: SIGHUP, SIGINT, SIGKILL, SIGTERM; and what Windows
# makes of Ctrl-C (STATUS_CONTROL_C_EXIT).
_ENDED_BY_OTHERS = (-1, -2, -9, -15, 0xC000013A)

# How soon a child notices that it is not wanted any more, and how long it may take to die.
_STEP_S = 0.2
_DYING_S = 5.0

_SIGNALS = {
    "SIGILL": "an instruction that this processor does not have",
    "SIGSEGV": "memory that is not there was accessed",
    "SIGBUS": "memory that cannot be read was accessed",
    "SIGFPE": "an arithmetic error",
    "SIGABRT": "it aborted itself",
    "SIGKILL": "it was killed; the system does that when memory runs out",
    "SIGTERM": "it was told to end",
    "SIGINT": "it was interrupted with Ctrl-C",
    "SIGHUP": "its terminal was closed",
}
# NTSTATUS values, which Windows gives as exit codes:
# https://learn.microsoft.com/openspecs/windows_protocols/ms-erref/596a1078-e883-4972-9bbc-49e60bebca55
_NT_STATUS = {
    0xC0000005: "memory that is not there was accessed",
    0xC0000017: "memory ran out",
    0xC000001D: "an instruction that this processor does not have",
    0xC0000094: "an arithmetic error",
    0xC00000FD: "the stack overflowed",
    0xC000013A: "it was interrupted with Ctrl-C",
    0xC0000135: "a DLL that it needs was not found",
    0xC0000139: "a DLL lacks a function that it needs",
    0xC0000142: "a DLL failed to initialise",
    0xC0000374: "the heap was damaged",
    0xC0000409: "it aborted itself",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildEnd:
    """How a child ended.

    Attributes:
        ending: ``answered``: it wrote its answer and ended as it should; ``crashed``,
            ``timed out``, or ``not run``, where no process could be started.
        answer: What it wrote to its file; empty unless it answered.
        reason: What was seen where it did not answer, in one sentence without its full stop.
        seconds: How long it took.
        lasts: Whether it may be expected to end so again: not where something else had the
            memory, and not where no process could be started.
    """

    ending: Ending
    answer: str = ""
    reason: str = ""
    seconds: float = 0.0
    lasts: bool = True


def run_child(
    module: str,
    arguments: Sequence[str],
    *,
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
    stop: threading.Event | None = None,
) -> ChildEnd:
    """Run ``python -m module ARGUMENTS FILE`` and return what it writes to FILE.

    Args:
        module: The module; it finds the same packages as this process.
        arguments: Its arguments, before the file's name.
        timeout_s: Seconds after which it is killed, with whatever it started.
        environment: Variables to set for it, beside those of this process.
        stop: Once it is set, the child is killed: Ctrl-C reaches the main thread alone.
    """
    hindrance = obstacle()
    if hindrance is not None:
        return ChildEnd(ending="not run", reason=hindrance, lasts=False)
    started = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as folder:
            answer, output = Path(folder, "answer.json"), Path(folder, "output.txt")
            command = [sys.executable, "-P", "-m", module, *arguments, str(answer)]
            variables = child_environment(folder) | dict(environment or {})
            code = _run(command, output, timeout_s=timeout_s, environment=variables, stop=stop)
            seconds = time.perf_counter() - started
            # A crash while it ends costs nothing: the answer is whole once it has its name.
            if answer.is_file():
                text = answer.read_text(encoding="utf-8")
                lasts = code != PASSING
                return ChildEnd(ending="answered", answer=text, seconds=seconds, lasts=lasts)
            said = last_words(output)
    except OSError as error:
        # No process, no temporary folder, no memory for either.
        reason = f"no process could be started: {error}"
        return ChildEnd(ending="not run", reason=reason, lasts=False)
    if stop is not None and stop.is_set():
        return ChildEnd(ending="not run", reason="it was interrupted", lasts=False)
    if code is None:
        reason = f"gave no answer within {timeout_s:g} s{said}"
        return ChildEnd(ending="timed out", reason=reason, seconds=seconds)
    reason = describe_exit(code, windows=os.name == "nt") + said
    lasts = code != PASSING and code not in _ENDED_BY_OTHERS
    return ChildEnd(ending="crashed", reason=reason, seconds=seconds, lasts=lasts)


def end_with_parent(folder: Path) -> None:
    """End this child when the process that started it is gone: nobody is left who would.

    Args:
        folder: The child's, which is removed then.
    """
    import psutil

    started_by = os.environ.get(CHILD, "")
    if not started_by.isdecimal():
        return  # by hand
    # A launcher may stand between the two, and on Windows a parent's number outlives it.
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent and psutil.pid_exists(int(started_by)):
            time.sleep(_STEP_S)
        if folder.name.startswith(PREFIX):
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, name="phirt-parent", daemon=True).start()


def describe_exit(code: int, *, windows: bool) -> str:
    """What a process's exit status means, in words.

    Args:
        code: As `subprocess.Popen.returncode` has it.
        windows: Whether the process was one of Windows.
    """
    if windows:
        status = code & 0xFFFFFFFF
        if status >= 0xC0000000:  # severity "error"
            meaning = _NT_STATUS.get(status, "a fault that phirt has no words for")
            return f"crashed with 0x{status:08X}: {meaning}"
    elif code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"crashed with {name}: {_SIGNALS.get(name, 'it was ended by a signal')}"
    return f"ended with exit status {code} and without an answer"


def kill_family(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that it started, and wait for it a moment."""
    import psutil

    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(process.pid)
        family = [*parent.children(recursive=True), parent]
    for member in family:
        with contextlib.suppress(psutil.Error):
            member.kill()
    process.kill()
    # One that hangs inside the system, as in a driver, does not even die.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_DYING_S)


def obstacle() -> str | None:
    """Why no child can be started, or None."""
    if CHILD in os.environ:
        return "this process was itself started to look for devices"
    if getattr(sys, "frozen", False) or not sys.executable:
        return "this application brings no Python that could be started"
    if not _PYTHON.match(Path(sys.executable).name):
        return f"sys.executable is not Python but {Path(sys.executable).name!r}"
    return None


def child_environment(folder: str) -> dict[str, str]:
    """The variables of a child.

    Args:
        folder: The child's own, for whatever it leaves behind.
    """
    # What this process imports, the child imports: its path is more than its interpreter's.
    path = list(_absolute(sys.path))
    return os.environ | {
        CHILD: str(os.getpid()),
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(path)),
        "PYTHONIOENCODING": "utf-8:backslashreplace",
        # Looking for devices is no reason to leave anything behind, or to ask anybody.
        "PYTHONDONTWRITEBYTECODE": "1",
        "PHIRT_HOME": str(Path(folder, "home")),
        "HF_HUB_OFFLINE": "1",
        **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), folder),
    }


def _absolute(path: Sequence[str]) -> Iterator[str]:
    for entry in path:
        # The current folder may have been removed.
        with contextlib.suppress(OSError):
            yield str(Path(entry).absolute())


def _run(
    command: list[str],
    output: Path,
    *,
    timeout_s: float,
    environment: dict[str, str],
    stop: threading.Event | None,
) -> int | None:
    """The exit status, or None where it was late or stopped. What it says goes to a file.

    A pipe would stay open, and be waited for, as long as anything that it started lives.
    """
    with output.open("wb") as sink:
        process = subprocess.Popen(  # noqa: S603  # this interpreter, names of modules and devices
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=environment,
            creationflags=CREATION_FLAGS,
        )
    try:
        return _wait(process, timeout_s, stop)
    finally:
        if process.returncode is None:  # late, or the wait was interrupted
            kill_family(process)


def _wait(
    process: subprocess.Popen[bytes], timeout_s: float, stop: threading.Event | None
) -> int | None:
    end = time.monotonic() + timeout_s
    while (left := end - time.monotonic()) > 0 and not (stop is not None and stop.is_set()):
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(min(left, _STEP_S))
    return None


def last_words(output: Path) -> str:
    """The last lines that a child said, for a message; empty where it said nothing."""
    with output.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - _TAIL_BYTES, 0))
        text = file.read().decode("utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()][-_TAIL_LINES:]
    said = " / ".join(lines)
    if len(said) > _TAIL_CHARACTERS:
        said = f"...{said[-_TAIL_CHARACTERS:]}"
    return f". It said last: {said}" if said else ""
