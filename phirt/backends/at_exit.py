"""The end of the interpreter: it waits for the calls that are inside a runtime, and no more begin.

Python ends a daemon thread where it stands when the thread asks for the interpreter's lock and
the interpreter is going away. A thread that comes back from a runtime has C++ frames above it,
which do not survive that: the process dies of "terminate called without an active exception"
(tried with Python 3.11 and onnxruntime, OpenVINO, MLX and torch).
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["end_daemon", "has_ended", "in_runtime", "is_exiting", "will_end"]

_T = TypeVar("_T")

# A call is a step, or a part of a prompt; one that takes longer is not waited for.
_LONGEST_WAIT_S = 10.0

# Calls inside a runtime, by thread. Each thread writes its own entry only, so that no lock is
# needed, which a garbage collection, a signal or a fork could find taken.
_depth: dict[int, int] = {}
_exiting_thread: int | None = None
# Threads that have been told to end, and have still to let go of what a runtime gave them.
_ending: set[threading.Thread] = set()


def is_exiting() -> bool:
    """Whether the interpreter has begun to exit: what is not freed now goes with the process."""
    return _exiting_thread is not None


def end_daemon() -> None:
    """End this thread if the interpreter is exiting in another.

    Raises:
        SystemExit: It is. The thread ends of it without a word, as it would have anyway.
    """
    if _exiting_thread not in (None, threading.get_ident()):
        raise SystemExit


def in_runtime(call: Callable[..., _T], *args: Any) -> _T:
    """Run a call of a runtime, which the interpreter does not exit during.

    Raises:
        SystemExit: As `end_daemon`.
    """
    thread = threading.get_ident()
    outer = _depth.get(thread, 0)
    _depth[thread] = outer + 1
    try:
        end_daemon()
        return call(*args)
    finally:
        if outer:
            _depth[thread] = outer
        else:
            _depth.pop(thread, None)


def will_end(thread: threading.Thread) -> None:
    """The thread is told to end next: the interpreter's exit waits for it."""
    _ending.add(thread)


def has_ended() -> None:
    """This thread needs no runtime any more."""
    _ending.discard(threading.current_thread())


def _is_busy() -> bool:
    others = _depth.keys() - {_exiting_thread}
    return bool(others) or any(thread.is_alive() for thread in tuple(_ending))


def _wait() -> None:
    global _exiting_thread  # noqa: PLW0603 - there is one interpreter, and it exits once
    _exiting_thread = threading.get_ident()
    deadline = time.monotonic() + _LONGEST_WAIT_S
    while _is_busy() and time.monotonic() < deadline:
        time.sleep(0.001)


def _forget_threads() -> None:
    _depth.clear()
    _ending.clear()


atexit.register(_wait)
if sys.platform != "win32":
    # The threads of the parent are not in the child.
    os.register_at_fork(after_in_child=_forget_threads)
