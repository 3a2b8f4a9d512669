"""Which sessions are kept when their requests end, and which request gets which."""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
import pytest

from phirt.errors import BackendRuntimeError
from phirt.generation.loop import DecodeLoop
from phirt.generation.params import GenerationParams
from phirt.generation.params_resolved import GenerationDefaults
from phirt.generation.prefix import PrefixCache
from tests.fakes import FakeModel

VOCAB = 4096
BYTES = 10  # per token: a bucket of 256 tokens takes 2,560


def ids(start: int, count: int) -> list[int]:
    """Tokens that no other start has."""
    return list(range(start, start + count))


@pytest.fixture
def model():
    return FakeModel(vocab=VOCAB, context_length=2048)


@pytest.fixture
def cache():
    cache = PrefixCache(capacity_bytes=3 * 256 * BYTES, bytes_per_token=BYTES)
    yield cache
    cache.close()


def loop_of(model, cache, prompt, **params) -> DecodeLoop:
    chosen = GenerationParams(**{"max_new_tokens": 4, "temperature": 0, **params})
    return DecodeLoop(model, prompt, chosen, defaults=GenerationDefaults(), prefixes=cache)


def run(model, cache, prompt, **params) -> DecodeLoop:
    loop = loop_of(model, cache, prompt, **params)
    for _ in loop:
        pass
    return loop


def cached(model, cache, prompt) -> int:
    return run(model, cache, prompt).usage.cached_tokens


class TestWhatIsReused:
    def test_the_tokens_of_the_last_turn_are_not_run_again(self, model, cache):
        first = run(model, cache, ids(100, 40))
        assert first.usage.cached_tokens == 0
        model.calls.clear()
        second = run(model, cache, ids(100, 40) + first.generated_ids + [7, 8, 9])
        # The last generated token was never run.
        assert second.usage.cached_tokens == 43
        assert model.calls[0] == ("run", 4)
        assert second.generated_ids == [10, 11, 12, 13]
        assert model.sessions_opened == model.sessions_open == 1

    def test_the_last_two_tokens_of_a_prompt_are_run_in_any_case(self, model, cache):
        run(model, cache, ids(100, 40))
        model.calls.clear()
        again = run(model, cache, ids(100, 40))
        assert again.usage.cached_tokens == 38
        assert model.calls[0] == ("run", 2)

    def test_a_few_tokens_in_common_are_not_worth_another_prompts_cache(self, model, cache):
        run(model, cache, ids(100, 40))
        assert cached(model, cache, [*ids(100, 15), 1, 2, 3]) == 0
        assert cached(model, cache, [*ids(100, 16), 1, 2, 3]) == 16

    def test_of_several_the_longest_prefix(self, model, cache):
        run(model, cache, ids(100, 20) + ids(200, 10))
        run(model, cache, ids(100, 20) + ids(300, 30))
        run(model, cache, ids(400, 30))
        assert cached(model, cache, ids(100, 20) + ids(300, 20) + ids(500, 5)) == 40

    def test_prefill_rate_counts_what_was_run(self, model, cache):
        model.delay = 0.02
        run(model, cache, ids(100, 500))
        rate = run(model, cache, ids(100, 500)).timings(load_s=0).prefill_tokens_per_s
        assert rate is not None
        assert rate <= 2 / 0.02

    def test_two_requests_at_once_have_a_session_each(self, model, cache):
        run(model, cache, ids(100, 40))
        one, other = (loop_of(model, cache, ids(100, 40)) for _ in range(2))
        one.step()
        other.step()
        assert (one.usage.cached_tokens, other.usage.cached_tokens) == (38, 0)
        assert [list(loop)[-1].token_id for loop in (one, other)] == [143, 143]

    def test_a_request_that_sets_a_new_limit_needs_no_new_session(self, model, cache):
        loop = loop_of(model, cache, ids(100, 40))
        list(zip(range(3), loop, strict=False))
        loop.params = loop.params.merge(max_new_tokens=600)
        assert len(list(loop)) == 597
        assert model.sessions_opened == 1


class TestWhatIsKept:
    def test_least_recently_used_goes_first(self, model, cache):
        prompts = [ids(start, 40) for start in (100, 200, 300)]
        for prompt in prompts:
            run(model, cache, prompt)
        run(model, cache, prompts[0])
        run(model, cache, ids(400, 40))
        assert model.sessions_open == 3
        assert cached(model, cache, prompts[0]) == 38
        assert cached(model, cache, prompts[1]) == 0

    def test_never_more_bytes_than_allowed(self, model, cache):
        for start in range(100, 2000, 100):
            run(model, cache, ids(start, 60))
            assert cache.size_bytes <= 3 * 256 * BYTES
        run(model, cache, ids(100, 500))
        assert cache.size_bytes == 3 * 256 * BYTES
        assert model.sessions_open == 2

    def test_what_is_larger_than_all_that_is_allowed_throws_nothing_out(self, model, cache):
        run(model, cache, ids(100, 40))
        run(model, cache, ids(1000, 900))
        assert cached(model, cache, ids(100, 40)) == 38

    def test_of_two_where_one_begins_with_the_other_the_longer(self, model, cache):
        first, second = (loop_of(model, cache, ids(100, count)) for count in (40, 60))
        first.step(), second.step()
        list(first), list(second)
        assert model.sessions_open == 1
        assert cached(model, cache, ids(100, 61)) == 59

    def test_not_what_failed(self, model, cache):
        model.fail_at = 3
        with pytest.raises(BackendRuntimeError):
            run(model, cache, ids(100, 40))
        assert model.sessions_open == 0

    def test_not_what_was_interrupted_in_a_call(self, cache):
        model = FakeModel(vocab=VOCAB, context_length=2048)
        loop = loop_of(model, cache, ids(100, 40), max_new_tokens=100)
        loop.step()

        def cancelling(_: list[int]):
            loop.cancel()
            return np.zeros(VOCAB, np.float32)

        model.rule = cancelling
        list(loop)
        assert loop.finish_reason == "cancelled"
        assert model.sessions_open == 0

    def test_what_was_cancelled_between_two_steps(self, model, cache):
        loop = loop_of(model, cache, ids(100, 40))
        loop.step()
        loop.cancel()
        assert loop.step() is None
        assert model.sessions_open == 1
        assert cached(model, cache, ids(100, 40)) == 38

    def test_nothing_after_it_was_closed(self, model, cache):
        run(model, cache, ids(100, 40))
        running = loop_of(model, cache, ids(300, 40))
        running.step()
        cache.close()
        assert model.sessions_open == 1
        list(running)
        assert model.sessions_open == 0

    def test_nothing_of_a_model_that_was_given_up(self, model, cache):
        other = FakeModel(vocab=VOCAB, context_length=2048)
        run(model, cache, ids(100, 40))
        late = loop_of(model, cache, ids(300, 40))
        late.step()
        cache.forget(except_of=other)
        assert model.sessions_open == 1
        list(late)
        assert model.sessions_open == 0
        assert cached(other, cache, ids(100, 40)) == 0
        assert other.sessions_open == 1


class TestWhatARuntimeCannotDo:
    def test_no_second_prefill(self, cache):
        model = FakeModel(vocab=VOCAB, context_length=2048, can_extend=False)
        run(model, cache, ids(100, 40))
        assert cached(model, cache, ids(100, 44)) == 0

    def test_a_session_of_the_short_rotary_factors_ends_at_the_boundary(self, cache):
        model = FakeModel(vocab=VOCAB, context_length=2048, rope_boundary=64)
        run(model, cache, ids(100, 40))
        assert model.requests == [(64, 44)]
        assert cached(model, cache, ids(100, 50)) == 43
        # The prompt is beyond the boundary: other keys.
        assert cached(model, cache, ids(100, 70)) == 0
        assert model.requests[-1] == (2048, 74)
        assert cached(model, cache, ids(100, 80)) == 73

    def test_the_long_factors_are_not_taken_back_below_the_boundary(self, cache):
        model = FakeModel(vocab=VOCAB, context_length=2048, rope_boundary=64)
        run(model, cache, ids(100, 100))
        assert cached(model, cache, ids(100, 60) + ids(400, 40)) == 0
        assert cached(model, cache, ids(100, 66) + ids(500, 40)) == 66

    @pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
    def test_a_forked_child_takes_nothing_and_closes_nothing(self, model, cache):
        posix: Any = os  # which typeshed lacks in part for Windows
        run(model, cache, ids(100, 40))
        with cache._lock:  # as if another thread held it
            child = posix.fork()
            if child == 0:
                try:
                    found = cache.take(model, np.array(ids(100, 44)), limit=2048)
                    cache.close()
                    os._exit(0 if found is None else 1)
                finally:
                    os._exit(100)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
