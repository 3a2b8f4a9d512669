"""A decoder in NumPy, to compare with."""

from __future__ import annotations

from phirt.backends.reference.adapter import ReferenceBackend

__all__ = ["ReferenceBackend"]
