"""MLX, with mlx-lm's layers."""

from __future__ import annotations

from phirt.backends.mlx.adapter import MlxBackend

__all__ = ["MlxBackend"]
