"""The most probable tokens, by number (top-k) or by mass (top-p), without a sort of all."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from phirt.types import FloatArray, IntArray

__all__ = ["LOWEST", "nucleus", "top_ids"]

LOWEST = np.finfo(np.float32).min
"""The lowest finite float32: what is not below it is not -inf."""

_ROWS = 64
_FEW = 1024
"""So many values are sorted without a second thought."""


def top_ids(logits: FloatArray, k: int) -> IntArray:
    """Ascending ids of the k largest logits and of all that equal the k-th; never of -inf.

    The logits are read as a matrix of few rows. The k-th largest of its column maxima
    cannot exceed the k-th largest logit, so only columns whose maximum reaches it can
    hold one of the k largest. That is one pass of vectorised maxima over the vocabulary
    and a selection among a few thousand numbers, instead of a selection in all.

    Args:
        logits: Shape (vocab,), without NaN.
        k: At least 1.
    """
    rows = min(_ROWS, logits.size // (2 * k))
    if rows < 4:  # too many are wanted for the columns to tell them apart
        if k >= logits.size:
            return np.flatnonzero(logits >= LOWEST)
        return np.flatnonzero(logits >= _kth_largest(logits, k))
    width = logits.size // rows
    table = logits[: rows * width].reshape(rows, width)
    maxima = table.max(axis=0)
    columns = np.flatnonzero(maxima >= _kth_largest(maxima, k))
    # Row by row these ids ascend, and the remainder after the last row is beyond them.
    offsets = np.arange(0, rows * width, width)
    ids = np.concatenate(
        [np.add.outer(offsets, columns).ravel(), np.arange(rows * width, logits.size)]
    )
    values = logits[ids]
    kept: IntArray = ids[values >= _kth_largest(values, k)]
    return kept


def nucleus(weights: NDArray[np.float64], target: float) -> NDArray[np.bool_]:
    """Which of the weights form the smallest set of largest ones that reaches ``target``.

    Of equal weights at the edge, those with the lowest indices are taken.

    Args:
        weights: Shape (n,), none negative, at least one positive.
        target: Above 0; where rounding puts it beyond the sum, all positive weights.

    Returns:
        A mask, shape (n,).
    """
    edge, count = _edge(weights, target)
    mask: NDArray[np.bool_] = weights >= edge
    surplus = int(np.count_nonzero(mask)) - count
    if surplus:
        mask[np.flatnonzero(weights == edge)[-surplus:]] = False
    return mask


def _edge(weights: NDArray[np.float64], target: float) -> tuple[float, int]:
    """The smallest weight in the nucleus, and the size of the nucleus.

    A set too large to sort is narrowed as in quickselect: split at the median, go on in
    the half in which the running sum passes the target.
    """
    values = weights[weights > 0]
    passed = 0
    while values.size > _FEW:
        middle = values.size // 2
        values = np.partition(values, middle)
        mass = float(values[middle:].sum())
        if mass >= target:
            values = values[middle:]
        else:
            target -= mass
            passed += values.size - middle
            values = values[:middle]
    values = np.sort(values)[::-1]
    last = min(int(values.cumsum().searchsorted(target)), values.size - 1)
    return float(values[last]), passed + last + 1


def _kth_largest(values: FloatArray, k: int) -> np.float32:
    """The k-th largest value, but nothing below the lowest finite number."""
    if values.size == 0:  # all were -inf, and no column was kept
        return LOWEST
    index = max(values.size - k, 0)
    return max(np.partition(values, index)[index], LOWEST)
