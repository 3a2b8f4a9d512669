"""What adapters share, so that each of them holds only what its runtime needs.

`BaseSession` keeps the promises of the `Session` protocol that do not depend on the
runtime (states, lengths, process and interruption checks), and leaves an adapter the
steps themselves. `import_runtime` turns an import that fails into the right error.
"""

from __future__ import annotations

import abc
import ctypes
import importlib
import os
import sys
import weakref
from collections.abc import Sequence
from types import ModuleType
from typing import Literal

from phirt.errors import (
    BackendBrokenError,
    BackendNotInstalledError,
    BackendRuntimeError,
    ContextLengthError,
    SessionClosedError,
)
from phirt.protocols import Logits
from phirt.types import FloatArray

__all__ = ["BaseSession", "HostLogits", "ProcessGuard", "import_runtime"]


def import_runtime(module: str, *, backend: str, extra: str) -> ModuleType:
    """Import a runtime's top-level module.

    Raises:
        BackendNotInstalledError: There is no such module.
        BackendBrokenError: The module is there and its import fails. An installed
            runtime that does not import is a broken install, not a missing one.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module:
            raise BackendNotInstalledError(
                f"Backend {backend!r} needs the package {module!r}, which is not installed. "
                f'Install it with: python -m pip install "phirt[{extra}]"'
            ) from error
        raise _broken(module, backend, error) from error
    # A native module may raise anything at all while it initialises.
    except Exception as error:
        raise _broken(module, backend, error) from error


def _broken(module: str, backend: str, error: Exception) -> BackendBrokenError:
    return BackendBrokenError(
        f"Backend {backend!r}: {module!r} is installed, but importing it failed with "
        f"{type(error).__name__}: {error}. Reinstall it with: "
        f"python -m pip install --force-reinstall {module}"
    )


_native: weakref.WeakSet[object] = weakref.WeakSet()


def _keep_native() -> None:
    for native in _native:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(native))


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_keep_native)


class ProcessGuard:
    """Refuses a native model in any process but the one that loaded it.

    A fork copies the memory of a runtime but not its worker threads: the first call in
    the child would wait for them for ever. So would the destructor, when the child lets
    go of the model or exits: there the native object is never destroyed.

    Args:
        native: The runtime's object that owns the threads; weakly referenced.
    """

    __slots__ = ("_pid",)

    def __init__(self, native: object = None) -> None:
        self._pid = os.getpid()
        if native is not None:
            _native.add(native)

    def check(self) -> None:
        """Raise `BackendRuntimeError` in a process that was forked after the load."""
        if os.getpid() != self._pid:
            raise BackendRuntimeError(
                f"The model was loaded in process {self._pid} and is used in process "
                f"{os.getpid()}, forked from it. A runtime's threads do not survive a fork: "
                "load the model in the child process, or start workers with 'spawn'."
            )


class HostLogits:
    """Logits that are in host memory already.

    Args:
        values: Shape (n, vocab), float32.
    """

    __slots__ = ("_values",)

    def __init__(self, values: FloatArray) -> None:
        self._values = values

    def numpy(self) -> FloatArray:
        """The logits, shape (n, vocab)."""
        return self._values


class BaseSession(abc.ABC):
    """The part of `phirt.protocols.Session` that is the same on every runtime.

    An adapter implements ``_append`` and ``_free``, and whichever of ``_truncate`` and
    ``_interrupt`` its capabilities declare. Lengths are kept here: ``_append`` sees
    ``self._length`` as it was before the call.

    Args:
        guard: The process that may use the session.
        max_length: The most tokens that it may hold.
    """

    def __init__(self, guard: ProcessGuard, *, max_length: int) -> None:
        self._guard = guard
        self._max_length = max_length
        self._length = 0
        self._state: Literal["open", "failed", "interrupted", "closed"] = "open"

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._length

    @property
    def floor(self) -> int:
        """The smallest length that `truncate` can reach now."""
        return 0

    @property
    def can_extend(self) -> bool:
        """Whether `prefill` may be called on a cache that is not empty."""
        return True

    def prefill(self, token_ids: Sequence[int]) -> Logits:
        """Append one or more tokens and return the logits of the last, shape (1, vocab)."""
        return self._run(token_ids, every_position=False)

    def decode(self, token_id: int) -> Logits:
        """Append one token and return its logits, shape (1, vocab)."""
        return self._run((token_id,), every_position=False)

    def verify(self, token_ids: Sequence[int]) -> Logits:
        """Append n tokens and return the logits of each, shape (n, vocab)."""
        return self._run(token_ids, every_position=True)

    def truncate(self, length: int) -> None:
        """Forget every token from ``length`` on."""
        self._check_open()
        if not self.floor <= length <= self._length:
            raise ValueError(
                f"Cannot truncate to {length} tokens: the session holds {self._length} "
                f"and can go back to {self.floor}."
            )
        self._truncate(length)
        self._length = length

    def interrupt(self) -> None:
        """End the call that is running, if any. Callable from any thread."""
        if self._state == "open":
            self._state = "interrupted"
            self._interrupt()

    def close(self) -> None:
        """Free the cache. Calling it again does nothing."""
        if self._state != "closed":
            self._state = "closed"
            self._free()

    def _run(self, token_ids: Sequence[int], *, every_position: bool) -> Logits:
        self._check_open()
        count = len(token_ids)
        if count == 0:
            raise ValueError("A session was given no tokens; give it at least one.")
        if self._length + count > self._max_length:
            raise ContextLengthError(
                f"The session holds {self._length} tokens and was given {count} more; "
                f"it was made for {self._max_length}.",
                required=self._length + count,
                available=self._max_length,
            )
        try:
            logits = self._append(token_ids, every_position=every_position)
        except BaseException as error:
            # The cache may be half written: only close() makes sense from here on.
            if self._state == "interrupted" and isinstance(error, BackendRuntimeError):
                raise SessionClosedError("The session was interrupted.") from error
            self._state = "failed"
            raise
        self._length += count
        return logits

    def _check_open(self) -> None:
        if self._state != "open":
            raise SessionClosedError(f"The session is {self._state}; start a new one.")
        self._guard.check()

    @abc.abstractmethod
    def _append(self, token_ids: Sequence[int], *, every_position: bool) -> Logits:
        """Run the tokens on the cache; raise only phirt's errors."""

    @abc.abstractmethod
    def _free(self) -> None:
        """Let go of the cache."""

    def _truncate(self, length: int) -> None:
        raise NotImplementedError("declared without the capability 'truncate'")

    def _interrupt(self) -> None:
        raise NotImplementedError("declared without the capability 'interrupt'")
