"""What an artifact is to be: its precision, how it is quantized, in what it computes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import numpy as np

from phirt.build.checkpoint import CheckpointTensor
from phirt.build.precision import EMBEDDING, LM_HEAD, Precision
from phirt.build.quantize import QuantizedMatrix
from phirt.build.repack import (
    BELOW_8_BITS,
    FOUR_BIT_ENCODINGS,
    GGML_BLOCK_SIZE,
    SYMMETRIC_ENCODINGS,
)
from phirt.models.decoder_config import DecoderConfig

__all__ = ["BLOCK_SIZES", "DEFAULT_INT8_LAYERS", "Quantization", "Recipe"]

DEFAULT_INT8_LAYERS = ("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj")
"""What ``int4`` keeps in 8 bits. Queries, keys and values caused half of the KL of SmolLM2 in 4
bits."""

_VECTORS = ("norm.weight", ".bias")

BLOCK_SIZES = (16, 32, 64, 128, 256)
"""The block sizes that ONNX Runtime's MatMulNBits multiplies by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """How ``int4`` rounds; other precisions take no notice of it.

    Attributes:
        block_size: Weights of a row that share a scale: one of `BLOCK_SIZES`. Smaller blocks
            are closer to the original, larger and slower.
        symmetric: No zero points: 16 levels about zero. ONNX Runtime multiplies faster by it,
            and the weights lose more.
        int8_layers: Which matrices are kept in 8 bits: patterns as in a shell, over the ends of
            names such as ``model.layers.0.mlp.down_proj``: ``"down_proj"``, ``"layers.0.*"``,
            ``"lm_head"``; none for all in 4 bits.
        calibrate: Run a text through the model, and let what is rounded later make up for the
            error of what was rounded before (`phirt.build.gptq`): much closer to the original,
            and as long as reading the text takes.

    Raises:
        TypeError: The patterns are one text.
        ValueError: There is no such block size.
    """

    block_size: int = 32
    symmetric: bool = False
    int8_layers: tuple[str, ...] = DEFAULT_INT8_LAYERS
    calibrate: bool = False

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            sizes = ", ".join(map(str, BLOCK_SIZES))
            raise ValueError(f"block_size={self.block_size!r} is not one of {sizes}")
        patterns: object = self.int8_layers
        if isinstance(patterns, str):  # of which each letter would be a pattern
            raise TypeError(f"int8_layers must be a tuple of patterns, not {patterns!r}")

    def keeps_8_bits(self, tensor: str) -> bool:
        """Whether the matrix of that name gets 8 bits."""
        name = tensor.removesuffix(".weight")
        return any(
            fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")
            for pattern in self.int8_layers
        )

    def check_patterns(self, tensors: Iterable[str]) -> None:
        """Refuse a pattern that is of no matrix: a slip would go unnoticed.

        Args:
            tensors: Names of all that a checkpoint has.

        Raises:
            ValueError: One was given that matches none.
        """
        # The LM head is there even where it is the embedding.
        names = [LM_HEAD, *(name for name in tensors if not name.endswith(_VECTORS))]
        for pattern in self.int8_layers:
            only = replace(self, int8_layers=(pattern,))
            if pattern not in DEFAULT_INT8_LAYERS and not any(map(only.keeps_8_bits, names)):
                raise ValueError(
                    f"int8_layers has the pattern {pattern!r}, which matches no matrix of the "
                    "model; names read like 'model.layers.0.mlp.down_proj'"
                )

    def for_decoder(self, config: DecoderConfig) -> Quantization:
        """The same, where a tied embedding counts as the LM head that it also is."""
        embedding = EMBEDDING.removesuffix(".weight")
        is_one = config.tie_word_embeddings and self.keeps_8_bits(LM_HEAD)
        if is_one and not self.keeps_8_bits(EMBEDDING):
            return replace(self, int8_layers=(*self.int8_layers, embedding))
        return self


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides what a writer writes of a checkpoint.

    Attributes:
        precision: How weights are stored.
        quantization: How int4 rounds.
        half: Whether an ONNX graph computes, and keeps its cache, in float16, as GPUs do best,
            whatever its weights are stored in; that of ``fp16`` does in any case.
        float_embedding: Whether an ONNX graph reads the embedding as floats in any case: not
            every execution provider reads rows of quantized ones.
        rounded: Matrices that were rounded already, by the names of their tensors.
    """

    precision: Precision
    quantization: Quantization = Quantization()
    half: bool = False
    float_embedding: bool = False
    rounded: Mapping[str, QuantizedMatrix] = field(default_factory=dict, compare=False, repr=False)

    @property
    def float_type(self) -> type[np.float32] | type[np.float16]:
        """What an ONNX graph computes in."""
        return np.float16 if self.half or self.precision is Precision.FP16 else np.float32

    @property
    def name(self) -> str:
        """All that it decides, in one word: a part of an artifact's identity."""
        words = [self.precision.value]
        if self.precision is Precision.INT4 and self.quantization != Quantization():
            chosen = self.quantization
            words += [
                f"b{chosen.block_size}",
                "sym" if chosen.symmetric else "asym",
                "+".join(chosen.int8_layers) or "none",
                *(["calibrated"] if chosen.calibrate else []),
            ]
        words += ["half"] * self.half + ["float-embedding"] * self.float_embedding
        return "-".join(words)

    def keeps_own_blocks(self, tensor: CheckpointTensor) -> bool:
        """Whether int4 takes a matrix's own blocks, which loses nothing."""
        if tensor.encoding not in BELOW_8_BITS:
            return False
        chosen = self.quantization
        if tensor.encoding in FOUR_BIT_ENCODINGS and chosen.block_size != GGML_BLOCK_SIZE:
            return False
        return not chosen.symmetric or tensor.encoding in SYMMETRIC_ENCODINGS

    def rounds_to_4_bits(self, tensor: CheckpointTensor) -> bool:
        """Whether a matrix is rounded to 4 bits now."""
        return (
            self.precision is Precision.INT4
            and not self.quantization.keeps_8_bits(tensor.name)
            and not self.keeps_own_blocks(tensor)
        )
