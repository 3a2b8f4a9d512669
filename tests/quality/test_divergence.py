"""Divergence on a vocabulary of four tokens, against answers worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from phirt.quality.divergence import compare_rows

HALVES = [0.5, 0.25, 0.125, 0.125]
EVEN = [0.25, 0.25, 0.25, 0.25]


def logits(*rows):
    return np.log(np.array(rows, np.float32))


def test_by_hand():
    # 1/2 ln(2) + 1/4 ln(1) + 2 * 1/8 ln(1/2) = 1/4 ln(2)
    rows = compare_rows(logits(HALVES), logits(EVEN), np.array([0]))
    assert rows.kl == pytest.approx([0.25 * math.log(2)], rel=1e-6)


def test_it_is_of_the_candidate_from_the_reference_and_not_the_reverse():
    # 1/4 (ln(1/2) + ln(1) + ln(2) + ln(2)) = 1/4 ln(2); with 7/8 the two directions differ.
    uneven = [0.875, 0.0625, 0.03125, 0.03125]
    forth = compare_rows(logits(uneven), logits(EVEN), np.array([0])).kl[0]
    back = compare_rows(logits(EVEN), logits(uneven), np.array([0])).kl[0]
    # 7/8 ln(7/2) + 1/16 ln(1/4) + 2 * 1/32 ln(1/8), and 1/4 (ln(2/7) + ln(4) + 2 ln(8))
    assert forth == pytest.approx(
        0.875 * math.log(3.5) - math.log(4) / 16 - math.log(8) / 16, rel=1e-6
    )
    assert back == pytest.approx((math.log(2 / 7) + math.log(4) + 2 * math.log(8)) / 4, rel=1e-6)
    assert forth != pytest.approx(back, rel=0.1)


def test_equal_logits_diverge_by_nothing_at_all():
    values = np.random.default_rng(1).normal(0, 5, (7, 1000)).astype(np.float32)
    assert compare_rows(values, values.copy(), np.zeros(7, np.int64)).kl.tolist() == [0.0] * 7


def test_a_constant_added_to_logits_changes_nothing():
    rows = compare_rows(logits(HALVES), logits(HALVES) + 7, np.array([2]))
    assert rows.kl[0] < 1e-12
    assert rows.candidate_losses[0] == pytest.approx(math.log(8))


def test_losses_are_of_the_token_that_follows():
    rows = compare_rows(logits(HALVES, HALVES), logits(EVEN, EVEN), np.array([1, 3]))
    assert rows.reference_losses == pytest.approx([math.log(4), math.log(8)])
    assert rows.candidate_losses == pytest.approx([math.log(4), math.log(4)])


def test_the_most_likely_tokens_and_how_likely_they_are():
    rows = compare_rows(logits(HALVES), logits([0.1, 0.2, 0.6, 0.1]), np.array([0]))
    assert (rows.reference_ids[0], rows.candidate_ids[0]) == (0, 2)
    assert rows.reference_peaks[0] == pytest.approx(0.5)
    assert rows.candidate_peaks[0] == pytest.approx(0.6)


def test_of_equal_logits_the_first_is_the_most_likely():
    rows = compare_rows(logits(EVEN), logits([0.2, 0.3, 0.3, 0.2]), np.array([0]))
    assert (rows.reference_ids[0], rows.candidate_ids[0]) == (0, 1)


def test_a_token_that_is_all_but_impossible_does_not_make_it_infinite():
    far = np.array([[0.0, -3e38, 0.0, 0.0]], np.float32)
    rows = compare_rows(far, logits(EVEN), np.array([0]))
    # 3 * 1/3 ln(4/3)
    assert rows.kl == pytest.approx([math.log(4 / 3)])


def test_a_large_vocabulary_is_worked_on_in_blocks_with_the_same_result():
    random = np.random.default_rng(2)
    one, other = random.normal(0, 2, (2, 5, 300_000)).astype(np.float32)
    targets = np.arange(5)
    whole = compare_rows(one, other, targets)
    single = [
        compare_rows(one[i : i + 1], other[i : i + 1], targets[i : i + 1]).kl for i in targets
    ]
    assert whole.kl.tolist() == np.concatenate(single).tolist()
