"""The reference with keys and values rounded to 8 bits, as a runtime's cache has them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np

from phirt.backends import kv_ranges
from phirt.backends.onnxruntime.quantized_cache import scales_of
from phirt.backends.reference import adapter
from phirt.backends.reference.decoder import Cache
from phirt.models.folder import read_folder
from phirt.models.huggingface_config import read_decoder_config
from phirt.protocols import KVCache
from phirt.testing.subject import Oracle
from phirt.types import FloatArray, IntArray


class RoundedOracle(Oracle):
    """The reference, whose cache rounds as GroupQueryAttention's of 8 bits does.

    Attributes:
        ranges: How large keys and values become, on tokens of all kinds: in the tiny models,
            those of tokens that no text has say nothing of others.
    """

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(checkpoint)
        config = read_decoder_config(checkpoint / "config.json")
        dims = [config.rope_of(layer).dim for layer in range(config.num_layers)]
        with patch.object(kv_ranges, "calibration_pieces", any_tokens):
            self.ranges = kv_ranges.find_ranges(self.model, read_folder(checkpoint), dims)
        scales = scales_of(self.ranges)

        class Rounded(Cache):
            def append(
                self, layer: int, start: int, key: FloatArray, value: FloatArray
            ) -> tuple[FloatArray, FloatArray]:
                keys, values = scales[2 * layer], scales[2 * layer + 1]
                return super().append(layer, start, rounded(key, keys), rounded(value, values))

        self._cache = Rounded

    def logits(self, ids: Sequence[int]) -> FloatArray:
        """As the reference gives them, with a rounded cache."""
        with patch.object(adapter, "Cache", self._cache):
            return super().logits(ids)

    def cache(self, ids: Sequence[int]) -> KVCache:
        """Likewise."""
        with patch.object(adapter, "Cache", self._cache):
            return super().cache(ids)


def rounded(values: FloatArray, scales: FloatArray) -> FloatArray:
    found: FloatArray = np.clip(np.rint(values / scales), -128, 127) * scales
    return found


def any_tokens(_: object, *, vocab_size: int, count: int, longest: int) -> IntArray:
    return np.random.default_rng(0).integers(0, vocab_size, (count, longest))
