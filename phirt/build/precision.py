"""How an artifact stores its weights."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["Precision"]


class Precision(StrEnum):
    """How an artifact stores its weights.

    Attributes:
        FP32: Decoded to float32, exactly.
        EXACT: The checkpoint's own integers and scales, and float activations: the logits of
            `FP32` to rounding, from a fraction of the memory.
        INT8: 8-bit blocks; activations are rounded to 8 bits as well.
        INT4: The checkpoint's own blocks where they have 4 bits. What has more is rounded:
            queries, keys, values, embedding and LM head to 8 bits, the rest to 4.
            Activations are rounded to 8 bits.
    """

    FP32 = "fp32"
    EXACT = "exact"
    INT8 = "int8"
    INT4 = "int4"
