"""How an artifact stores its weights, and which layouts can store them so."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

from phirt.errors import UnsupportedModelError

__all__ = [
    "EMBEDDING",
    "FORMAT_PRECISIONS",
    "LM_HEAD",
    "LOSSLESS",
    "Precision",
    "check_precision",
]

EMBEDDING = "model.embed_tokens.weight"
"""Name of the embedding in a checkpoint."""
LM_HEAD = "lm_head.weight"
"""Name of the LM head, where it is not the embedding."""


class Precision(StrEnum):
    """How an artifact stores its weights.

    Attributes:
        FP32: Decoded to float32, exactly.
        FP16: Rounded to float16.
        BF16: Rounded to bfloat16.
        EXACT: The checkpoint's own integers and scales, and float activations: the logits of
            `FP32` to rounding, from a fraction of the memory.
        INT8: 8-bit blocks. ONNX graphs round activations to 8 bits as well.
        INT4: The checkpoint's own blocks where they have 4 bits, and where they have 5 or 6,
            in 8. What has more is rounded: queries, keys, values, embedding and LM head to
            8 bits, the rest to 4, unless a `phirt.build.recipe.Quantization` says otherwise.
            Activations are rounded to 8 bits.
    """

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    EXACT = "exact"
    INT8 = "int8"
    INT4 = "int4"


LOSSLESS = (Precision.FP32, Precision.EXACT)
"""The precisions whose weights hold the very values of the source."""

FORMAT_PRECISIONS: Mapping[str, tuple[Precision, ...]] = MappingProxyType(
    {
        "onnx-genai": (
            Precision.FP32,
            Precision.FP16,
            Precision.EXACT,
            Precision.INT8,
            Precision.INT4,
        ),
        "openvino": (
            Precision.FP32,
            Precision.FP16,
            Precision.EXACT,
            Precision.INT8,
            Precision.INT4,
        ),
        "safetensors": (Precision.FP32, Precision.FP16, Precision.BF16),
    }
)
"""The layouts that phirt writes, each with the precisions that it can have there."""


def check_precision(layout: str, precision: str) -> Precision:
    """The precision of that name, where the layout can have it.

    Args:
        layout: One of `FORMAT_PRECISIONS`.
        precision: The name of a `Precision`.

    Raises:
        ValueError: There is no such precision.
        UnsupportedModelError: phirt does not write it in this layout.
    """
    chosen = Precision(precision)
    offered = FORMAT_PRECISIONS[layout]
    if chosen not in offered:
        raise UnsupportedModelError(
            f"precision={precision!r} was asked for; what this backend reads ({layout} folders) "
            f"phirt writes in {', '.join(offered)}. Choose one of these, or another backend."
        )
    return chosen
