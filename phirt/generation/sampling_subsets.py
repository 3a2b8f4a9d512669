"""The most probable tokens, by number (top-k) or by mass (top-p), without a sort of all."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from phirt.types import FloatArray, IntArray

__all__ = ["nucleus", "top_ids"]

_LOWEST = np.finfo(np.float32).min
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
            return np.flatnonzero(logits >= _LOWEST)
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


def nucleus(weights: NDArray[np.float64], target: float) -> NDArray[np.intp]:
    """Ascending indices of the smallest set of largest weights that reaches ``target``.

    Of equal weights at the edge, those with the lowest indices are taken. A set too
    large to sort is narrowed first, as in quickselect: split at a pivot, go on in the
    half in which the running sum passes the target.

    Args:
        weights: Shape (n,), none negative, at least one positive.
        target: Above 0; where rounding puts it beyond the sum, all positive weights.
    """
    certain: list[NDArray[np.intp]] = []
    open_ = np.flatnonzero(weights)
    while open_.size > _FEW:
        values = weights[open_]
        pivot = np.median(values[:: values.size // 64 | 1])
        above = values > pivot
        mass = float(values[above].sum())
        if mass >= target:
            open_ = open_[above]
            continue
        certain.append(open_[above])
        target -= mass
        level = open_[values == pivot]
        if level.size * pivot >= target:
            certain.append(level[: math.ceil(target / pivot)])
            return np.sort(np.concatenate(certain))
        certain.append(level)
        target -= float(level.size * pivot)
        open_ = open_[values < pivot]
    order = open_[np.argsort(-weights[open_], kind="stable")]
    count = int(weights[order].cumsum().searchsorted(target)) + 1
    return np.sort(np.concatenate([*certain, order[:count]]))


def _kth_largest(values: FloatArray, k: int) -> np.float32:
    """The k-th largest value, but nothing below the lowest finite number."""
    index = max(values.size - k, 0)
    return max(np.partition(values, index)[index], _LOWEST)
