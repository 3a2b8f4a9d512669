"""Logits that are in host memory."""

from __future__ import annotations

import numpy as np

from phirt.protocols import TopK
from phirt.types import FloatArray

__all__ = ["HostLogits"]


class HostLogits:
    """Logits that are in host memory already.

    Args:
        values: Shape (n, vocab), float32.
    """

    __slots__ = ("_values",)

    def __init__(self, values: FloatArray) -> None:
        self._values = values

    def numpy(self) -> FloatArray:
        """The logits, shape (n, vocab)."""
        return self._values

    def top(self, k: int) -> TopK:
        """The k largest logits of each position, chosen on the host."""
        logits = self._values
        if not 1 <= k <= logits.shape[1]:
            raise ValueError(f"k={k} must be from 1 to the vocabulary's size, {logits.shape[1]}")
        # Partial selection in O(vocabulary), then a sort of the k that are left.
        ids = np.sort(np.argpartition(-logits, k - 1, axis=1)[:, :k], axis=1)
        values = np.take_along_axis(logits, ids, axis=1)
        order = np.argsort(-values, axis=1, kind="stable")
        ids = np.take_along_axis(ids, order, axis=1)
        values = np.take_along_axis(values, order, axis=1)
        peak = values[:, :1]
        total = np.exp(logits - peak).sum(axis=1, dtype=np.float64)
        return TopK(ids, values, (peak[:, 0] + np.log(total)).astype(np.float32))
