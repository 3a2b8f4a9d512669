"""Which process may use a native model: the one that loaded it, and none forked from it."""

from __future__ import annotations

import ctypes
import os
import sys
import weakref

from phirt.errors import BackendRuntimeError

__all__ = ["ProcessGuard"]

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

    @property
    def is_of_this_process(self) -> bool:
        """Whether this is the process that loaded the model."""
        return os.getpid() == self._pid

    def check(self) -> None:
        """Raise `BackendRuntimeError` in a process that was forked after the load."""
        if not self.is_of_this_process:
            raise BackendRuntimeError(
                f"The model was loaded in process {self._pid} and is used in process "
                f"{os.getpid()}, forked from it. A runtime's threads do not survive a fork: "
                "load the model in the child process, or start workers with 'spawn'."
            )
