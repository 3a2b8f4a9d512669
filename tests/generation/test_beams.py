"""Beam search as a function of scores, on cases that fit on a sheet of paper."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest

from phirt.generation.beams import BeamSearch

# A model of four tokens that looks at the last one only; token 3 ends a sequence.
END = 3
NEXT = {
    None: [0.5, 0.3, 0.1, 0.1],
    0: [0.1, 0.4, 0.2, 0.3],
    1: [0.25, 0.05, 0.1, 0.6],
    2: [0.25, 0.25, 0.25, 0.25],
}


def search_to_the_end(table=NEXT, *, stop_tokens=1, max_new_tokens=3, **options):
    """Run the search on the table; the hypotheses as (ids, score)."""
    search = BeamSearch(max_new_tokens=max_new_tokens, stop_tokens=stop_tokens, **options)
    while not search.is_done:
        continuations = []
        for beam in search.running:
            weights = np.array(table[beam.token_id if beam.length else None])
            ids = np.flatnonzero(weights)
            continuations.append((ids, np.log(weights[ids])))
        candidates = search.candidates(continuations)
        ends = [beam.token_id == END or beam.length == max_new_tokens for beam in candidates]
        search.advance(candidates, ends)
    return [(found.beam.token_ids, found.score) for found in search.hypotheses]


def logs(*probabilities):
    return pytest.approx(float(np.log(probabilities).sum()))


class TestASearchOfTwoBeams:
    """Step 1 ranks 0 (.5), 1 (.3), 2 (.1), 3 (.1): 0 and 1 go on.

    Step 2 ranks 0,1 (.2), 1,3 (.18), 0,3 (.15), 0,2 (.1): 1,3 ends among the best two and is
    the first hypothesis, 0,3 ends below them and is none; 0,1 and 0,2 go on.
    Step 3, the last: 0,1,3 (.12) and 0,1,0 (.05) are the best two of the ranking.
    """

    def test_without_length_penalty(self):
        assert search_to_the_end(num_beams=2, length_penalty=0) == [
            ([1, 3], logs(0.3, 0.6)),
            ([0, 1, 3], logs(0.5, 0.4, 0.6)),
        ]

    def test_a_penalty_above_0_prefers_the_longer(self):
        """log .12 / 3 = -0.707 comes before log .18 / 2 = -0.857."""
        found = search_to_the_end(num_beams=2, length_penalty=1)
        assert found == [
            ([0, 1, 3], pytest.approx(np.log(0.12) / 3)),
            ([1, 3], pytest.approx(np.log(0.18) / 2)),
        ]

    def test_a_penalty_below_0_prefers_the_shorter(self):
        found = search_to_the_end(num_beams=2, length_penalty=-1)
        assert found == [
            ([1, 3], pytest.approx(np.log(0.18) * 2)),
            ([0, 1, 3], pytest.approx(np.log(0.12) * 3)),
        ]

    def test_the_score_of_one_below_the_best_is_no_hypothesis(self):
        """0,3 (.15) is better than 0,1,3 (.12), and is not returned: the rule of transformers."""
        found = search_to_the_end(num_beams=2, length_penalty=0)
        assert [0, 3] not in [ids for ids, _ in found]


class TestWhenItEnds:
    # 3 is likely at once and always; whatever goes on is worse and gets worse.
    TABLE: ClassVar = {None: [0.3, 0, 0, 0.7], 0: [0.5, 0, 0, 0.5]}

    def lengths(self, table, **options):
        found = search_to_the_end(table, num_beams=2, max_new_tokens=8, **options)
        return sorted(len(ids) for ids, _ in found)

    def test_early_stopping_true_ends_with_as_many_as_beams(self):
        assert self.lengths(self.TABLE, early_stopping=True) == [1, 2]

    def test_false_goes_on_while_the_best_is_better_at_its_length(self):
        """0,3 has log .15 / 2 = -0.949; 0,0 is as good, and not better: the end."""
        assert self.lengths(self.TABLE, early_stopping=False, length_penalty=1) == [1, 2]

    def test_never_goes_on_while_any_length_could_be_better(self):
        """0,0 could still have log .15 / 8, and 0,0,3 has log .075 / 3 = -0.863."""
        found = search_to_the_end(
            self.TABLE, num_beams=2, max_new_tokens=8, early_stopping="never", length_penalty=1
        )
        assert [ids for ids, _ in found] == [[3], [0] * 8]
        assert found[1][1] == pytest.approx((np.log(0.3) + 7 * np.log(0.5)) / 8)

    def test_never_without_a_length_penalty_is_the_textbook_search(self):
        assert self.lengths(self.TABLE, early_stopping="never", length_penalty=0) == [1, 2]

    def test_the_end_of_the_room_ends_every_sequence(self):
        table = {None: [0.6, 0.4, 0, 0], 0: [0.5, 0.5, 0, 0], 1: [0.9, 0.1, 0, 0]}
        found = search_to_the_end(table, num_beams=2, max_new_tokens=2, length_penalty=0)
        assert found == [([1, 0], logs(0.4, 0.9)), ([0, 0], logs(0.6, 0.5))]


class TestWhatThereIsTooLittleOf:
    def test_more_beams_than_tokens(self):
        """Places that nothing takes stay empty: no sequence comes twice."""
        found = search_to_the_end(num_beams=5, max_new_tokens=2, length_penalty=0)
        ids = [tuple(ids) for ids, _ in found]
        assert len(set(ids)) == len(ids) == 5
        assert ids[0] == (0, 1)

    def test_fewer_sequences_than_beams(self):
        table = {None: [0.5, 0, 0, 0.5], 0: [0, 0, 0, 1]}
        found = search_to_the_end(table, num_beams=3, length_penalty=0)
        assert [ids for ids, _ in found] == [[3], [0, 3]]

    def test_a_beam_without_continuation_is_dropped(self):
        search = BeamSearch(num_beams=2, max_new_tokens=4)
        start = search.candidates([(np.array([0, 1]), np.log([0.6, 0.4]))])
        search.advance(start, [False, False])
        nothing = (np.array([], np.int64), np.array([]))
        rest = search.candidates([nothing, (np.array([2]), np.log([0.5]))])
        assert [beam.token_ids for beam in rest] == [[1, 2]]
        search.advance(rest, [False])
        search.advance(search.candidates([nothing]), [])
        assert search.is_done
        assert search.hypotheses == []


def test_equal_scores_go_by_beam_and_id():
    search = BeamSearch(num_beams=2, max_new_tokens=4)
    even = np.log([0.25] * 4)
    first = search.candidates([(np.arange(4), even)])
    assert [beam.token_id for beam in first] == [0, 1, 2, 3]
    search.advance(first, [False] * 4)
    second = search.candidates([(np.arange(4), even), (np.arange(4), even)])
    assert [(beam.row, beam.token_id) for beam in second] == [(0, 0), (0, 1), (0, 2), (0, 3)]


@pytest.mark.parametrize(("stop_tokens", "ranked"), [(0, 6), (1, 6), (2, 9)])
def test_enough_is_ranked_for_others_to_go_on(stop_tokens, ranked):
    assert BeamSearch(num_beams=3, max_new_tokens=1, stop_tokens=stop_tokens).ranked == ranked


@pytest.mark.parametrize("penalty", [1e300, -1e300])
def test_a_penalty_beyond_all_numbers_is_no_error(penalty):
    found = search_to_the_end(num_beams=2, length_penalty=penalty)
    assert len(found) == 2
