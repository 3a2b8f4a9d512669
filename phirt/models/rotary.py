"""Rotary position embedding: the frequencies, and when LongRoPE changes them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from phirt.protocols import RopeRegime
from phirt.types import FloatArray

__all__ = ["Rotary"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotary:
    """How positions turn queries and keys (Su et al. 2021, RoFormer, equation 15).

    Pair ``i`` of a head (its elements ``i`` and ``i + dim / 2``) is rotated at position ``p``
    by the angle ``p * theta ** (-2 i / dim) / factors[i]``.

    Attributes:
        theta: Base of the frequencies.
        dim: Leading dimensions of a head that rotate; at most its width.
        factors: Divisors of the frequencies, shape (dim / 2,), or None: Llama 3's, a linear
            scaling, or LongRoPE's short ones.
        long_factors: LongRoPE's divisors for sequences beyond `boundary` (Ding et al. 2024),
            or None.
        boundary: The longest sequence with the short factors, or None without LongRoPE.
        attention_factor: Cosines and sines are multiplied by it (LongRoPE, YaRN).
    """

    theta: float
    dim: int
    factors: FloatArray | None = field(default=None, compare=False)
    long_factors: FloatArray | None = field(default=None, compare=False)
    boundary: int | None = None
    attention_factor: float = 1.0

    def frequencies(self, regime: RopeRegime = "short") -> FloatArray:
        """Angle per position of every pair, shape (dim / 2,).

        They are rounded to float32 where `transformers` rounds them.
        """
        exponents = (np.arange(0, self.dim, 2) / self.dim).astype(np.float32)
        powers = np.float32(self.theta) ** exponents
        factors = self.long_factors if regime == "long" else self.factors
        if factors is None:
            return np.asarray(1 / powers, np.float32)
        return np.asarray(1 / (factors * powers), np.float32)

    def tables(self, length: int, regime: RopeRegime = "short") -> tuple[FloatArray, FloatArray]:
        """Cosines and sines for positions 0 to ``length - 1``, each (length, dim / 2)."""
        angles = np.outer(np.arange(length, dtype=np.float32), self.frequencies(regime))
        scale = np.float32(self.attention_factor)
        return np.cos(angles) * scale, np.sin(angles) * scale
