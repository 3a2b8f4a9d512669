"""Figures of spans: means, quantiles, standard errors, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from phirt.quality.divergence import Rows
from phirt.quality.figures import HISTOGRAM_EDGES, figures_of, histogram_of


def rows(kl, *, agree=True, loss=1.0):
    kl = np.array(kl, np.float64)
    ids = np.zeros(len(kl), np.int64)
    return Rows(
        kl=kl,
        reference_losses=np.full(len(kl), math.log(2)),
        candidate_losses=np.full(len(kl), loss),
        reference_ids=ids,
        candidate_ids=ids if agree else ids + 1,
        reference_peaks=np.ones(len(kl)),
        candidate_peaks=np.ones(len(kl)),
    )


def test_means_are_over_positions_and_not_over_spans():
    figures = figures_of([rows([0.0]), rows([1.0, 1.0, 1.0], agree=False)])
    assert (figures.positions, figures.spans) == (4, 2)
    assert figures.kl_mean == 0.75
    assert figures.top1_agreement == 0.25


def test_perplexity_is_e_to_the_mean_loss():
    figures = figures_of([rows([0.0, 0.0], loss=math.log(10))])
    assert figures.ppl_reference == pytest.approx(2)
    assert figures.ppl == pytest.approx(10)


def test_the_perplexity_of_nonsense_is_still_a_number():
    assert math.isfinite(figures_of([rows([1.0], loss=1e30)]).ppl)


def test_the_standard_error_takes_spans_as_units():
    # Means 0 and 0.2 about 0.1, of 2 positions each: sqrt(2/1 * 2 * 4 * 0.01) / 4 = 0.1; positions
    # as units would have given 0.058.
    figures = figures_of([rows([0.0, 0.0]), rows([0.2, 0.2])])
    assert figures.kl_se == pytest.approx(0.1)
    assert figures.top1_se == 0.0


def test_one_span_has_no_standard_error():
    figures = figures_of([rows([0.1, 0.3])])
    assert (figures.kl_se, figures.top1_se) == (None, None)


def test_the_99th_percentile():
    assert figures_of([rows(range(101))]).kl_p99 == 99


def test_a_histogram_counts_every_position_once():
    counts = histogram_of([rows([0.0, 1e-3 * 1.01, 1e6])])
    assert sum(counts) == 3
    assert len(counts) == len(HISTOGRAM_EDGES) - 1
    assert (counts[0], counts[-1]) == (1, 1)
    edges = list(HISTOGRAM_EDGES)
    middle = next(i for i, count in enumerate(counts) if count and 0 < i < len(counts) - 1)
    assert edges[middle] <= 1e-3 * 1.01 < edges[middle + 1]
