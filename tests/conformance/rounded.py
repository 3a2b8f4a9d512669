"""The reference with keys and values rounded to 8 bits, as a runtime's cache has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np

from phirt.backends import kv_ranges
from phirt.backends.mlx.cache import group_size_of
from phirt.backends.onnxruntime.quantized_cache import scales_of
from phirt.backends.reference import adapter
from phirt.backends.reference.decoder import Cache
from phirt.models.folder import read_folder
from phirt.models.huggingface_config import read_decoder_config
from phirt.protocols import KVCache
from phirt.testing.subject import Oracle
from phirt.types import FloatArray, IntArray


class RoundedOracle(Oracle):
    """The reference, whose cache holds what a runtime's would.

    Args:
        checkpoint: A Hugging Face folder.
        keep: ``f(index, values)``: keys (index 2 * layer) or values (the next one) as the cache
            holds them, shape (kv_heads, n, head_size).
    """

    def __init__(self, checkpoint: Path, keep: Callable[[int, FloatArray], FloatArray]) -> None:
        super().__init__(checkpoint)

        class Rounded(Cache):
            def append(
                self, layer: int, start: int, key: FloatArray, value: FloatArray
            ) -> tuple[FloatArray, FloatArray]:
                held = keep(2 * layer, key), keep(2 * layer + 1, value)
                return super().append(layer, start, *held)

        self._cache = Rounded

    def logits(self, ids: Sequence[int]) -> FloatArray:
        """As the reference gives them, with a rounded cache."""
        with patch.object(adapter, "Cache", self._cache):
            return super().logits(ids)

    def cache(self, ids: Sequence[int]) -> KVCache:
        """Likewise."""
        with patch.object(adapter, "Cache", self._cache):
            return super().cache(ids)


def by_channel(checkpoint: Path) -> RoundedOracle:
    """As GroupQueryAttention keeps 8 bits: with a scale for each channel.

    How large keys and values become is found on tokens of all kinds: in the tiny models, those
    of tokens that no text has say nothing of others.
    """
    model, config = Oracle(checkpoint).model, read_decoder_config(checkpoint / "config.json")
    dims = [config.rope_of(layer).dim for layer in range(config.num_layers)]
    with patch.object(kv_ranges, "calibration_pieces", any_tokens):
        scales = scales_of(kv_ranges.find_ranges(model, read_folder(checkpoint), dims))
    return RoundedOracle(checkpoint, lambda index, values: rounded(values, scales[index]))


def by_position(checkpoint: Path) -> RoundedOracle:
    """As MLX keeps 8 bits: with scale and offset for each group of a position's channels."""
    import mlx.core as mx

    def keep(_: int, values: FloatArray) -> FloatArray:
        size = group_size_of(values.shape[-1])
        with mx.stream(mx.cpu):
            parts = mx.quantize(mx.array(values), group_size=size, bits=8)
            return np.array(mx.dequantize(*parts, group_size=size, bits=8))

    return RoundedOracle(checkpoint, keep)


def rounded(values: FloatArray, scales: FloatArray) -> FloatArray:
    found: FloatArray = np.clip(np.rint(values / scales), -128, 127) * scales
    return found


def any_tokens(_: object, *, vocab_size: int, count: int, longest: int) -> IntArray:
    return np.random.default_rng(0).integers(0, vocab_size, (count, longest))
