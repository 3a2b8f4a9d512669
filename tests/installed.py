"""Files of tests that need a runtime are left out where it is not installed."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

__all__ = ["require"]


def require(*packages: str) -> None:
    """Skip the file that calls this unless all packages are installed.

    Other than ``pytest.importorskip`` it imports none of them: that is phirt's to do, without
    what some do when they are imported (reporting it to their makers, changing the process).
    """
    for package in packages:
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed", allow_module_level=True)
