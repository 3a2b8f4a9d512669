"""Two models run over the same tokens: which calls are made, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from phirt.errors import ContextLengthError, NonFiniteLogitsError, UnsupportedModelError
from phirt.quality.passes import CHUNK, compare_pass, compare_tokens, longest_pass
from tests.fakes import FakeModel, counting, one_hot

VOCAB = 8
IDS = [index % VOCAB for index in range(20)]


def flipping(at):
    """Counts, but says another token after the first ``at`` tokens."""

    def rule(ids):
        return one_hot(VOCAB, (ids[-1] + 1 + (len(ids) == at)) % VOCAB)

    return rule


@pytest.mark.parametrize("kernel", ["many_rows", "one_row"])
def test_a_model_is_equal_to_itself(kernel):
    model = FakeModel()
    figures = compare_tokens(model, model, IDS, kernel=kernel)
    assert (figures.kl_mean, figures.top1_agreement) == (0.0, 1.0)
    assert figures.positions == len(IDS) - 1
    assert model.sessions_open == 0


def test_one_position_that_differs_is_found_where_it_is():
    found = compare_pass(FakeModel(), FakeModel(flipping(5)), IDS, decoded=len(IDS))
    for rows in found.values():
        assert np.flatnonzero(rows.kl).tolist() == [4]
        assert (rows.reference_ids[4], rows.candidate_ids[4]) == (5, 6)


def test_the_kernels_are_those_that_were_asked_for():
    reference, candidate = FakeModel(), FakeModel()
    compare_tokens(reference, candidate, IDS, kernel="one_row")
    assert reference.calls == [("verify", 19)]
    assert candidate.calls == [("run", 1)] * 19
    candidate.calls.clear()
    compare_tokens(reference, candidate, IDS)
    assert candidate.calls == [("verify", 19)]


def test_what_is_not_decoded_is_a_prompt():
    candidate = FakeModel()
    found = compare_pass(FakeModel(), candidate, IDS, decoded=4, many=False)
    assert candidate.calls == [("run", 15), *[("run", 1)] * 4]
    assert len(found["one_row"]) == 4
    assert "many_rows" not in found


def test_one_pass_of_the_reference_serves_both_kernels():
    reference = FakeModel()
    found = compare_pass(reference, FakeModel(), IDS, decoded=4)
    assert reference.calls == [("verify", 19)]
    assert [len(rows) for rows in found.values()] == [19, 4]


def test_positions_that_are_skipped_are_run_and_not_judged():
    candidate = FakeModel(flipping(2))
    found = compare_pass(FakeModel(), candidate, IDS, decoded=len(IDS), skipped=2)
    assert [len(rows) for rows in found.values()] == [17, 17]
    assert not any(rows.kl.any() for rows in found.values())


def test_long_texts_are_run_in_chunks_and_none_is_a_single_row():
    ids = [index % VOCAB for index in range(2 * CHUNK + 2)]
    model = FakeModel(context_length=1024)
    compare_tokens(model, model, ids)
    sizes = [size for _, size in model.calls]
    assert max(sizes) <= CHUNK
    assert min(sizes) > 1


def test_a_session_that_cannot_be_extended_gets_all_at_once():
    ids = [index % VOCAB for index in range(2 * CHUNK)]
    candidate = FakeModel(context_length=1024, can_extend=False)
    compare_tokens(FakeModel(context_length=1024), candidate, ids)
    assert candidate.calls == [("verify", len(ids) - 1)]


def test_a_reference_without_verify_decodes():
    reference = FakeModel(verify=False)
    assert compare_tokens(reference, FakeModel(), IDS).kl_mean == 0
    assert reference.calls == [("run", 1)] * 19


def test_a_candidate_without_verify_has_no_many_rows():
    candidate = FakeModel(verify=False)
    assert compare_tokens(FakeModel(), candidate, IDS, kernel="one_row").kl_mean == 0
    with pytest.raises(UnsupportedModelError, match="a fake needs none"):
        compare_tokens(FakeModel(), candidate, IDS)


def test_a_padded_vocabulary_is_compared_where_both_have_tokens():
    padded = FakeModel(lambda ids: np.append(counting(VOCAB)(ids), [50, 50]).astype(np.float32))
    padded = FakeModel(padded.rule, vocab=VOCAB + 2)
    assert compare_tokens(FakeModel(), padded, IDS).kl_mean == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kernel", ["many_rows", "one_row"])
def test_a_logit_that_is_no_number_is_told(value, kernel):
    def broken(ids):
        logits = one_hot(VOCAB, 1)
        if len(ids) == 7:
            logits[3] = value
        return logits

    for pair, who in (((broken, None), "reference"), ((None, broken), "candidate")):
        reference, candidate = (FakeModel(rule) for rule in pair)
        with pytest.raises(NonFiniteLogitsError, match=f"The {who} .* for token 3 after 7 tokens"):
            compare_tokens(reference, candidate, IDS, kernel=kernel)
        assert (reference.sessions_open, candidate.sessions_open) == (0, 0)


def test_longrope_stays_within_the_short_factors():
    assert longest_pass(FakeModel(context_length=64), FakeModel(rope_boundary=32)) == 33


def test_too_long_too_short_and_outside_the_vocabulary():
    model = FakeModel(context_length=16)
    with pytest.raises(ContextLengthError, match="most that both models take at once is 17"):
        compare_tokens(model, model, IDS)
    with pytest.raises(ValueError, match="at least 2 tokens"):
        compare_tokens(model, model, [1])
    with pytest.raises(ValueError, match="Token 9 is outside the 8 logits"):
        compare_tokens(model, model, [1, 9])
