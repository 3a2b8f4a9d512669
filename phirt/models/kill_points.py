"""Points at which a test may have the process killed, to see what survives.

A store that claims to survive a kill has to be killed at the steps where that matters, and
from outside a test cannot aim. With the environment variable ``PHIRT_TEST_KILL_AT`` set, a
process kills itself at the named point, or at the n-th of all the points that it passes.
"""

from __future__ import annotations

import os
import signal

__all__ = ["VARIABLE", "kill_point", "points_passed"]

VARIABLE = "PHIRT_TEST_KILL_AT"

_passed: list[str] = []


def kill_point(name: str) -> None:
    """Pass a point; does nothing unless ``PHIRT_TEST_KILL_AT`` is set.

    Args:
        name: What is about to happen, such as ``"publish"``.
    """
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    _passed.append(name)
    if wanted in {name, str(len(_passed))}:
        # Windows has no SIGKILL; there SIGTERM is TerminateProcess, which cannot be caught.
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))


def points_passed() -> tuple[str, ...]:
    """Names of the points passed so far, while the variable is set."""
    return tuple(_passed)
