"""A generation whose model fails goes on with another, and its tokens are those of one model."""

from __future__ import annotations

import numpy as np
import pytest

from phirt.errors import (
    BackendRuntimeError,
    ContextLengthError,
    DevicePlacementError,
    NonFiniteLogitsError,
    OutOfMemoryError,
)
from phirt.generation.failover import Failover, Takeover
from phirt.generation.loop import DecodeLoop
from phirt.generation.params import GenerationParams
from phirt.generation.params_resolved import GenerationDefaults
from phirt.protocols import LoadedModel
from tests.fakes import FakeModel
from tests.faulty import FaultyModel

VOCAB = 64


def mixing(ids):
    """Logits that depend on every token so far, and on their order."""
    seed = 0
    for token in ids:
        seed = (seed * 1_000_003 + token + 1) % 2**32
    return np.random.default_rng(seed).normal(0, 3, VOCAB).astype(np.float32)


def model(**options):
    return FakeModel(mixing, vocab=VOCAB, **options)


class Chain:
    """The models of a request, each taking over from the one before; a `Recover`."""

    def __init__(self, *models: LoadedModel) -> None:
        self.models = list(models)
        self.asked: list[tuple[LoadedModel, Exception, int]] = []

    def __call__(self, failed, error, *, tokens):
        self.asked.append((failed, error, tokens))
        place = self.models.index(failed)
        if place + 1 == len(self.models):
            error.add_note("Nothing is left to go on with.")
            return None
        return Takeover(
            self.models[place + 1],
            Failover(
                backend=f"backend-{place}",
                device="cpu",
                reason=str(error),
                next_backend=f"backend-{place + 1}",
                next_device="cpu",
                tokens=tokens,
            ),
        )

    def loop(self, prompt=(1, 2, 3), *, chunk=512, **params):
        return DecodeLoop(
            self.models[0],
            list(prompt),
            GenerationParams(**{"max_new_tokens": 8, **params}),
            defaults=GenerationDefaults(),
            prefill_chunk=chunk,
            recover=self,
        )


def steps(loop):
    return [(step.token_id, step.logprob, step.top_logprobs) for step in loop]


SAMPLED = {"temperature": 1.5, "top_p": 0.95, "seed": 7}


class TestTheSameTokens:
    @pytest.mark.parametrize(
        "params",
        [
            {},
            SAMPLED,
            {"repetition_penalty": 1.3, "presence_penalty": 0.5, "no_repeat_ngram_size": 2},
            {**SAMPLED, "logprobs": 3, "min_new_tokens": 4},
            {"max_new_tokens": None},
        ],
        ids=["greedy", "sampled", "penalties", "logprobs", "to the end of the context"],
    )
    @pytest.mark.parametrize("at", [1, 2, 5, 8])
    @pytest.mark.parametrize("fault", [BackendRuntimeError("lost"), "nan"], ids=["raises", "nan"])
    def test_whichever_step_fails(self, params, at, fault):
        expected = steps(Chain(model(context_length=16)).loop(**params))
        chain = Chain(FaultyModel(model(context_length=16), at, fault), model(context_length=16))
        loop = chain.loop(**params)
        assert steps(loop) == expected
        (failover,) = loop.failovers
        assert (failover.backend, failover.next_backend) == ("backend-0", "backend-1")
        assert failover.tokens == at - 1

    @pytest.mark.parametrize("at", range(1, 8))
    def test_a_prompt_in_chunks(self, at):
        prompt = range(9)  # Three chunks, and then a call for every token but the last.
        expected = steps(Chain(model()).loop(prompt, chunk=4))
        chain = Chain(FaultyModel(model(), at), model())
        assert steps(chain.loop(prompt, chunk=4)) == expected

    @pytest.mark.parametrize("at", range(1, 8))
    def test_across_the_boundary_of_longrope(self, at):
        """Two calls before the boundary, a prefill beyond it, and then on."""
        expected = steps(Chain(model(rope_boundary=4)).loop())
        chain = Chain(FaultyModel(model(rope_boundary=4), at), model(rope_boundary=4))
        assert steps(chain.loop()) == expected

    def test_a_replay_beyond_the_boundary_is_of_the_long_regime(self):
        after = model(rope_boundary=6)
        steps(Chain(FaultyModel(model(rope_boundary=6), 7), after).loop(chunk=3))
        # Three of the prompt and six generated: the first call passes the boundary.
        assert [size for _, size in after.calls] == [7, 2, 1]

    def test_a_processor_with_a_state_sees_each_position_once(self):
        def run(*models):
            seen = []

            def processor(token_ids, logits):
                seen.append(token_ids.tolist())
                logits[len(seen) % VOCAB] += 5
                return logits

            return steps(Chain(*models).loop(logits_processors=[processor], **SAMPLED)), seen

        expected = run(model())
        assert run(FaultyModel(model(), 1), model()) == expected
        assert run(FaultyModel(model(), 4, "nan"), model()) == expected

    @pytest.mark.parametrize("at", [2, 3, 4, 5])
    def test_params_that_change_on_the_way(self, at):
        def run(*models):
            loop = Chain(*models).loop(**SAMPLED)
            tokens = [loop.step() for _ in range(3)]
            loop.params = loop.params.merge(temperature=0.3, logit_bias={5: 4.0}, max_new_tokens=12)
            return tokens + list(loop)

        assert run(FaultyModel(model(), at), model()) == run(model())

    def test_several_models_may_fail_one_after_the_other(self):
        expected = steps(Chain(model()).loop(**SAMPLED))
        chain = Chain(
            FaultyModel(model(), 3),
            FaultyModel(model(), 1),  # Fails as it takes over.
            FaultyModel(model(), 2, "nan"),
            model(),
        )
        loop = chain.loop(**SAMPLED)
        assert steps(loop) == expected
        assert [(each.backend, each.tokens) for each in loop.failovers] == [
            ("backend-0", 2),
            ("backend-1", 2),
            ("backend-2", 3),
        ]

    def test_a_larger_vocabulary_gives_no_other_tokens(self):
        """Runtimes pad it; what is beyond the first model's is never chosen."""

        def padded(ids):
            return np.concatenate([mixing(ids), np.full(16, 100, np.float32)])

        expected = steps(Chain(model()).loop())
        chain = Chain(FaultyModel(model(), 3), FakeModel(padded, vocab=VOCAB + 16))
        assert steps(chain.loop()) == expected


class TestWhatCountsAsAFailure:
    @pytest.mark.parametrize(
        "fault",
        [
            BackendRuntimeError("lost"),
            OutOfMemoryError("the cache does not grow"),
            DevicePlacementError("it runs elsewhere now"),
            RuntimeError("a native exception"),
            ValueError("so is this, as bindings translate std::invalid_argument"),
            MemoryError(),
        ],
        ids=lambda fault: type(fault).__name__,
    )
    @pytest.mark.parametrize("at", [0, 1, 3])
    def test_whatever_a_session_raises(self, fault, at):
        chain = Chain(FaultyModel(model(), at, fault), model())
        assert len(steps(chain.loop())) == 8
        ((_, error, tokens),) = chain.asked
        assert error is fault
        assert tokens == max(at - 1, 0)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_logits_without_a_finite_largest(self, value):
        def broken(ids):
            return np.full(VOCAB, value, np.float32)

        chain = Chain(FakeModel(broken, vocab=VOCAB), model())
        assert steps(chain.loop()) == steps(Chain(model()).loop())
        ((_, error, _),) = chain.asked
        assert isinstance(error, NonFiniteLogitsError)

    def test_a_model_that_was_closed_because_another_request_left_it(self):
        before = model()
        before.close()
        assert len(steps(Chain(before, model()).loop())) == 8

    def test_not_what_a_users_processor_raises(self):
        def broken(token_ids, logits):
            raise BackendRuntimeError("mine, whatever it is called")

        chain = Chain(model(), model())
        with pytest.raises(BackendRuntimeError, match="mine"):
            steps(chain.loop(logits_processors=[broken]))
        assert chain.asked == []

    @pytest.mark.parametrize(
        "params",
        [
            {"suppress_tokens": list(range(VOCAB))},
            {"logits_processors": [lambda ids, logits: logits * np.float32(np.nan)]},
        ],
        ids=["parameters", "a processor"],
    )
    def test_not_what_parameters_and_processors_leave_of_the_logits(self, params):
        chain = Chain(model(), model())
        with pytest.raises(NonFiniteLogitsError):
            steps(chain.loop(**params))
        assert chain.asked == []

    def test_not_a_context_that_is_full(self):
        fault = ContextLengthError("too long", required=9, available=8)
        chain = Chain(FaultyModel(model(), 2, fault), model())
        with pytest.raises(ContextLengthError):
            steps(chain.loop())
        assert chain.asked == []

    def test_not_a_cancellation(self):
        def cancelled(ids):
            loop.cancel()
            raise BackendRuntimeError("the call was ended")

        chain = Chain(FakeModel(cancelled, vocab=VOCAB), model())
        loop = chain.loop()
        assert loop.step() is None
        assert loop.finish_reason == "cancelled"
        assert chain.asked == []

    def test_nobody_waits_for_another_model_after_a_cancellation(self):
        def fails_as_well(ids):
            loop.cancel()
            raise RuntimeError("lost, whoever cancelled it")

        chain = Chain(FakeModel(fails_as_well, vocab=VOCAB), model())
        loop = chain.loop()
        with pytest.raises(RuntimeError, match="lost"):
            loop.step()
        assert chain.asked == []

    def test_a_cancellation_while_another_model_is_found(self):
        class Slow(Chain):
            def __call__(self, failed, error, *, tokens):
                loop.cancel()
                return super().__call__(failed, error, tokens=tokens)

        after = model()
        loop = Slow(FaultyModel(model(), 2), after).loop()
        loop.step()
        assert loop.step() is None
        assert loop.finish_reason == "cancelled"
        assert after.calls == []
        assert after.sessions_open == 0

    def test_not_an_interruption_from_the_keyboard(self):
        def interrupted(ids):
            raise KeyboardInterrupt

        chain = Chain(FakeModel(interrupted, vocab=VOCAB), model())
        with pytest.raises(KeyboardInterrupt):
            steps(chain.loop())
        assert chain.asked == []


class TestWhereNothingTakesOver:
    def test_the_error_is_the_first_one_and_its_notes_tell_the_rest(self):
        first, second = BackendRuntimeError("first"), RuntimeError("second")
        chain = Chain(FaultyModel(model(), 3, first), FaultyModel(model(), 1, second))
        loop = chain.loop()
        with pytest.raises(BackendRuntimeError) as caught:
            steps(loop)
        assert caught.value is first
        assert first.__notes__ == [
            "Then backend-1 on cpu failed: RuntimeError: second",
            "Nothing is left to go on with.",
        ]
        assert loop.finish_reason == "error"
        assert len(loop.generated_ids) == 2

    def test_each_model_is_asked_for_once(self):
        chain = Chain(*(FaultyModel(model(), 1) for _ in range(5)))
        with pytest.raises(BackendRuntimeError):
            steps(chain.loop())
        assert [failed for failed, _, _ in chain.asked] == chain.models

    @pytest.mark.parametrize(
        ("other", "lack"),
        [
            (FakeModel(vocab=VOCAB - 1), "its vocabulary has 63 tokens, not 64"),
            (model(context_length=10), "its context is 10 tokens, and 11 are asked for"),
        ],
        ids=["vocabulary", "context"],
    )
    def test_a_model_that_cannot_hold_the_request(self, other, lack):
        chain = Chain(FaultyModel(model(), 3), other)
        with pytest.raises(BackendRuntimeError, match="lost") as caught:
            steps(chain.loop())
        (note,) = caught.value.__notes__
        assert note.startswith("backend-1 on cpu took over")
        assert lack in note
        assert other.calls == []

    def test_without_a_limit_there_must_be_room_for_the_next_token(self):
        chain = Chain(FaultyModel(model(), 3), model(context_length=6))
        loop = chain.loop(max_new_tokens=None)
        assert len(steps(loop)) == 3
        assert loop.finish_reason == "context"

    def test_without_failover_an_error_is_raised_as_it_is(self):
        fault = BackendRuntimeError("lost")
        loop = DecodeLoop(
            FaultyModel(model(), 1, fault), [1], GenerationParams(), defaults=GenerationDefaults()
        )
        with pytest.raises(BackendRuntimeError) as caught:
            loop.step()
        assert caught.value is fault
        assert not hasattr(fault, "__notes__")
        assert loop.failovers == ()


class TestSessions:
    def test_the_failed_session_is_closed_before_another_model_is_asked_for(self):
        failing = FaultyModel(model(), 3)
        closed: list[bool] = []

        class Watching(Chain):
            def __call__(self, failed, error, *, tokens):
                closed.extend(session.closed for session in failing.sessions)
                return super().__call__(failed, error, tokens=tokens)

        steps(Watching(failing, model()).loop())
        assert closed == [True]

    def test_one_that_cannot_even_be_closed_ends_nothing(self, monkeypatch):
        failing = FaultyModel(model(), 3)
        loop = Chain(failing, model()).loop()
        loop.step()

        def close():
            raise RuntimeError("the device is gone")

        monkeypatch.setattr(failing.sessions[0], "close", close)
        assert len(steps(loop)) == 7

    def test_the_new_one_is_closed_at_the_end(self):
        after = model()
        steps(Chain(FaultyModel(model(), 3), after).loop())
        assert after.sessions_open == 0

    def test_cancelling_reaches_the_session_of_the_model_that_took_over(self):
        after = model()
        loop = Chain(FaultyModel(model(), 2), after).loop()
        loop.step()
        loop.step()
        loop.cancel()
        assert loop.step() is None
        assert loop.finish_reason == "cancelled"
        assert after.sessions_open == 0


def test_the_time_to_the_first_token_is_that_of_the_first_model():
    loop = Chain(FaultyModel(model(), 2), model(delay=0.05)).loop()
    loop.step()
    first = loop.timings(load_s=0)
    steps(loop)
    last = loop.timings(load_s=0)
    assert last.ttft_s == first.ttft_s
    assert last.prefill_tokens_per_s == first.prefill_tokens_per_s
    assert last.decode_tokens_per_s < 20
