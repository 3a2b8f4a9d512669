"""How far two distributions over one vocabulary are apart, position by position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from phirt.types import FloatArray, IntArray

__all__ = ["Rows", "compare_rows", "join_rows"]

_Float64: TypeAlias = NDArray[np.float64]

# Logits that are worked on at once: 8 MB in float64, whatever the vocabulary.
_BLOCK = 2**20


@dataclass(frozen=True, slots=True)
class Rows:
    """What two models say at n positions, without their distributions.

    Attributes:
        kl: Kullback-Leibler divergence of the candidate from the reference in nats, shape (n,).
        reference_losses: ``-log p`` of the token that the text goes on with, in nats, by the
            reference, shape (n,).
        candidate_losses: The same by the candidate.
        reference_ids: The reference's most likely token, shape (n,); of equal ones the first.
        candidate_ids: The candidate's.
        reference_peaks: The probability that the reference gives its own most likely token,
            shape (n,).
        candidate_peaks: The same of the candidate.
    """

    kl: _Float64
    reference_losses: _Float64
    candidate_losses: _Float64
    reference_ids: IntArray
    candidate_ids: IntArray
    reference_peaks: _Float64
    candidate_peaks: _Float64

    def __len__(self) -> int:
        """Number of positions."""
        return len(self.kl)


def compare_rows(reference: FloatArray, candidate: FloatArray, targets: IntArray) -> Rows:
    """Hold a candidate's logits against a reference's.

    The divergence is ``KL(p || q) = sum over the vocabulary of p * (log p - log q)``, p being the
    softmax of the reference's logits and q that of the candidate's (Kullback and Leibler, "On
    Information and Sufficiency", 1951, equation 2.4), in float64 throughout.

    Args:
        reference: Shape (n, vocabulary), finite.
        candidate: Likewise.
        targets: The token that follows each position in the text, shape (n,).
    """
    step = max(1, _BLOCK // reference.shape[1])
    # One block for no positions, too.
    blocks = (slice(at, at + step) for at in range(0, max(1, len(targets)), step))
    return join_rows([_compare_block(reference[b], candidate[b], targets[b]) for b in blocks])


def join_rows(parts: Sequence[Rows]) -> Rows:
    """Positions one after the other; at least one part."""
    columns = ([getattr(part, field.name) for part in parts] for field in fields(Rows))
    return Rows(*map(np.concatenate, columns))


def _compare_block(reference: FloatArray, candidate: FloatArray, targets: IntArray) -> Rows:
    p, q = _log_softmax(reference), _log_softmax(candidate)
    rows = np.arange(len(targets))
    reference_ids, candidate_ids = p.argmax(axis=-1), q.argmax(axis=-1)
    divergences = (np.exp(p) * (p - q)).sum(axis=-1)
    return Rows(
        # It is never negative, but for the rounding of a sum that should be 0.
        kl=np.maximum(divergences, 0.0),
        reference_losses=-p[rows, targets],
        candidate_losses=-q[rows, targets],
        reference_ids=reference_ids,
        candidate_ids=candidate_ids,
        reference_peaks=np.exp(p[rows, reference_ids]),
        candidate_peaks=np.exp(q[rows, candidate_ids]),
    )


def _log_softmax(logits: FloatArray) -> _Float64:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted
