"""transformers on torch."""

from __future__ import annotations

from phirt.backends.transformers.adapter import TransformersBackend

__all__ = ["TransformersBackend"]
