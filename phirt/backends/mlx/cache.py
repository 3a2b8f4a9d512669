"""What a session keeps of every layer: caches of mlx-lm's, in floats or in 8 bits.

Those of 8 bits round each position by itself, in groups of channels with a scale and an offset
each; nothing need be known of the model beforehand.
"""

from __future__ import annotations

from typing import Any

from phirt.backends.mlx.modules import import_model_module
from phirt.errors import UnsupportedModelError

__all__ = ["CacheFormat", "group_size_of"]

_BITS = 8
_GROUP_SIZES = (64, 32)  # of those that MLX has; the larger takes less room


def group_size_of(head_size: int) -> int:
    """Channels that share a scale in heads of a size.

    Raises:
        UnsupportedModelError: No group divides them.
    """
    for size in _GROUP_SIZES:
        if head_size % size == 0:
            return size
    raise UnsupportedModelError(
        f"mlx keeps a KV cache of 8 bits in groups of {' or '.join(map(str, _GROUP_SIZES))} "
        f"channels, and the model's heads have {head_size}. Load it without kv_precision."
    )


class CacheFormat:
    """How caches hold keys and values.

    Args:
        mx: The module ``mlx.core``.
        group_size: Channels that share a scale, for caches of 8 bits; None for floats.
    """

    def __init__(self, mx: Any, group_size: int | None) -> None:
        self._mx = mx
        self._group_size = group_size

    @property
    def is_quantized(self) -> bool:
        """Whether they hold 8 bits."""
        return self._group_size is not None

    @property
    def bytes_per_value(self) -> float:
        """Bytes of a key or value, at most: of 8 bits, with a share of scale and offset."""
        return 4.0 if self._group_size is None else 1.0 + 8.0 / self._group_size

    def new(self, layers: int) -> list[Any]:
        """An empty cache for every layer."""
        module = import_model_module("cache")
        if self._group_size is None:
            return [module.KVCache() for _ in range(layers)]
        return [
            module.QuantizedKVCache(group_size=self._group_size, bits=_BITS) for _ in range(layers)
        ]

    def read(self, stored: Any, length: int) -> Any:
        """Keys or values of a cache, (kv_heads, length, head_size), as floats.

        Args:
            stored: The ``keys`` or ``values`` of a cache of this format.
            length: Positions.
        """
        if self._group_size is None:
            return stored[0, :, :length]
        parts = (part[0, :, :length] for part in stored)
        return self._mx.dequantize(*parts, group_size=self._group_size, bits=_BITS)

    def stored(self, values: Any) -> Any:
        """The reverse: what a cache keeps of floats, (kv_heads, length, head_size)."""
        if self._group_size is None:
            return values[None]
        return tuple(self._mx.quantize(values[None], group_size=self._group_size, bits=_BITS))
