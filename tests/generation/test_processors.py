"""Logits processors: four-token cases worked by hand, and `transformers` as the oracle."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phirt.generation.history import TokenHistory
from phirt.generation.params import GenerationParams
from phirt.generation.params_resolved import GenerationDefaults, resolve
from phirt.generation.processors import build_processors

INF = np.inf


def process(logits, *, prompt=(), output=(), stop_token_ids=(), defaults=None, **arguments):
    """``logits`` after the processors that ``arguments`` ask for."""
    buffer = np.array(logits, np.float32)
    history = TokenHistory(prompt, vocab_size=buffer.size)
    for token in output:
        history.append(token)
    params: dict[str, Any] = arguments
    resolved = resolve(GenerationParams(**params), defaults)
    for processor in build_processors(resolved, stop_token_ids=stop_token_ids):
        processor(history, buffer)
    return buffer


class TestByHand:
    """Four tokens; every expected number is worked out in one's head."""

    LOGITS = (2.0, -1.0, 0.5, 4.0)

    def check(self, expected, **request):
        np.testing.assert_array_equal(process(self.LOGITS, **request), np.float32(expected))

    def test_logit_bias_adds(self):
        self.check([2, 1, 0.5, 3], logit_bias={1: 2.0, 3: -1.0})

    def test_repetition_penalty_divides_positive_and_multiplies_negative_logits(self):
        self.check([1, -2, 0.5, 4], prompt=[0], output=[1], repetition_penalty=2.0)

    def test_repetition_penalty_counts_a_token_once(self):
        self.check([1, -1, 0.5, 4], prompt=[0, 0], output=[0], repetition_penalty=2.0)

    def test_a_repetition_penalty_below_one_rewards(self):
        self.check([4, -0.5, 0.5, 4], prompt=[0, 1], repetition_penalty=0.5)

    def test_an_extreme_repetition_penalty_forbids(self):
        self.check([0, -INF, 0.5, 4], prompt=[0, 1], repetition_penalty=1e300)

    def test_the_models_own_repetition_penalty_applies(self):
        defaults = GenerationDefaults(do_sample=False, repetition_penalty=2.0)
        self.check([1, -1, 0.5, 4], prompt=[0], defaults=defaults)

    def test_presence_penalty_counts_output_once_and_the_prompt_never(self):
        self.check([2, -2.5, 0.5, 2.5], prompt=[0], output=[1, 3, 3], presence_penalty=1.5)

    def test_frequency_penalty_grows_with_each_use(self):
        self.check([2, -1.5, 0.5, 2.5], prompt=[0, 1], output=[1, 3, 3, 3], frequency_penalty=0.5)

    def test_presence_and_frequency_add_up(self):
        self.check([2, -1, -1, 4], output=[2, 2], presence_penalty=0.5, frequency_penalty=0.5)

    def test_negative_penalties_reward(self):
        self.check([2, -1, 3.5, 4], output=[2, 2], presence_penalty=-1, frequency_penalty=-1)

    def test_no_repeat_bigram_forbids_what_followed_the_last_token(self):
        # 1 was followed by 2 in the prompt and by 3 in the output.
        self.check([2, -1, -INF, -INF], prompt=[1, 2], output=[1, 3, 1], no_repeat_ngram_size=2)

    def test_no_repeat_trigram_needs_both_tokens_to_match(self):
        # (0, 1) was followed by 2; (3, 1) by 0, but the last two tokens are (0, 1).
        self.check([2, -1, -INF, 4], prompt=[0, 1, 2, 3, 1, 0, 0, 1], no_repeat_ngram_size=3)

    def test_no_repeat_unigram_forbids_all_tokens_so_far(self):
        self.check([-INF, -1, -INF, 4], prompt=[0], output=[2], no_repeat_ngram_size=1)

    @pytest.mark.parametrize("prompt", [[], [1], [1, 1]])
    def test_no_ngram_repeats_in_a_history_shorter_than_one(self, prompt):
        self.check(self.LOGITS, prompt=prompt, no_repeat_ngram_size=3)

    def test_an_overlapping_ngram_is_forbidden_too(self):
        self.check([2, -INF, 0.5, 4], prompt=[1, 1, 1], no_repeat_ngram_size=3)

    def test_min_new_tokens_forbids_stop_tokens_until_enough(self):
        request: dict[str, Any] = {"prompt": [0, 0, 0], "min_new_tokens": 2}
        self.check([2, -INF, 0.5, -INF], **request, output=[2], stop_token_ids=[1, 3])
        self.check(self.LOGITS, **request, output=[2, 2], stop_token_ids=[1, 3])
        self.check(self.LOGITS, **request, output=[2], stop_token_ids=[])

    def test_suppress_tokens_forbids(self):
        self.check([-INF, -1, 0.5, -INF], suppress_tokens=[3, 0])

    def test_the_bias_comes_before_the_repetition_penalty(self):
        self.check([0.5, -1, 0.5, 4], prompt=[0], logit_bias={0: -1}, repetition_penalty=2.0)

    def test_the_repetition_penalty_comes_before_presence(self):
        self.check([0, -1, 0.5, 4], output=[0], repetition_penalty=2.0, presence_penalty=1.0)

    def test_suppression_comes_last_so_that_no_bias_undoes_it(self):
        self.check([-INF, -1, 0.5, 4], logit_bias={0: 100}, suppress_tokens=[0])


@pytest.mark.parametrize(
    "neutral",
    [
        {},
        {"repetition_penalty": 1},
        {"presence_penalty": 0, "frequency_penalty": 0},
        {"no_repeat_ngram_size": 0, "min_new_tokens": 0},
        {"logit_bias": {}, "suppress_tokens": [], "logits_processors": []},
        {"temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.1},
    ],
    ids=str,
)
def test_a_neutral_value_builds_no_processor(neutral):
    assert build_processors(resolve(GenerationParams(**neutral)), stop_token_ids=[1]) == []


class TestUserProcessor:
    def test_sees_the_history_and_the_processed_logits(self):
        seen = []

        def spy(token_ids, logits):
            seen.append((token_ids.tolist(), logits.tolist()))
            return logits

        process([1, 2, 3, 4], prompt=[3], output=[1], logit_bias={0: 9}, logits_processors=[spy])
        assert seen == [([3, 1], [10, 2, 3, 4])]

    def test_runs_in_order_and_may_return_a_new_array_or_write_in_place(self):
        def double(token_ids, logits):
            return logits * 2

        def increment(token_ids, logits):
            logits += 1
            return logits

        def reverse(token_ids, logits):
            return logits[::-1]

        processors = [double, increment, reverse]
        assert process([1, 2, 3, 4], logits_processors=processors).tolist() == [9, 7, 5, 3]

    def test_cannot_change_the_history(self):
        def tamper(token_ids, logits):
            token_ids[0] = 0
            return logits

        with pytest.raises(ValueError, match="read-only"):
            process([1, 2, 3, 4], prompt=[3], logits_processors=[tamper])

    def test_what_it_raises_propagates_unchanged(self):
        error = RuntimeError("mine")

        def fail(token_ids, logits):
            raise error

        with pytest.raises(RuntimeError) as caught:
            process([1, 2, 3, 4], logits_processors=[fail])
        assert caught.value is error

    @pytest.mark.parametrize(
        ("result", "error", "message"),
        [
            (None, TypeError, r"wrong must return .*float32.*\(4,\), not NoneType"),
            ([1.0, 2.0, 3.0, 4.0], TypeError, "not list"),
            (np.zeros(4), TypeError, r"not of float64: return result.astype\(numpy.float32\)"),
            (np.zeros(5, np.float32), ValueError, r"shape \(4,\), not of shape \(5,\)"),
            (np.zeros((1, 4), np.float32), ValueError, r"not of shape \(1, 4\)"),
        ],
        ids=str,
    )
    def test_what_it_returns_is_checked(self, result, error, message):
        def wrong(token_ids, logits):
            return result

        with pytest.raises(error, match=message):
            process([1, 2, 3, 4], logits_processors=[wrong])


# --- against transformers -----------------------------------------------------------------


@st.composite
def requests(draw):
    """Random logits and a history over a vocabulary of 4 to 50,000 tokens."""
    vocab = draw(st.sampled_from([4, 5, 64, 1000, 50_000]) | st.integers(4, 50_000))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = rng.normal(0, draw(st.sampled_from([0.5, 3.0, 10.0])), vocab).astype(np.float32)
    # Few distinct tokens make n-grams repeat.
    used = rng.integers(0, vocab, draw(st.integers(1, 12)))
    prompt = rng.choice(used, draw(st.integers(1, 60)))
    output = rng.choice(used, draw(st.integers(0, 60)))
    return logits, prompt, output, rng


@pytest.fixture(scope="session")
def oracle():
    """``oracle(class_name, *arguments)``: a processor of transformers over numpy arrays."""
    import torch
    from transformers.generation import logits_process

    def make(name, *arguments):
        processor = getattr(logits_process, name)(*arguments)

        def apply(token_ids, logits):
            ids = torch.from_numpy(np.array(token_ids, np.int64))[None]
            return processor(ids, torch.from_numpy(logits.copy())[None])[0].numpy()

        return apply

    return make


def check(oracle_processors, request, **arguments):
    logits, prompt, output, _ = request
    expected = logits
    for processor in oracle_processors:
        expected = processor(np.concatenate([prompt, output]), expected)
    mine = process(logits, prompt=prompt, output=output.tolist(), **arguments)
    np.testing.assert_allclose(mine, expected, rtol=1e-6, atol=0)


slowly = settings(deadline=None)  # a busy machine is no failure


@pytest.mark.oracle
class TestAgainstTransformers:
    @slowly
    @given(request=requests(), penalty=st.floats(0.1, 5))
    def test_repetition_penalty(self, oracle, request, penalty):
        expected = oracle("RepetitionPenaltyLogitsProcessor", penalty)
        check([expected], request, repetition_penalty=penalty)

    @slowly
    @given(request=requests(), size=st.integers(1, 6))
    def test_no_repeat_ngram(self, oracle, request, size):
        expected = oracle("NoRepeatNGramLogitsProcessor", size)
        check([expected], request, no_repeat_ngram_size=size)

    @slowly
    @given(request=requests(), least=st.integers(0, 80))
    def test_min_new_tokens(self, oracle, request, least):
        logits, prompt, _, rng = request
        stops = rng.integers(0, logits.size, 3).tolist()
        expected = oracle("MinNewTokensLengthLogitsProcessor", prompt.size, least, stops)
        check([expected], request, min_new_tokens=least, stop_token_ids=stops)

    @slowly
    @given(request=requests(), count=st.integers(1, 20))
    def test_suppress_tokens(self, oracle, request, count):
        logits, *_, rng = request
        ids = rng.integers(0, logits.size, count).tolist()
        check([oracle("SuppressTokensLogitsProcessor", ids)], request, suppress_tokens=ids)

    @slowly
    @given(request=requests(), count=st.integers(1, 20))
    def test_logit_bias(self, oracle, request, count):
        logits, *_, rng = request
        ids = rng.integers(0, logits.size, count).tolist()
        bias = dict(zip(ids, rng.normal(0, 5, count).tolist(), strict=True))
        sequences = {(token,): value for token, value in bias.items()}
        check([oracle("SequenceBiasLogitsProcessor", sequences)], request, logit_bias=bias)

    @slowly
    @given(
        request=requests(),
        penalty=st.floats(0.5, 2),
        size=st.integers(1, 4),
        least=st.integers(1, 80),
    )
    def test_the_whole_chain(self, oracle, request, penalty, size, least):
        logits, prompt, _, rng = request
        stops, banned = rng.integers(0, logits.size, (2, 3)).tolist()
        bias = {int(prompt[0]): 1.5}
        chain = [
            oracle("SequenceBiasLogitsProcessor", {(int(prompt[0]),): 1.5}),
            oracle("RepetitionPenaltyLogitsProcessor", penalty),
            oracle("NoRepeatNGramLogitsProcessor", size),
            oracle("MinNewTokensLengthLogitsProcessor", prompt.size, least, stops),
            oracle("SuppressTokensLogitsProcessor", banned),
        ]
        check(
            chain,
            request,
            logit_bias=bias,
            repetition_penalty=penalty,
            no_repeat_ngram_size=size,
            min_new_tokens=least,
            stop_token_ids=stops,
            suppress_tokens=banned,
        )
