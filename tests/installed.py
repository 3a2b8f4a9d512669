"""Tests that need a runtime are left out where it is not installed, unless all must run.

``PHIRT_TEST_REQUIRE_ALL=1``, which nox's session ``tests`` sets, means that every runtime that
has wheels for this platform is installed: one that is missing is then a failure. Otherwise a
suite that lost a runtime would be as green as one that ran it.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import NoReturn

import pytest

__all__ = ["ALL_REQUIRED", "leave_out", "require"]

ALL_REQUIRED = os.environ.get("PHIRT_TEST_REQUIRE_ALL") == "1"

# MLX has no wheels for Windows.
_NOT_FOR_THIS_PLATFORM = ("mlx", "mlx_lm") if sys.platform == "win32" else ()


def require(*packages: str) -> None:
    """Skip the file or test that calls this unless all packages are installed, or fail.

    Other than ``pytest.importorskip`` it imports none of them: that is phirt's to do, without
    what some do when they are imported (reporting it to their makers, changing the process).
    """
    for package in packages:
        if find_spec(package) is None:
            leave_out(package)


def leave_out(package: str) -> NoReturn:
    """Skip for want of a package or backend, or fail where all are required."""
    reason = f"{package} is not installed"
    if ALL_REQUIRED and package not in _NOT_FOR_THIS_PLATFORM:
        pytest.fail(f"{reason}, and PHIRT_TEST_REQUIRE_ALL is set", pytrace=False)
    pytest.skip(reason, allow_module_level=True)
