"""From positions to figures: perplexity, divergence, agreement, and how sure they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phirt.quality.divergence import Rows, join_rows

__all__ = ["HISTOGRAM_EDGES", "Figures", "figures_of", "histogram_of"]

HISTOGRAM_EDGES: tuple[float, ...] = tuple(float(10 ** (power / 4)) for power in range(-32, 9))
"""Edges of the bins of `histogram_of`, in nats: four a decade, from 1e-8 to 100."""

# Beyond it a perplexity is no number that says anything, and beyond e**709 none at all.
_LARGEST_LOSS = 700.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """The distance of a candidate from its reference.

    Attributes:
        positions: Predictions that the figures rest on.
        spans: Pieces of text, without shared context, that these are of.
        ppl_reference: Perplexity of the text by the reference: ``exp`` of the mean of
            ``-log p(next token)``.
        ppl: Perplexity by the candidate, at the same positions.
        kl_mean: Mean divergence of the candidate from the reference, in nats: see
            `phirt.quality.divergence.compare_rows`.
        kl_se: Standard error of ``kl_mean``, with the spans as the independent units, or None
            for a single span.
        kl_p99: The divergence that 1 % of the positions exceed.
        top1_agreement: Share of the positions at which both have the same most likely token.
        top1_se: Its standard error, likewise.
    """

    positions: int
    spans: int
    ppl_reference: float
    ppl: float
    kl_mean: float
    kl_se: float | None
    kl_p99: float
    top1_agreement: float
    top1_se: float | None


def figures_of(spans: Sequence[Rows]) -> Figures:
    """The figures of one or more spans together.

    A standard error is that of a ratio of two totals over clusters, since positions of one
    span resemble each other: ``sqrt(S / (S - 1) * sum(n_s**2 * (m_s - m)**2)) / N``, S spans of
    n_s positions with means m_s, N positions with mean m (Cochran, "Sampling Techniques", 3rd
    edition, 1977, section 2.13, less the correction for a finite population). Where spans come
    from sections that differ, it is an upper bound.
    """
    rows = join_rows(spans)
    return Figures(
        positions=len(rows),
        spans=len(spans),
        ppl_reference=_perplexity(float(rows.reference_losses.mean())),
        ppl=_perplexity(float(rows.candidate_losses.mean())),
        kl_mean=float(rows.kl.mean()),
        kl_se=_standard_error([span.kl for span in spans]),
        kl_p99=float(np.quantile(rows.kl, 0.99)),
        top1_agreement=float(_agreement(rows).mean()),
        top1_se=_standard_error([_agreement(span) for span in spans]),
    )


def histogram_of(spans: Sequence[Rows]) -> tuple[int, ...]:
    """Positions by divergence: one count for each two neighbours of `HISTOGRAM_EDGES`.

    What lies below the first edge (0 too, where both agree exactly) counts in the first bin,
    what lies above the last one in the last.
    """
    inside = np.clip(join_rows(spans).kl, HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1])
    counts, _ = np.histogram(inside, HISTOGRAM_EDGES)
    return tuple(map(int, counts))


def _agreement(rows: Rows) -> NDArray[np.float64]:
    agreed: NDArray[np.float64] = (rows.reference_ids == rows.candidate_ids).astype(np.float64)
    return agreed


def _standard_error(spans: Sequence[NDArray[np.float64]]) -> float | None:
    count = len(spans)
    if count < 2:
        return None
    sizes = np.array([len(span) for span in spans], np.float64)
    mean = float(np.concatenate(spans).mean())
    deviations = np.array([span.mean() for span in spans]) - mean
    squares = float((sizes**2 * deviations**2).sum())
    return float(np.sqrt(count / (count - 1) * squares) / sizes.sum())


def _perplexity(loss: float) -> float:
    return float(np.exp(min(loss, _LARGEST_LOSS)))
