"""What tests of backends need: tiny checkpoints, and a suite that every backend passes."""

from __future__ import annotations

from phirt.testing.checkpoints import TINY_ARCHITECTURES, write_tiny_checkpoint

__all__ = ["TINY_ARCHITECTURES", "write_tiny_checkpoint"]
