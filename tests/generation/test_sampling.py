"""How a token is chosen.

Four-token cases worked by hand, `transformers` as the oracle, reproducibility, the
distribution itself, and logits from which nothing can be chosen.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phirt.errors import NonFiniteLogitsError
from phirt.generation.params import GenerationParams
from phirt.generation.params_resolved import Sampling, resolve
from phirt.generation.sampling import candidates, choose, choose_token, greedy
from phirt.generation.sampling_logprobs import log_softmax_at, logsumexp, top_logprobs
from phirt.generation.sampling_random import RandomStream
from phirt.generation.sampling_subsets import nucleus, top_ids

INF = np.inf

slowly = settings(deadline=None)  # a busy machine is no failure


def f32(values):
    return np.array(values, np.float32)


def logs(*probabilities):
    """Logits whose softmax is these probabilities."""
    with np.errstate(divide="ignore"):
        return np.log(probabilities).astype(np.float32)


def distribution(logits, **sampling):
    """``{token: probability}`` of what may be chosen, rounded."""
    ids, probabilities = candidates(f32(logits), Sampling(**sampling))
    return {int(i): round(float(p), 6) for i, p in zip(ids, probabilities, strict=True)}


class TestByHand:
    P = logs(0.1, 0.4, 0.2, 0.3)

    def test_greedy_takes_the_largest(self):
        assert greedy(self.P) == 1

    def test_greedy_takes_the_lowest_id_of_equals(self):
        assert greedy(f32([1, 3, 3, 2])) == 1

    def test_neutral_sampling_is_the_softmax(self):
        assert distribution(self.P) == {0: 0.1, 1: 0.4, 2: 0.2, 3: 0.3}

    def test_temperature_half_squares(self):
        # 1, 16, 4, 9 of 30
        expected = {0: 0.033333, 1: 0.533333, 2: 0.133333, 3: 0.3}
        assert distribution(self.P, temperature=0.5) == expected
        assert distribution(self.P, temperature=0.5, top_k=4) == expected

    def test_top_k_keeps_k(self):
        assert distribution(self.P, top_k=2) == {1: 0.571429, 3: 0.428571}
        assert distribution(self.P, top_k=1) == {1: 1.0}

    def test_top_k_keeps_the_ties_of_the_kth(self):
        assert distribution(logs(0.4, 0.2, 0.2, 0.2), top_k=2) == {0: 0.4, 1: 0.2, 2: 0.2, 3: 0.2}

    def test_top_k_beyond_the_vocabulary_keeps_all(self):
        assert len(distribution(self.P, top_k=1000)) == 4

    def test_top_p_keeps_the_smallest_set_that_reaches_it(self):
        # 0.4 + 0.3 = 0.7 falls short of 0.75; with 0.2 it is passed.
        assert distribution(self.P, top_p=0.75) == {1: 0.444444, 2: 0.222222, 3: 0.333333}
        assert distribution(self.P, top_p=0.65) == {1: 0.571429, 3: 0.428571}

    def test_top_p_keeps_at_least_one(self):
        assert distribution(self.P, top_p=1e-9) == {1: 1.0}

    def test_top_p_reached_exactly_keeps_no_more(self):
        assert distribution([0, 0, 0, 0], top_p=0.5) == {0: 0.5, 1: 0.5}

    def test_top_p_takes_the_lowest_ids_of_equals(self):
        assert distribution(logs(0.2, 0.2, 0.4, 0.2), top_p=0.7) == {0: 0.25, 1: 0.25, 2: 0.5}

    def test_top_p_is_of_what_top_k_left(self):
        # 0.4 of the 0.7 that remain is 0.571: one token reaches 0.5, of all it would not.
        assert distribution(self.P, top_k=2, top_p=0.5) == {1: 1.0}
        assert len(distribution(self.P, top_p=0.5)) == 2

    def test_min_p_is_relative_to_the_largest(self):
        # 0.6 of 0.4 is 0.24.
        assert distribution(self.P, min_p=0.6) == {1: 0.571429, 3: 0.428571}
        assert distribution(self.P, min_p=0.2) == {0: 0.1, 1: 0.4, 2: 0.2, 3: 0.3}

    def test_min_p_one_keeps_the_largest_and_its_ties(self):
        assert distribution([1, 2, 2, 0], min_p=1.0) == {1: 0.5, 2: 0.5}

    def test_min_p_is_after_the_temperature(self):
        # Squared: 9/16 of the largest is below 0.6.
        assert distribution(self.P, temperature=0.5, min_p=0.6) == {1: 1.0}

    def test_min_p_does_not_change_what_top_p_counts(self):
        # min-p first would leave 0.4 and 0.3, of which 0.4 alone is 57 %.
        assert distribution(self.P, top_p=0.5, min_p=0.6) == {1: 0.571429, 3: 0.428571}

    def test_a_forbidden_token_is_no_candidate(self):
        masked = logs(0.5, 0, 0.5, 0)
        assert distribution(masked, top_k=3) == {0: 0.5, 2: 0.5}
        assert distribution(masked, top_p=0.9) == {0: 0.5, 2: 0.5}
        assert distribution(masked, min_p=0.01) == {0: 0.5, 2: 0.5}
        assert distribution(masked)[1] == 0

    @pytest.mark.parametrize(
        ("uniform", "token"),
        [(0, 3), (0.199, 3), (0.2, 5), (0.5, 5), (0.699, 5), (0.7, 9), (1 - 2**-53, 9)],
    )
    def test_choosing_inverts_the_cumulative_distribution(self, uniform, token):
        ids, probabilities = np.array([3, 5, 7, 9, 11]), np.array([0.2, 0.5, 0.0, 0.3, 0.0])
        assert choose(ids, probabilities, uniform) == token

    def test_greedy_needs_no_random_number_and_sampling_uses_it(self):
        assert choose_token(self.P, None, 0.99) == 1
        assert [choose_token(self.P, Sampling(), u) for u in (0.05, 0.3, 0.6, 0.9)] == [0, 1, 2, 3]


class TestExtremes:
    """The limits of a distribution, without a warning or a NaN on the way."""

    @pytest.mark.parametrize("rest", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
    def test_a_tiny_temperature_is_greedy_and_a_huge_one_uniform(self, rest):
        logits = f32([1, 3, -INF, 2])
        assert distribution(logits, temperature=5e-324, **rest)[1] == 1.0
        flat = {p for p in distribution(logits, temperature=1e300, **rest).values() if p}
        assert flat == {0.333333}

    @pytest.mark.parametrize("rest", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
    def test_logits_at_the_ends_of_float32(self, rest):
        largest = np.finfo(np.float32).max
        assert distribution([-largest, largest, -INF, 0], **rest)[1] == 1.0

    def test_a_top_p_just_below_one_keeps_all_that_is_possible(self):
        logits = np.random.default_rng(0).normal(size=3000).astype(np.float32)
        logits[7] = -INF
        assert candidates(logits, Sampling(top_p=1 - 2**-53))[0].size == 2999


# L5. The paths differ, so each of them is asked.
PATHS = [
    None,
    Sampling(),
    Sampling(temperature=0.5),
    Sampling(top_k=3),
    Sampling(top_p=0.9),
    Sampling(min_p=0.1),
    Sampling(top_k=50, top_p=0.9, min_p=0.1),
]


@pytest.mark.parametrize("sampling", PATHS, ids=str)
@pytest.mark.parametrize("size", [4, 5000])
class TestNonFiniteLogits:
    @pytest.mark.parametrize("position", [0, 2, -1])
    @pytest.mark.parametrize("bad", [np.nan, INF])
    def test_nan_and_infinity_raise(self, sampling, size, position, bad):
        logits = np.zeros(size, np.float32)
        logits[position] = bad
        with pytest.raises(NonFiniteLogitsError, match=f"token id {position % size} is {bad}"):
            choose_token(logits, sampling, 0.5)

    def test_nan_beside_infinities_raises(self, sampling, size):
        logits = np.full(size, -INF, np.float32)
        logits[1:3] = INF, np.nan
        with pytest.raises(NonFiniteLogitsError):
            choose_token(logits, sampling, 0.5)

    def test_all_forbidden_raises(self, sampling, size):
        with pytest.raises(NonFiniteLogitsError, match=f"All {size} logits are -inf"):
            choose_token(np.full(size, -INF, np.float32), sampling, 0.5)

    def test_one_allowed_token_is_chosen(self, sampling, size):
        logits = np.full(size, -INF, np.float32)
        logits[3] = -5
        for uniform in (0.0, 0.5, 1 - 2**-53):
            assert choose_token(logits, sampling, uniform) == 3

    def test_the_logits_are_left_alone(self, sampling, size):
        logits = np.random.default_rng(0).normal(size=size).astype(np.float32)
        logits.flags.writeable = False
        choose_token(logits, sampling, 0.5)


class TestRandomStream:
    def test_the_numbers_of_a_seed_are_fixed(self):
        """These hold on every platform and numpy version, or old seeds lose their meaning."""
        stream = RandomStream(42)
        assert [stream.uniform(i) for i in range(4)] == [
            0.8201981478608876,
            0.18924562408645496,
            0.8676608148821462,
            0.3945814702827203,
        ]

    def test_it_is_numpys_philox(self):
        """Across the blocks that are drawn at once."""
        stream = RandomStream(2**64 - 1)
        expected = np.random.Generator(np.random.Philox(key=2**64 - 1)).random(1000)
        assert [stream.uniform(i) for i in range(1000)] == expected.tolist()

    def test_a_position_has_its_number_whatever_was_asked_before(self):
        stream, positions = RandomStream(7), [700, 3, 255, 256, 3, 100_000]
        assert [stream.uniform(p) for p in positions] == [
            RandomStream(7).uniform(p) for p in positions
        ]

    def test_without_a_seed_it_is_fresh_and_can_be_repeated(self):
        first, second = RandomStream(), RandomStream()
        assert first.seed != second.seed
        assert RandomStream(first.seed).uniform(5) == first.uniform(5)
        GenerationParams(seed=first.seed)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=0.8, top_k=50, top_p=0.9), [470, 141, 188, 188, 329, 81]),
        (Sampling(top_p=0.5), [478, 162, 188, 183, 329, 94]),
        (Sampling(min_p=0.3), [491, 170, 191, 188, 329, 94]),
        (Sampling(), [500, 175, 204, 197, 350, 102]),
    ],
    ids=str,
)
def test_identical_logits_and_seed_give_identical_tokens(sampling, expected):
    logits = f32(np.arange(1000) * 617 % 1000 / 128)
    stream = RandomStream(123)
    assert [choose_token(logits, sampling, stream.uniform(i)) for i in range(6)] == expected


@pytest.mark.parametrize("vocab", [8, 5000])
def test_samples_follow_the_distribution(vocab):
    """Pearson's chi-squared: 29.9 is passed by chance once in 10,000 seeds (7 degrees)."""
    draws = 20_000
    groups = np.arange(vocab) * 8 // vocab
    logits = np.random.default_rng(1).normal(size=vocab).astype(np.float32)
    ids, probabilities = candidates(logits, Sampling(temperature=0.7))
    stream = RandomStream(0)
    tokens = [choose(ids, probabilities, stream.uniform(i)) for i in range(draws)]
    observed = np.bincount(groups[tokens], minlength=8)
    exact = np.exp(logits.astype(np.float64) / 0.7)
    expected = np.bincount(groups, weights=exact / exact.sum(), minlength=8) * draws
    assert ((observed - expected) ** 2 / expected).sum() < 29.9


@slowly
@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([2047, 2048, 2049, 4096, 9000]))
def test_choosing_by_blocks_is_choosing(seed, size):
    rng = np.random.default_rng(seed)
    weights = rng.exponential(size=size) * (rng.random(size) < 0.5)
    cumulative = weights.cumsum()
    uniform = rng.random()
    expected = cumulative.searchsorted(uniform * cumulative[-1], side="right")
    assert choose(np.arange(size), weights, uniform) == expected


@slowly
@given(seed=st.integers(0, 2**32 - 1), uniform=st.sampled_from([0.0, 0.5, 1 - 2**-53]))
def test_a_token_of_probability_zero_is_never_chosen(seed, uniform):
    rng = np.random.default_rng(seed)
    weights = (rng.random(5000) * (rng.random(5000) < 0.01)).astype(np.float32)
    weights[rng.integers(5000)] = 1
    assert weights[choose(np.arange(5000), weights, uniform)] > 0


class TestSubsets:
    """The two selections, against a sort of everything."""

    @slowly
    @given(
        seed=st.integers(0, 2**32 - 1),
        size=st.integers(1, 20_000),
        k=st.integers(1, 300) | st.integers(1, 20_000),
        step=st.sampled_from([0, 0.5, 5]),
        masked=st.sampled_from([0, 0.5, 0.999]),
    )
    def test_top_ids(self, seed, size, k, step, masked):
        """With ties, masked tokens, and every ratio of k to the vocabulary."""
        rng = np.random.default_rng(seed)
        logits = rng.normal(0, 3, size).astype(np.float32)
        if step:
            logits = np.round(logits / step).astype(np.float32) * np.float32(step)
        logits[rng.random(size) < masked] = -INF
        kth = np.sort(logits)[::-1][min(k, size) - 1]
        expected = np.flatnonzero((logits >= kth) & (logits > -INF))
        np.testing.assert_array_equal(top_ids(logits, k), expected)

    @slowly
    @given(
        seed=st.integers(0, 2**32 - 1),
        size=st.integers(1, 20_000),
        spread=st.sampled_from([0.01, 1, 5]),
        ties=st.booleans(),
    )
    def test_nucleus(self, seed, size, spread, ties):
        """Flat and peaked, with the edge in a run of ties, below and above what is sorted."""
        rng = np.random.default_rng(seed)
        exponents = rng.normal(0, spread, size)
        weights = np.exp(np.round(exponents) if ties else exponents)
        target = rng.random() * weights.sum()
        order = np.argsort(-weights, kind="stable")
        reached = weights[order].cumsum().searchsorted(target)
        expected = np.sort(order[: reached + 1])
        np.testing.assert_array_equal(np.flatnonzero(nucleus(weights, target)), expected)

    def test_a_nucleus_that_cannot_reach_its_target_is_all_that_is_possible(self):
        weights = np.array([0.0, 1.0, 0.5, 0.0] * 1000)
        mask = nucleus(weights, 1e9)
        np.testing.assert_array_equal(mask, weights > 0)


class TestLogprobs:
    def test_by_hand(self):
        logits = logs(0.5, 0.125, 0.125, 0.25)
        assert logsumexp(logits) == pytest.approx(0, abs=1e-6)
        np.testing.assert_allclose(log_softmax_at(logits, [3, 0]), np.log([0.25, 0.5]), atol=1e-6)
        ids, values = top_logprobs(logits, 3)
        assert ids.tolist() == [0, 3, 1]
        np.testing.assert_allclose(values, np.log([0.5, 0.25, 0.125]), atol=1e-6)

    def test_k_may_be_nothing_or_everything(self):
        logits = logs(0.5, 0.25, 0.25, 0)
        assert top_logprobs(logits, 0)[0].size == 0
        assert top_logprobs(logits, 9)[0].tolist() == [0, 1, 2]

    @slowly
    @given(
        seed=st.integers(0, 2**32 - 1),
        size=st.integers(4, 50_000),
        spread=st.sampled_from([0.1, 3, 30]),
        shift=st.sampled_from([-50, 0, 50]),
    )
    def test_the_error_is_below_a_millionth(self, seed, size, spread, shift):
        rng = np.random.default_rng(seed)
        logits = rng.normal(shift, spread, size).astype(np.float32)
        logits[rng.random(size) < 0.1] = -INF
        logits[0] = shift
        exact = logits.astype(np.float64)
        peak = exact.max()
        expected = peak + np.log(np.exp(exact - peak).sum())
        assert logsumexp(logits) == pytest.approx(expected, abs=1e-6, rel=0)

    def test_a_known_normaliser_is_not_computed_again(self):
        logits = f32([0, 0, 0, 0])
        assert log_softmax_at(logits, [1], normalizer=3.0).tolist() == [-3]
        assert top_logprobs(logits, 1, normalizer=3.0)[1].tolist() == [-3]

    @pytest.mark.parametrize("bad", [np.nan, INF])
    def test_non_finite_logits_raise(self, bad):
        with pytest.raises(NonFiniteLogitsError):
            top_logprobs(f32([0, bad, 0, 0]), 2)


# --- against transformers -----------------------------------------------------------------


@st.composite
def logits_of_any_vocabulary(draw):
    """Random logits, with and without ties and forbidden tokens, 4 to 50,000 of them."""
    vocab = draw(st.sampled_from([4, 5, 64, 1000, 50_000]) | st.integers(4, 50_000))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = rng.normal(0, draw(st.sampled_from([0.1, 2.0, 8.0])), vocab).astype(np.float32)
    if draw(st.booleans()):
        logits = np.round(logits)
    logits[rng.random(vocab) < draw(st.sampled_from([0, 0, 0.5]))] = -INF
    logits[0] = 0
    return logits, rng


@pytest.fixture(scope="session")
def warp():
    """``warp(logits, (class_name, argument), ...)``: probabilities after these warpers.

    In float64: transformers works in the logits' own precision, and in float32 its running
    sum over a vocabulary alone moves the edge of a nucleus.
    """
    import torch
    from transformers.generation import logits_process

    def apply(logits, *warpers):
        scores = torch.from_numpy(logits.astype(np.float64))[None]
        for name, argument in warpers:
            scores = getattr(logits_process, name)(argument)(None, scores)
        return scores.softmax(dim=-1)[0].numpy()

    return apply


def check(expected, logits, **sampling):
    """The candidates have the oracle's probabilities; of ties, either's choice is right."""
    ids, probabilities = candidates(logits, Sampling(**sampling))
    assert (np.diff(ids) > 0).all()
    mine = np.zeros(logits.size)
    mine[ids] = probabilities
    np.testing.assert_allclose(np.sort(mine), np.sort(expected), rtol=1e-5, atol=1e-9)
    unique = np.unique(logits).size == logits.size
    if unique:
        np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.oracle
class TestAgainstTransformers:
    @slowly
    @given(case=logits_of_any_vocabulary(), temperature=st.floats(0.05, 20))
    def test_temperature(self, warp, case, temperature):
        logits, _ = case
        expected = warp(logits, ("TemperatureLogitsWarper", temperature))
        check(expected, logits, temperature=temperature)

    @slowly
    @given(case=logits_of_any_vocabulary(), k=st.integers(1, 100) | st.integers(1, 60_000))
    def test_top_k(self, warp, case, k):
        logits, _ = case
        check(warp(logits, ("TopKLogitsWarper", k)), logits, top_k=k)

    @slowly
    @given(case=logits_of_any_vocabulary())
    def test_top_p(self, warp, case):
        # Not drawn by hypothesis: a round number meets a sum of ties exactly, where the
        # last bit of the sum decides.
        logits, rng = case
        top_p = rng.uniform(0.01, 0.999)
        check(warp(logits, ("TopPLogitsWarper", top_p)), logits, top_p=top_p)

    @slowly
    @given(case=logits_of_any_vocabulary())
    def test_min_p(self, warp, case):
        logits, rng = case
        min_p = rng.uniform(0, 1)
        check(warp(logits, ("MinPLogitsWarper", min_p)), logits, min_p=min_p)

    @slowly
    @given(case=logits_of_any_vocabulary(), k=st.none() | st.integers(1, 2000))
    def test_the_whole_chain(self, warp, case, k):
        logits, rng = case
        temperature, top_p, min_p = rng.uniform([0.2, 0.05, 0], [2, 0.999, 0.3]).tolist()
        chain = [
            ("TemperatureLogitsWarper", temperature),
            *([("TopKLogitsWarper", k)] if k else []),
            ("TopPLogitsWarper", top_p),
            ("MinPLogitsWarper", min_p),
        ]
        params = GenerationParams(temperature=temperature, top_k=k, top_p=top_p, min_p=min_p)
        sampling = resolve(params).sampling
        assert sampling is not None
        check(
            warp(logits, *chain),
            logits,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
        )

    @slowly
    @given(case=logits_of_any_vocabulary(), k=st.integers(1, 20))
    def test_log_probabilities(self, warp, case, k):
        logits, _ = case
        expected = warp(logits)
        ids, values = top_logprobs(logits, k)
        np.testing.assert_allclose(np.exp(values), np.sort(expected)[::-1][: ids.size], rtol=2e-6)
        np.testing.assert_allclose(np.exp(values), expected[ids], rtol=2e-6)
