"""What tests of backends need: tiny checkpoints, and a suite that every backend passes.

`BackendConformance` needs pytest, which phirt does not depend on; it is imported when the
suite is asked for. `write_tiny_checkpoint` needs nothing but NumPy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from phirt.testing.checkpoints import TINY_ARCHITECTURES, write_tiny_checkpoint

if TYPE_CHECKING:
    from phirt.testing.conformance import DENSE_ARCHITECTURES, BackendConformance

__all__ = [
    "DENSE_ARCHITECTURES",
    "TINY_ARCHITECTURES",
    "BackendConformance",
    "write_tiny_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in {"BackendConformance", "DENSE_ARCHITECTURES"}:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from phirt.testing import conformance
    except ModuleNotFoundError as error:
        if error.name != "pytest":
            raise
        raise ImportError(
            f"phirt.testing.{name} needs pytest, which is not installed. "
            "Install it with: python -m pip install pytest"
        ) from error
    return getattr(conformance, name)
