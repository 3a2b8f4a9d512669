"""Teacher forcing over a model whose logits are known."""

import itertools

import numpy as np
import pytest

from phirt.errors import BackendRuntimeError, ContextLengthError, UnsupportedModelError
from phirt.generation import score
from phirt.generation.score import score_tokens
from tests.fakes import FakeModel

# After token t, the four tokens have probabilities that depend on t alone.
TABLE = np.array([[4, 2, 1, 1], [1, 5, 1, 1], [2, 2, 2, 2], [1, 1, 1, 5]], np.float64) / 8


def markov(ids):
    return np.log(TABLE[ids[-1]]).astype(np.float32)


def test_each_token_is_scored_given_those_before_it():
    model = FakeModel(markov, vocab=4)
    expected = [np.log(TABLE[a, b]) for a, b in [(0, 1), (1, 1), (1, 3), (3, 0)]]
    assert score_tokens(model, [0, 1, 1, 3, 0]) == pytest.approx(expected, abs=1e-6)
    assert model.sessions_open == 0


def test_long_texts_are_scored_in_parts_and_every_part_counts(monkeypatch):
    monkeypatch.setattr(score, "_CHUNK", 3)
    ids = [0, 1, 2, 3, 0, 1, 1, 0, 3, 2, 2]
    model = FakeModel(markov, vocab=4)
    expected = [np.log(TABLE[a, b]) for a, b in itertools.pairwise(ids)]
    assert score_tokens(model, ids) == pytest.approx(expected, abs=1e-6)
    # Never a part of one token: runtimes take another kernel for it.
    assert [count for _, count in model.calls] == [3, 3, 2, 2]


@pytest.mark.parametrize("ids", [[], [1], [1, 4], [-1, 1]])
def test_bad_ids(ids):
    with pytest.raises(ValueError, match=r"two tokens|vocabulary"):
        score_tokens(FakeModel(vocab=4), ids)


def test_longer_than_the_context():
    with pytest.raises(ContextLengthError) as caught:
        score_tokens(FakeModel(vocab=4, context_length=3), [1, 1, 1, 1])
    assert (caught.value.required, caught.value.available) == (4, 3)


def test_a_graph_that_gives_the_last_position_only():
    with pytest.raises(UnsupportedModelError, match="last position"):
        score_tokens(FakeModel(vocab=4, verify=False), [1, 2])


def test_a_failure_frees_the_session():
    model = FakeModel(vocab=4, fail_at=1)
    with pytest.raises(BackendRuntimeError):
        score_tokens(model, [1, 2])
    assert model.sessions_open == 0


def test_a_text_beyond_the_rope_boundary_is_scored_in_the_long_regime_throughout():
    ids = [0, 1, 2, 3, 0, 1, 1, 0]
    model = FakeModel(markov, vocab=4, rope_boundary=4)
    expected = [np.log(TABLE[a, b]) for a, b in itertools.pairwise(ids)]
    assert score_tokens(model, ids) == pytest.approx(expected, abs=1e-6)
    assert model.calls[0][1] > 4
