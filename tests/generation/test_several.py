"""Beams and samples through a model: rows, processors, ends, and what is free afterwards."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest

from phirt.errors import (
    BackendRuntimeError,
    ContextLengthError,
    NonFiniteLogitsError,
    SessionClosedError,
)
from phirt.generation.loop import DecodeLoop
from phirt.generation.params import GenerationParams
from phirt.generation.params_resolved import GenerationDefaults, resolve
from phirt.generation.sampling_random import RandomStream, sample_seed
from phirt.generation.several import SeveralSequences
from tests.fake_pools import PooledModel

VOCAB = 64
PROMPT = [5, 9, 2]
WAYS = {
    "pool": {},
    "caches that move": {"batch": False, "kv": True},
    "no caches": {"batch": False, "kv": False},
}


def mixing(ids):
    """Logits that depend on every token so far, and on their order."""
    seed = 0
    for token in ids:
        seed = (seed * 1_000_003 + token + 1) % 2**32
    return np.random.default_rng(seed).normal(0, 3, VOCAB).astype(np.float32)


def table(*rows):
    """Logits of four tokens, from the last one only, as probabilities; the prompt ends in 0."""
    with np.errstate(divide="ignore"):
        logits = np.log(np.array(rows, np.float32))
    return lambda ids: logits[ids[-1]].copy()


class Never:
    """No stop string."""

    def add(self, token_id):
        return False

    def copy(self):
        return self


class After:
    """Ends a sequence with the second of two tokens in a row."""

    def __init__(self, *pair, last=None):
        self.pair = pair
        self.last = last

    def add(self, token_id):
        last, self.last = self.last, token_id
        return (last, token_id) == self.pair

    def copy(self):
        return After(*self.pair, last=self.last)


@pytest.fixture(params=WAYS)
def fake(request):
    """A model, in every way in which it may hold several sequences."""
    return PooledModel(mixing, vocab=VOCAB, **WAYS[request.param])


def several(model, params, *, prompt=PROMPT, rule=None, **options):
    options.setdefault("defaults", GenerationDefaults())
    request = SeveralSequences(model, prompt, GenerationParams(**params), **options)
    return request.run(rule or Never())


def ids_of(completions):
    return [[step.token_id for step in found.steps] for found in completions]


def best_of_all(count, length, *, score=sum):
    """The best sequences among all that begin with one of the likeliest tokens."""
    found: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    for _ in range(length):
        grown = []
        for ids, total in found:
            logits = mixing([*PROMPT, *ids]).astype(np.float64)
            logits -= np.log(np.exp(logits).sum())
            grown += [((*ids, int(t)), total + logits[t]) for t in np.argsort(-logits)[:count]]
        found = sorted(grown, key=lambda pair: -pair[1])[:count]
    return found


class TestBeams:
    def test_every_way_to_hold_rows_gives_the_same(self, fake):
        found = several(fake, {"num_beams": 4, "n": 4, "max_new_tokens": 6, "length_penalty": 0.0})
        expected = best_of_all(4, 6)
        assert ids_of(found) == [list(ids) for ids, _ in expected]
        scores = [score for _, score in expected]
        assert [completion.score for completion in found] == pytest.approx(scores, abs=1e-5)

    def test_the_prompt_is_run_once_and_rows_are_decoded_together(self):
        model = PooledModel(mixing, vocab=VOCAB)
        several(model, {"num_beams": 3, "max_new_tokens": 5})
        assert model.calls == [("run", 3), *[("step", 3)] * 4]
        assert model.pools_opened == [(3, 8)]
        assert model.copies[0] == 2  # of the one that holds the prompt
        assert model.sessions_opened == 3

    def test_n_returns_the_best(self):
        model = PooledModel(mixing, vocab=VOCAB)
        params = {"num_beams": 4, "max_new_tokens": 6}
        assert ids_of(several(model, params)) == ids_of(several(model, {**params, "n": 3}))[:1]

    def test_a_stop_token_ends_a_hypothesis(self):
        # From 0: 1 or 2. From 1: mostly 3, the end. From 2: mostly 2.
        model = PooledModel(
            table([0, 0.6, 0.4, 0], [0, 0.2, 0, 0.8], [0, 0, 0.9, 0.1], [0.25] * 4),
            vocab=4,
            eos=[3],
        )
        params = {"num_beams": 2, "n": 2, "max_new_tokens": 4, "length_penalty": 0}
        found = several(model, params, prompt=[0])
        assert ids_of(found) == [[1, 3], [2, 2, 2, 2]]
        assert [one.finish_reason for one in found] == ["stop", "length"]
        assert [one.score for one in found] == pytest.approx(
            [np.log(0.48), np.log(0.4 * 0.9**3)], abs=1e-6
        )

    def test_ignore_eos_and_min_new_tokens(self):
        rows = [[0, 0.6, 0.4, 0], [0, 0.2, 0, 0.8], [0, 0, 0.9, 0.1], [0.25] * 4]
        model = PooledModel(table(*rows), vocab=4, eos=[3])
        params = {"num_beams": 2, "max_new_tokens": 4, "length_penalty": 0}
        assert [1, 3] not in ids_of(several(model, {**params, "min_new_tokens": 3}, prompt=[0]))
        found = several(model, {**params, "ignore_eos": True, "n": 2}, prompt=[0])
        assert all(len(ids) == 4 for ids in ids_of(found))

    def test_a_rule_of_the_text_ends_a_hypothesis(self):
        model = PooledModel(mixing, vocab=VOCAB)
        params = {"num_beams": 3, "n": 3, "max_new_tokens": 6, "length_penalty": 0}
        first, second = ids_of(several(model, params))[0][1:3]
        found = several(model, params, rule=After(first, second))
        stopped = [one for one in found if one.finish_reason == "stop_string"]
        assert stopped
        assert all([step.token_id for step in one.steps][-2:] == [first, second] for one in stopped)

    def test_processors_see_log_probabilities(self):
        """The penalty multiplies a log-probability: log .5 becomes log .25, as in transformers."""
        model = PooledModel(
            table([0.5, 0.3, 0.2, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]), vocab=4
        )
        seen = []

        def look(ids, logits):
            seen.append((ids.tolist(), np.exp(logits).sum()))
            return logits

        params = {"num_beams": 2, "n": 2, "max_new_tokens": 1, "logits_processors": [look]}
        found = several(model, {**params, "repetition_penalty": 2.0}, prompt=[0])
        assert ids_of(found) == [[1], [0]]
        assert [one.score for one in found] == pytest.approx(np.log([0.3, 0.25]), abs=1e-6)
        assert seen == [([0], pytest.approx(0.25 + 0.3 + 0.2))]

    def test_each_beam_has_a_history_of_its_own(self, fake):
        params = {"num_beams": 3, "n": 3, "max_new_tokens": 12, "no_repeat_ngram_size": 1}
        for ids in ids_of(several(fake, params)):
            assert len({*PROMPT, *ids}) == len(PROMPT) + 12

    def test_log_probabilities_are_the_models_own(self, fake):
        params = {"num_beams": 3, "n": 2, "max_new_tokens": 4, "repetition_penalty": 1.5}
        for found in several(fake, {**params, "logprobs": 2}):
            ids = list(PROMPT)
            for step in found.steps:
                logits = mixing(ids).astype(np.float64)
                logits -= np.log(np.exp(logits).sum())
                assert step.logprob == pytest.approx(logits[step.token_id], abs=1e-5)
                best = np.argsort(-logits)[:2]
                assert [token for token, _ in step.top_logprobs] == best.tolist()
                ids.append(step.token_id)

    def test_the_context_ends_it(self):
        model = PooledModel(mixing, vocab=VOCAB, context_length=8)
        found = several(model, {"num_beams": 2, "n": 2})
        assert [one.finish_reason for one in found] == ["context"] * 2
        assert [len(ids) for ids in ids_of(found)] == [5, 5]

    def test_longrope_crosses_its_boundary_with_new_rows(self, fake):
        params = {"num_beams": 3, "n": 3, "max_new_tokens": 8}
        expected = ids_of(several(fake, params))
        fake.info = type(fake.info)(
            vocab_size=VOCAB,
            context_length=64,
            eos_token_ids=frozenset(),
            weights_id="fake",
            rope_boundary=6,
        )
        assert ids_of(several(fake, params)) == expected
        if fake.capabilities.batch:
            assert fake.pools_opened[-2:] == [(3, 6), (3, 11)]
        assert fake.sessions_open == fake.pools_open == 0

    def test_all_forbidden_is_an_error(self, fake):
        params = {"num_beams": 2, "suppress_tokens": list(range(VOCAB)), "max_new_tokens": 3}
        with pytest.raises(NonFiniteLogitsError, match="Every continuation of every beam"):
            several(fake, params)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_what_is_not_finite_is_refused(self, value):
        def spoil(ids, logits):
            logits[3] = value
            return logits

        model = PooledModel(lambda ids: spoil(ids, mixing(ids)), vocab=VOCAB)
        params = {"num_beams": 2, "max_new_tokens": 3}
        with pytest.raises(NonFiniteLogitsError):
            several(model, params)
        model = PooledModel(mixing, vocab=VOCAB)
        with pytest.raises(NonFiniteLogitsError, match="After the logits processors"):
            several(model, {**params, "logits_processors": [spoil]})


class TestSamples:
    PARAMS: ClassVar = {"temperature": 1.0, "seed": 11, "max_new_tokens": 12}

    def alone(self, **params):
        loop = DecodeLoop(
            PooledModel(mixing, vocab=VOCAB),
            PROMPT,
            GenerationParams(**{**self.PARAMS, **params}),
            defaults=GenerationDefaults(),
        )
        return [step.token_id for step in loop]

    def test_the_first_is_what_one_alone_gives(self, fake):
        assert ids_of(several(fake, {**self.PARAMS, "n": 3}))[0] == self.alone()

    def test_each_is_the_same_whatever_n_is(self, fake):
        two, five = (ids_of(several(fake, {**self.PARAMS, "n": count})) for count in (2, 5))
        assert two == five[:2]
        assert len({tuple(ids) for ids in five}) == 5

    def test_each_is_what_its_seed_gives_alone(self, fake):
        for found in several(fake, {**self.PARAMS, "n": 3}):
            assert [step.token_id for step in found.steps] == self.alone(seed=found.seed)

    def test_they_end_each_on_its_own_and_free_their_rows(self):
        model = PooledModel(mixing, vocab=VOCAB, eos=range(16))
        found = several(model, {**self.PARAMS, "n": 6, "max_new_tokens": 30})
        lengths = [len(one.steps) for one in found]
        assert len(set(lengths)) > 2
        assert [one.steps[-1].token_id < 16 for one in found] == [
            one.finish_reason == "stop" for one in found
        ]
        # As many rows in a step as there are samples that need another token.
        assert model.steps == [
            sum(length > step for length in lengths) for step in range(1, max(lengths))
        ]

    def test_a_rule_of_the_text_ends_one(self):
        params = {**self.PARAMS, "n": 3}
        model = PooledModel(mixing, vocab=VOCAB)
        expected = ids_of(several(model, params))
        pair = expected[1][3:5]
        found = several(model, params, rule=After(*pair))
        assert ids_of(found) == [expected[0], expected[1][:5], expected[2]]
        assert [one.finish_reason for one in found] == ["length", "stop_string", "length"]

    def test_processors_and_log_probabilities(self, fake):
        params = {**self.PARAMS, "n": 2, "logprobs": 1, "no_repeat_ngram_size": 1}
        for found in several(fake, params):
            ids = [step.token_id for step in found.steps]
            assert len(set(ids)) == len(ids)
            logits = mixing(PROMPT).astype(np.float64)
            expected = logits[ids[0]] - np.log(np.exp(logits).sum())
            assert found.steps[0].logprob == pytest.approx(expected, abs=1e-5)

    def test_longrope_crosses_its_boundary(self):
        plain = PooledModel(mixing, vocab=VOCAB)
        rope = PooledModel(mixing, vocab=VOCAB, rope_boundary=6)
        params = {**self.PARAMS, "n": 3}
        assert ids_of(several(rope, params)) == ids_of(several(plain, params))
        assert rope.pools_opened == [(3, 6), (3, 15)]

    def test_seeds_of_samples(self):
        assert sample_seed(7, 0) == 7
        seeds = [sample_seed(7, number) for number in range(1000)]
        assert len(set(seeds)) == 1000
        assert all(0 <= seed < 2**64 for seed in seeds)
        assert sample_seed(8, 1) != sample_seed(7, 1) == seeds[1]
        assert RandomStream(seeds[1]).uniform(0) != RandomStream(7).uniform(0)

    def test_the_seed_of_a_sample_is_pinned(self):
        """It is part of what a seed means: a release that changes it changes results."""
        assert sample_seed(0, 1) == 3908118788357988974
        assert sample_seed(11, 2) == 10319328122433156521


class TestWhatIsFreeAfterwards:
    BEAMS: ClassVar = {"num_beams": 3, "max_new_tokens": 6}
    SAMPLES: ClassVar = {"n": 3, "temperature": 1.0, "max_new_tokens": 6}

    @pytest.fixture(params=["beams", "samples"])
    def params(self, request):
        return self.BEAMS if request.param == "beams" else self.SAMPLES

    def test_at_the_end(self, fake, params):
        several(fake, params)
        assert fake.sessions_open == fake.pools_open == 0

    @pytest.mark.parametrize("call", [1, 2, 4])
    def test_when_the_model_fails(self, fake, params, call):
        fake.fail_at = call
        with pytest.raises(BackendRuntimeError, match="as it was told to"):
            several(fake, params)
        assert fake.sessions_open == fake.pools_open == 0

    @pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
    def test_when_a_processor_raises_or_ctrl_c_comes(self, fake, params, error):
        def raising(ids, logits):
            if len(ids) == 5:
                raise error
            return logits

        with pytest.raises(error):
            several(fake, {**params, "logits_processors": [raising]})
        assert fake.sessions_open == fake.pools_open == 0

    def test_when_it_is_cancelled(self, fake, params):
        def cancelling(ids, logits):
            if len(ids) == 5:
                request.cancel()
            return logits

        full = GenerationParams(**params, logits_processors=[cancelling])
        request = SeveralSequences(fake, PROMPT, full, defaults=GenerationDefaults())
        with pytest.raises(SessionClosedError, match="cancelled"):
            request.run(Never())
        assert fake.sessions_open == fake.pools_open == 0

    def test_when_it_was_cancelled_before(self, fake, params):
        request = SeveralSequences(
            fake, PROMPT, GenerationParams(**params), defaults=GenerationDefaults()
        )
        request.cancel()
        with pytest.raises(SessionClosedError, match="cancelled"):
            request.run(Never())
        assert not fake.calls
        assert fake.sessions_open == fake.pools_open == 0


class TestWhatIsRefused:
    def test_a_context_that_is_too_short(self, fake):
        with pytest.raises(ContextLengthError) as caught:
            several(fake, {"num_beams": 2, "max_new_tokens": 62})
        assert (caught.value.required, caught.value.available) == (65, 64)
        assert not fake.calls

    def test_an_empty_prompt(self, fake):
        with pytest.raises(ValueError, match="The prompt is empty"):
            several(fake, {"num_beams": 2}, prompt=[])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"num_beams": 0}, "num_beams must be at least 1"),
            ({"n": 0}, "n must be at least 1"),
            ({"num_beams": 1025}, "num_beams must be at least 1 and below 1025, not 1025"),
            ({"n": 2**31 - 1}, "n must be at least 1 and below 1025"),
            ({"num_beams": 2, "n": 3}, "n=3 is more than num_beams=2.*lower n"),
            ({"num_beams": 2, "do_sample": True}, "does not sample.*Leave one of them out"),
            ({"length_penalty": 2.0}, "length_penalty=2.0 is for beam search.*num_beams above 1"),
            ({"early_stopping": True, "num_beams": 1}, "early_stopping=True is for beam search"),
            ({"early_stopping": "always", "num_beams": 2}, 'True, False or "never"'),
            ({"length_penalty": np.inf, "num_beams": 2}, "length_penalty must be finite"),
        ],
    )
    def test_parameters(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            GenerationParams(**arguments)

    def test_a_type(self):
        wrong: Any = 1
        with pytest.raises(TypeError, match="early_stopping must be True, False or"):
            GenerationParams(num_beams=2, early_stopping=wrong)

    def test_neutral_values_ask_for_nothing(self):
        params = GenerationParams(length_penalty=1, early_stopping=False, num_beams=1, n=1)
        assert not params.is_several

    @pytest.mark.parametrize(
        ("arguments", "defaults", "message"),
        [
            ({"num_beams": 2, "temperature": 0.5}, {}, r"temperature=0.5 samples. Leave one"),
            ({"num_beams": 2, "top_k": 3, "top_p": 1}, {}, r"and top_k=3 samples"),
            (
                {"num_beams": 2},
                {"do_sample": True},
                r"the model's generation_config samples. Add do_sample=False",
            ),
            ({"n": 2}, {}, r"2 times the same greedy sequence: give a temperature above 0"),
            ({"n": 2, "temperature": 0}, {"do_sample": True}, r"the same greedy sequence"),
        ],
    )
    def test_what_only_the_model_decides(self, arguments, defaults, message):
        with pytest.raises(ValueError, match=message):
            resolve(GenerationParams(**arguments), GenerationDefaults(**defaults))

    def test_beams_of_a_model_that_samples(self):
        params = GenerationParams(num_beams=2, do_sample=False)
        assert resolve(params, GenerationDefaults(do_sample=True)).sampling is None

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"num_beams": 2}, "num_beams=2 cannot be streamed.*Model.generate"),
            ({"n": 2, "temperature": 1}, "n=2 cannot be streamed.*Model.generate"),
        ],
    )
    def test_one_loop_is_one_sequence(self, fake, arguments, message):
        params = GenerationParams(**arguments)
        with pytest.raises(ValueError, match=message):
            DecodeLoop(fake, PROMPT, params, defaults=GenerationDefaults())
        loop = DecodeLoop(fake, PROMPT, GenerationParams(), defaults=GenerationDefaults())
        with pytest.raises(ValueError, match=message):
            loop.params = params
        loop.finish("cancelled")
