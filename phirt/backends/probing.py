"""How much a probe may set in motion in the process that it runs in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["disposable_process", "may_start_drivers"]

_is_disposable = ContextVar("phirt_probe_is_disposable", default=False)


@contextmanager
def disposable_process() -> Iterator[None]:
    """Probes meanwhile may start drivers and load plugins, which can crash or hang a process.

    For a process that is there for nothing else. In an application a probe asks only what the
    runtime knows without them.
    """
    token = _is_disposable.set(True)
    try:
        yield
    finally:
        _is_disposable.reset(token)


def may_start_drivers() -> bool:
    """Whether a probe may do more than a load on the CPU does."""
    return _is_disposable.get()
