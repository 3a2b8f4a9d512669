"""Tokens of a text that models are calibrated on: what they compute there tells how to round.

The text is phirt's own, of many languages and kinds, and no part of what `phirt quality`
measures on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.resources import files

import numpy as np

from phirt.errors import UnsupportedModelError
from phirt.types import IntArray

__all__ = ["calibration_pieces"]

_LEAST_LENGTH = 8


def calibration_pieces(
    encode: Callable[[str], Sequence[int]], *, vocab_size: int, count: int, longest: int
) -> IntArray:
    """Ids of the calibration text in equal pieces from all over it, shape (count, tokens).

    Args:
        encode: The model's tokenizer.
        vocab_size: Ids that the model knows; others are left out.
        count: How many pieces.
        longest: Most tokens of one; of a short text, or a strange tokenizer, they have fewer.

    Raises:
        UnsupportedModelError: The tokenizer makes too few ids of it that the model knows.
    """
    text = (files("phirt.text") / "calibration.txt").read_text(encoding="utf-8")
    ids = np.array(encode(text), np.int64)
    ids = ids[ids < vocab_size]
    length = min(longest, len(ids) // count)
    if length < _LEAST_LENGTH:
        raise UnsupportedModelError(
            f"Calibration runs a text through the model, of which its tokenizer makes "
            f"{len(ids):,} tokens that it knows: too few. Do without calibration."
        )
    starts = np.linspace(0, len(ids) - length, count).astype(np.int64)
    return np.stack([ids[start : start + length] for start in starts])
