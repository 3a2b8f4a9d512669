"""How the calls of one loaded model reach its runtime: at once, in turn, or on one thread.

A loaded model declares its ``concurrency``; its `Execution` makes it true, so that callers
may use any threads whatever the runtime allows.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Literal, Protocol, TypeVar

from phirt.backends.at_exit import end_daemon, has_ended, in_runtime, is_exiting, will_end
from phirt.errors import SessionClosedError

__all__ = ["Execution", "InTurn", "OneThread", "Parallel"]

_T = TypeVar("_T")


class Execution(Protocol):
    """Runs the calls of one loaded model as its runtime needs it."""

    @property
    def concurrency(self) -> Literal["parallel", "serial", "owner"]:
        """What callers are told."""

    def run(self, call: Callable[..., _T], *args: Any) -> _T:
        """Run a call and return its result, or raise what it raised."""

    def close(self) -> None:
        """No call will come any more. Idempotent."""


class Parallel:
    """Each call runs on the thread that made it, at any time."""

    concurrency: Literal["parallel"] = "parallel"

    def run(self, call: Callable[..., _T], *args: Any) -> _T:
        """Run the call."""
        return in_runtime(call, *args)

    def close(self) -> None:
        """Nothing to do."""


class InTurn:
    """Each call runs on the thread that made it, one at a time."""

    concurrency: Literal["serial"] = "serial"

    def __init__(self) -> None:
        # Freeing may happen inside a call, when a garbage collection finds a session.
        self._lock = threading.RLock()

    def run(self, call: Callable[..., _T], *args: Any) -> _T:
        """Run the call once no other is running."""
        with self._lock:
            return in_runtime(call, *args)

    def close(self) -> None:
        """Nothing to do."""


class OneThread:
    """Every call runs on one thread of the model's own.

    The thread ends when this is closed or collected; at the interpreter's exit it stays where it
    is, since no thread can be ended safely then.

    Args:
        name: What the thread is called.
        at_end: Called on the thread as it ends.
    """

    concurrency: Literal["owner"] = "owner"

    def __init__(self, name: str, *, at_end: Callable[[], object] = lambda: None) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], Any] | None] = (
            queue.SimpleQueue()
        )
        # Reentrant: a garbage collection while it is held may free a session of this model.
        self._lock = threading.RLock()
        self._closed = False
        # A daemon: a model that nobody closed must not keep the process alive.
        self._thread = threading.Thread(
            target=_serve, args=(self._calls, at_end), name=name, daemon=True
        )
        self._thread.start()
        weakref.finalize(self, _end, self._thread, self._calls).atexit = False

    def run(self, call: Callable[..., _T], *args: Any) -> _T:
        """Run the call on the thread, and wait for it.

        An exception that is thrown into the waiting thread (Ctrl-C) is raised only once the
        call has ended, or if it has not been asked for: what it works on is not the caller's
        to touch before.

        Raises:
            SessionClosedError: `close` was called before, or the interpreter is exiting.
        """
        if threading.current_thread() is self._thread:
            return call(*args)
        future: Future[_T] = Future()
        asked = False
        try:
            self._ask(future, call, args)
            asked = True
            return future.result()
        except BaseException as error:
            # An interruption inside _ask may have come before the call was in the queue or
            # after: what can be taken back is not run, and what cannot is waited for.
            if future.done() or (not asked and future.cancel()):
                raise
            interruption = error
        _wait_for_end(future)
        raise interruption from future.exception()

    def _ask(self, future: Future[_T], call: Callable[..., _T], args: tuple[Any, ...]) -> None:
        with self._lock:
            if self._closed:
                raise SessionClosedError("The model is closed; load it again.")
            if is_exiting():
                end_daemon()
                raise SessionClosedError("Python is exiting, and with it the model's thread.")
            self._calls.put((future, call, args))

    def close(self) -> None:
        """End the thread once it has done what was asked of it before."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            _end(self._thread, self._calls)
        if threading.current_thread() is not self._thread and not is_exiting():
            self._thread.join()


def _end(thread: threading.Thread, calls: queue.SimpleQueue[Any]) -> None:
    """Tell an owner thread to end; once Python is exiting it stays where it is."""
    if not is_exiting():
        will_end(thread)
        calls.put(None)


def _serve(calls: queue.SimpleQueue[Any], at_end: Callable[[], object]) -> None:
    while (item := calls.get()) is not None:
        future, call, args = item
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(in_runtime(call, *args))
            except BaseException as error:
                future.set_exception(error)  # It belongs to the caller's thread.
        # Not kept until the next call: what it refers to may be large.
        del item, future, call, args
    try:
        at_end()  # Python waits for it, if it is exiting meanwhile.
    finally:
        has_ended()


def _wait_for_end(future: Future[Any]) -> None:
    """Wait, whatever else is thrown into this thread meanwhile."""
    while not future.done():
        with suppress(BaseException):
            future.exception()
