"""The record of a request's tokens, against counting them anew."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phirt.generation.history import TokenHistory

TOKENS = st.lists(st.integers(0, 9), max_size=400)


@settings(deadline=None)
@given(prompt=TOKENS, output=TOKENS, looks=st.sets(st.integers(0, 400)))
def test_unique_ids_and_counts_follow_every_append(prompt, output, looks):
    """However often, and however late, they are asked for."""
    history = TokenHistory(prompt, vocab_size=10)
    for position, token in enumerate(output):
        if position in looks:
            history.unique_ids()
            history.output_counts()
        history.append(token)
    assert history.token_ids.tolist() == prompt + output
    assert history.output_ids.tolist() == output
    assert len(history) == len(prompt) + len(output)
    assert (history.prompt_length, history.output_length) == (len(prompt), len(output))
    assert sorted(history.unique_ids().tolist()) == sorted(set(prompt + output))
    ids, counts = history.output_counts()
    assert dict(zip(ids.tolist(), counts.tolist(), strict=True)) == {
        token: output.count(token) for token in set(output)
    }


def test_a_view_is_read_only_and_outlives_growth():
    history = TokenHistory([1, 2], vocab_size=10)
    view = history.token_ids
    assert view.dtype == np.int64
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 5
    for _ in range(10_000):
        history.append(3)
    assert view.tolist() == [1, 2]
    assert history.token_ids[-1] == 3


@pytest.mark.parametrize("bad", [-1, 10, 2**40])
def test_ids_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=f"Token id {bad} is out of range.*from 0 to 9"):
        TokenHistory([1, bad], vocab_size=10)
    history = TokenHistory([1], vocab_size=10)
    with pytest.raises(ValueError, match=f"Token id {bad}"):
        history.append(bad)
    assert history.token_ids.tolist() == [1]


@pytest.mark.parametrize("bad", [[1.5], ["a"], [[1, 2]], [True]])
def test_a_prompt_that_is_not_token_ids_is_refused(bad):
    with pytest.raises(TypeError, match="flat sequence of integers"):
        TokenHistory(bad, vocab_size=10)


def test_the_prompt_is_copied():
    prompt = np.array([1, 2, 3])
    history = TokenHistory(prompt, vocab_size=10)
    prompt[:] = 9
    assert history.token_ids.tolist() == [1, 2, 3]


@settings(deadline=None)
@given(prompt=TOKENS, first=TOKENS, second=TOKENS, looks=st.booleans())
def test_a_copy_goes_its_own_way(prompt, first, second, looks):
    history = TokenHistory(prompt, vocab_size=10)
    if looks:
        history.unique_ids()
        history.output_counts()
    other = history.copy()
    for one, rest in ((history, first), (other, second)):
        for token in rest:
            one.append(token)
        assert one.token_ids.tolist() == prompt + rest
        assert sorted(one.unique_ids().tolist()) == sorted(set(prompt + rest))
        ids, counts = one.output_counts()
        assert dict(zip(ids.tolist(), counts.tolist(), strict=True)) == {
            token: rest.count(token) for token in set(rest)
        }
