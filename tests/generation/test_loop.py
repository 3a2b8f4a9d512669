"""The decode loop over a model whose logits are known."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from phirt.errors import BackendRuntimeError, ContextLengthError, NonFiniteLogitsError
from phirt.generation.forward import split_prompt
from phirt.generation.loop import DecodeLoop
from phirt.generation.params import GenerationParams
from phirt.generation.params_resolved import GenerationDefaults
from tests.fakes import FakeModel, counting, one_hot, scripted


def make_loop(model, prompt=(1, 2), *, chunk=512, defaults=None, **params):
    return DecodeLoop(
        model,
        list(prompt),
        GenerationParams(**params),
        defaults=defaults or GenerationDefaults(),
        prefill_chunk=chunk,
    )


def ids(loop):
    return [step.token_id for step in loop]


class TestEnding:
    def test_ends_after_max_new_tokens(self):
        loop = make_loop(FakeModel(), max_new_tokens=3)
        assert ids(loop) == [3, 4, 5]
        assert loop.finish_reason == "length"

    def test_a_stop_token_of_the_model_is_the_last_token(self):
        loop = make_loop(FakeModel(eos=[5]), max_new_tokens=9)
        assert ids(loop) == [3, 4, 5]
        assert loop.finish_reason == "stop"

    def test_stop_tokens_that_others_name_stop_too(self):
        loop = DecodeLoop(
            FakeModel(vocab=8, eos=[7]),
            [1, 2],
            GenerationParams(),
            defaults=GenerationDefaults(),
            eos_token_ids=[5, 99],
        )
        assert ids(loop) == [3, 4, 5]
        assert loop.finish_reason == "stop"

    def test_ignore_eos_goes_on_but_the_callers_own_stop_tokens_still_stop(self):
        loop = make_loop(FakeModel(eos=[5]), ignore_eos=True, stop_token_ids=[7])
        assert ids(loop) == [3, 4, 5, 6, 7]
        assert loop.finish_reason == "stop"

    def test_without_a_limit_it_ends_with_the_context(self):
        loop = make_loop(FakeModel(context_length=6))
        assert ids(loop) == [3, 4, 5, 6]
        assert loop.finish_reason == "context"

    def test_a_prompt_that_fills_the_context_leaves_no_room(self):
        with pytest.raises(ContextLengthError, match="64") as caught:
            make_loop(FakeModel(context_length=64), prompt=[1] * 64)
        assert (caught.value.required, caught.value.available) == (65, 64)

    def test_max_new_tokens_beyond_the_context_is_refused_not_truncated(self):
        with pytest.raises(ContextLengthError, match="max_new_tokens") as caught:
            make_loop(FakeModel(context_length=64), prompt=[1] * 60, max_new_tokens=5)
        assert (caught.value.required, caught.value.available) == (65, 64)

    def test_exactly_the_context_fits(self):
        loop = make_loop(FakeModel(context_length=64), prompt=[1] * 60, max_new_tokens=4)
        assert len(ids(loop)) == 4
        assert loop.finish_reason == "length"

    @pytest.mark.parametrize("prompt", [[], [8], [-1], [2**40], [2**64], [-1, 2**63]])
    def test_a_bad_prompt_is_refused_before_the_model_is_called(self, prompt):
        model = FakeModel(vocab=8)
        with pytest.raises(ValueError, match=r"prompt|[Tt]oken id"):
            make_loop(model, prompt=prompt)
        assert model.calls == []
        assert model.sessions_opened == 0


class TestSession:
    def test_nothing_is_opened_before_the_first_step(self):
        model = FakeModel()
        make_loop(model, max_new_tokens=1)
        assert model.sessions_opened == 0

    def test_one_prefill_then_one_decode_per_token_and_none_after_the_last(self):
        model = FakeModel()
        ids(make_loop(model, prompt=[1, 2, 3], max_new_tokens=3))
        assert model.calls == [("run", 3), ("run", 1), ("run", 1)]

    def test_the_cache_is_sized_to_the_request_not_to_the_context(self):
        model = FakeModel(context_length=100_000)
        ids(make_loop(model, prompt=[1, 2, 3], max_new_tokens=5))
        assert model.requests == [(8, 8)]

    def test_without_a_limit_the_cache_starts_small(self):
        model = FakeModel(context_length=100_000, eos=[5])
        ids(make_loop(model, prompt=[1, 2, 3]))
        ((max_length, expected),) = model.requests
        assert max_length == 100_000
        assert expected < 1000

    def test_the_session_is_freed_at_the_end(self):
        model = FakeModel()
        ids(make_loop(model, max_new_tokens=2))
        assert model.sessions_open == 0

    def test_a_long_prompt_is_prefilled_in_chunks(self):
        model = FakeModel(context_length=64)
        loop = make_loop(model, prompt=[1] * 9, chunk=4, max_new_tokens=1)
        ids(loop)
        assert model.calls == [("run", 3), ("run", 3), ("run", 3)]

    def test_a_session_that_cannot_extend_gets_the_whole_prompt(self):
        model = FakeModel(can_extend=False)
        ids(make_loop(model, prompt=[1] * 9, chunk=4, max_new_tokens=1))
        assert model.calls == [("run", 9)]

    def test_raising_the_limit_past_the_session_prefills_again(self):
        model = FakeModel()
        loop = make_loop(model, prompt=[1, 2], max_new_tokens=2)
        assert loop.step().token_id == 3
        loop.params = loop.params.merge(max_new_tokens=4)
        assert ids(loop) == [4, 5, 6]
        assert model.sessions_opened == 2
        assert model.sessions_open == 0
        assert loop.usage.prompt_tokens == 2


@pytest.mark.parametrize("length", range(1, 60))
@pytest.mark.parametrize("chunk", [3, 4, 7, 16])
def test_prompt_chunks_cover_the_prompt_and_none_is_a_single_token(length, chunk):
    sizes = split_prompt(length, chunk)
    assert sum(sizes) == length
    assert max(sizes) <= chunk
    assert min(sizes) > 1 or length == 1


@pytest.mark.parametrize("length", range(20, 60))
@pytest.mark.parametrize("first", [2, 11, 20])
def test_the_first_chunk_is_at_least_what_a_session_needs(length, first):
    sizes = split_prompt(length, 7, first=first)
    assert sum(sizes) == length
    assert sizes[0] >= first
    assert min(sizes) > 1


class TestLongRope:
    """A session is in one rotary regime for its life; the fake refuses what would mix them."""

    def test_crossing_the_boundary_prefills_once_more_and_only_once(self):
        model = FakeModel(vocab=64, rope_boundary=4)
        assert ids(make_loop(model, max_new_tokens=6)) == [3, 4, 5, 6, 7, 8]
        # Two of the prompt and two decoded, then five at once in the long regime, then on.
        assert [size for _, size in model.calls] == [2, 1, 1, 5, 1, 1]
        assert model.requests == [(4, 4), (8, 8)]
        assert model.sessions_open == 0

    def test_what_stays_below_never_crosses(self):
        model = FakeModel(vocab=64, rope_boundary=8)
        ids(make_loop(model, max_new_tokens=6))
        assert model.requests == [(8, 8)]

    @pytest.mark.parametrize(("prompt", "limits"), [(4, [4, 7]), (5, [8])])
    def test_a_prompt_at_the_boundary_is_short_and_one_beyond_is_long(self, prompt, limits):
        model = FakeModel(vocab=64, rope_boundary=4)
        ids(make_loop(model, range(prompt), max_new_tokens=3))
        assert [most for most, _ in model.requests] == limits

    def test_the_first_chunk_of_a_long_session_passes_the_boundary(self):
        model = FakeModel(vocab=64, rope_boundary=6)
        ids(make_loop(model, range(12), chunk=3, max_new_tokens=1))
        assert [size for _, size in model.calls] == [7, 3, 2]


def test_a_prefill_chunk_that_could_leave_one_token_is_refused():
    with pytest.raises(ValueError, match="prefill_chunk"):
        make_loop(FakeModel(), chunk=2)


class TestParamsBetweenTokens:
    def test_a_lower_limit_ends_it(self):
        loop = make_loop(FakeModel(), max_new_tokens=5)
        loop.step()
        loop.step()
        loop.params = loop.params.merge(max_new_tokens=1)
        assert loop.step() is None
        assert loop.finish_reason == "length"

    def test_new_processors_hold_from_the_next_token_on(self):
        loop = make_loop(FakeModel(), max_new_tokens=3)
        assert loop.step().token_id == 3
        loop.params = loop.params.merge(logit_bias={0: 100.0})
        assert loop.step().token_id == 0

    def test_params_of_another_type(self):
        loop = make_loop(FakeModel(), max_new_tokens=3)
        with pytest.raises(TypeError, match="not dict"):
            loop.params = {"temperature": 1.0}

    def test_wrong_params_leave_the_old_ones(self):
        loop = make_loop(FakeModel(vocab=8), max_new_tokens=3)
        loop.step()
        with pytest.raises(ValueError, match="suppress_tokens"):
            loop.params = loop.params.merge(suppress_tokens=[99])
        assert ids(loop) == [4, 5]

    def test_other_params_do_not_restart_the_random_numbers(self):
        def run(change):
            loop = make_loop(
                FakeModel(lambda ids: np.zeros(64, np.float32), vocab=64),
                do_sample=True,
                seed=7,
                max_new_tokens=12,
            )
            tokens = []
            for index, step in enumerate(loop):
                tokens.append(step.token_id)
                if change and index == 5:
                    loop.params = loop.params.merge(presence_penalty=0.0)
            return tokens

        assert run(change=True) == run(change=False)


class TestFailure:
    def test_an_error_of_the_backend_frees_the_session_and_is_raised(self):
        model = FakeModel(fail_at=3)
        loop = make_loop(model, max_new_tokens=9)
        produced = [loop.step().token_id, loop.step().token_id]
        with pytest.raises(BackendRuntimeError, match="as it was told"):
            loop.step()
        assert loop.finish_reason == "error"
        assert loop.generated_ids == produced
        assert model.sessions_open == 0
        assert loop.step() is None

    def test_a_users_processor_that_raises_propagates_unchanged(self):
        """Row L8."""

        class MineError(Exception):
            pass

        def broken(token_ids, logits):
            raise MineError("mine")

        model = FakeModel()
        loop = make_loop(model, max_new_tokens=9, logits_processors=[broken])
        with pytest.raises(MineError, match="mine"):
            loop.step()
        assert model.sessions_open == 0

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    @pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"top_k": 2}, {"top_p": 0.5}])
    def test_logits_that_are_not_finite_never_become_a_token(self, bad, params):
        """Row L5."""
        model = FakeModel(lambda ids: np.array([0, bad, 1, 2], np.float32), vocab=4)
        loop = make_loop(model, max_new_tokens=4, **params)
        with pytest.raises(NonFiniteLogitsError):
            loop.step()
        assert loop.generated_ids == []
        assert model.sessions_open == 0

    @pytest.mark.parametrize("params", [{}, {"temperature": 1.0}])
    def test_no_token_left_after_the_processors(self, params):
        """Row L5."""
        model = FakeModel(lambda ids: np.zeros(4, np.float32), vocab=4)
        loop = make_loop(model, suppress_tokens=[0, 1, 2, 3], **params)
        with pytest.raises(NonFiniteLogitsError):
            loop.step()


class TestCancel:
    def test_between_two_steps(self):
        model = FakeModel()
        loop = make_loop(model, max_new_tokens=9)
        loop.step()
        loop.cancel()
        assert loop.step() is None
        assert loop.finish_reason == "cancelled"
        assert model.sessions_open == 0

    def test_before_the_first_step_opens_nothing(self):
        model = FakeModel()
        loop = make_loop(model, max_new_tokens=9)
        loop.cancel()
        assert loop.step() is None
        assert model.sessions_opened == 0

    def test_ends_a_step_that_runs_in_another_thread(self):
        """Row L2."""
        model = FakeModel(stall=True)
        loop = make_loop(model, max_new_tokens=9)
        results = []
        thread = threading.Thread(target=lambda: results.append(loop.step()))
        thread.start()
        while not model.calls:
            pass
        loop.cancel()
        thread.join(timeout=30)
        assert results == [None]
        assert loop.finish_reason == "cancelled"
        assert model.sessions_open == 0


class TestLogprobs:
    def test_are_the_models_own_before_processors_and_temperature(self):
        logits = np.log(np.array([0.1, 0.2, 0.3, 0.4], np.float32))
        model = FakeModel(lambda ids: logits.copy(), vocab=4)
        loop = make_loop(model, max_new_tokens=1, logprobs=2, logit_bias={1: 50.0}, temperature=0.0)
        step = loop.step()
        assert step.token_id == 1
        assert step.logprob == pytest.approx(np.log(0.2), abs=1e-6)
        assert [token for token, _ in step.top_logprobs] == [3, 2]
        assert [value for _, value in step.top_logprobs] == pytest.approx(
            [np.log(0.4), np.log(0.3)], abs=1e-6
        )

    def test_none_unless_asked_for(self):
        step = make_loop(FakeModel(), max_new_tokens=1).step()
        assert step.logprob is None
        assert step.top_logprobs is None


def test_min_new_tokens_forbids_stop_tokens_until_then():
    rule = scripted(8, 2, [5, 5, 5, 5])
    loop = make_loop(FakeModel(rule, eos=[5]), min_new_tokens=2, max_new_tokens=9)
    tokens = ids(loop)
    assert tokens[-1] == 5
    assert 5 not in tokens[:2]
    assert len(tokens) == 3


def test_the_models_own_defaults_decide_where_the_caller_is_silent():
    model = FakeModel(lambda ids: np.zeros(1000, np.float32), vocab=1000)
    sampling = GenerationDefaults(do_sample=True)
    assert set(ids(make_loop(model, max_new_tokens=5))) == {0}
    assert len(set(ids(make_loop(model, max_new_tokens=5, seed=1, defaults=sampling)))) > 1


def test_equal_seeds_give_equal_tokens_and_the_seed_is_told():
    def run(seed):
        model = FakeModel(lambda ids: np.zeros(1000, np.float32), vocab=1000)
        loop = make_loop(model, max_new_tokens=8, do_sample=True, seed=seed)
        return ids(loop), loop.seed

    first, seed = run(None)
    assert run(seed) == (first, seed)
    assert run(seed + 1 if seed < 2**64 - 1 else 0)[0] != first


def test_timings_count_what_happened():
    loop = make_loop(FakeModel(delay=0.01), prompt=[1, 2, 3, 4], max_new_tokens=3)
    ids(loop)
    timings = loop.timings(load_s=1.5)
    assert timings.load_s == 1.5
    assert timings.ttft_s >= 0.01
    assert 0 < timings.prefill_tokens_per_s <= 400
    assert 0 < timings.decode_tokens_per_s <= 100
    assert (loop.usage.prompt_tokens, loop.usage.completion_tokens) == (4, 3)
    assert loop.usage.cached_tokens == 0


def test_rates_that_nothing_was_measured_for_are_none():
    loop = make_loop(FakeModel(), max_new_tokens=1)
    assert loop.timings(load_s=0.0).ttft_s is None
    ids(loop)
    assert loop.timings(load_s=0.0).decode_tokens_per_s is None


def test_counting_rule_of_the_fake_itself():
    assert int(counting(8)([7]).argmax()) == 0
    assert int(one_hot(4, 2).argmax()) == 2
