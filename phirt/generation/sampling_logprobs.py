"""Log-probabilities of a position's tokens, from the model's logits before any processor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from phirt.generation.sampling import greedy
from phirt.generation.sampling_subsets import top_ids
from phirt.types import FloatArray, IntArray

__all__ = ["log_softmax_at", "logsumexp", "top_logprobs"]


def logsumexp(logits: FloatArray) -> float:
    """Log of the sum of exp over the vocabulary, with an error below 1e-6.

    Args:
        logits: Shape (vocab,); -inf is allowed.

    Raises:
        NonFiniteLogitsError: NaN or +inf among the logits, or all of them -inf.
    """
    peak = logits[greedy(logits)]
    # numpy adds float32 in pairs, so the error does not grow with the vocabulary.
    return float(peak) + float(np.log(np.exp(logits - peak).sum(), dtype=np.float64))


def log_softmax_at(
    logits: FloatArray, ids: Sequence[int] | IntArray, *, normalizer: float | None = None
) -> NDArray[np.float64]:
    """Natural log-probabilities of ``ids``, shape (n,).

    Args:
        logits: Shape (vocab,).
        ids: Token ids (n,).
        normalizer: `logsumexp` of these logits, where the caller has it already.

    Raises:
        NonFiniteLogitsError: As `logsumexp`.
    """
    if normalizer is None:
        normalizer = logsumexp(logits)
    return logits[np.asarray(ids, np.int64)].astype(np.float64) - normalizer


def top_logprobs(
    logits: FloatArray, k: int, *, normalizer: float | None = None
) -> tuple[IntArray, NDArray[np.float64]]:
    """The k most probable tokens: ids and log-probabilities, two arrays (at most k,).

    They descend; equal ones are in order of id. Fewer than k come back where fewer than
    k logits are finite.

    Args:
        logits: Shape (vocab,).
        k: 0 or more.
        normalizer: `logsumexp` of these logits, where the caller has it already.

    Raises:
        NonFiniteLogitsError: As `logsumexp`.
    """
    if normalizer is None:
        normalizer = logsumexp(logits)
    if k == 0:
        return np.empty(0, np.int64), np.empty(0, np.float64)
    ids = top_ids(logits, k)
    ids = ids[np.argsort(-logits[ids], kind="stable")[:k]]
    return ids, log_softmax_at(logits, ids, normalizer=normalizer)
