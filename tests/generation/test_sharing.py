"""Requests that run at once share steps, and each gets what it would get alone."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from phirt.errors import BackendRuntimeError, OutOfMemoryError, SessionClosedError
from phirt.generation.loop import DecodeLoop
from phirt.generation.params import GenerationParams
from phirt.generation.params_resolved import GenerationDefaults
from phirt.generation.prefix import PrefixCache
from phirt.generation.sharing import MOST_ROWS, SharedModel, can_share
from tests.fake_pools import PooledModel
from tests.fakes import FakeModel

VOCAB = 64
DELAY = 0.004  # seconds of a call: long beside what the threads do between two of them


def mixing(ids):
    """Logits that depend on every token so far."""
    seed = 0
    for token in ids:
        seed = (seed * 1_000_003 + token + 1) % 2**32
    return np.random.default_rng(seed).normal(0, 3, VOCAB).astype(np.float32)


def pooled(**options) -> PooledModel:
    settings = {"vocab": VOCAB, "context_length": 400, "delay": DELAY, "kv": True, **options}
    return PooledModel(settings.pop("rule", mixing), **settings)


def loop_of(model, prompt, **options) -> DecodeLoop:
    prefixes = options.pop("prefixes", None)
    params = GenerationParams(**{"max_new_tokens": 20, "temperature": 0, **options})
    return DecodeLoop(model, prompt, params, defaults=GenerationDefaults(), prefixes=prefixes)


def tokens(loop) -> list[int]:
    return [step.token_id for step in loop]


def prompts(count: int) -> list[list[int]]:
    return [[1 + number % 60] * (3 + number % 7) + [number % 50] for number in range(count)]


@pytest.fixture
def model():
    return pooled()


@pytest.fixture
def shared(model):
    return SharedModel(model)


class TestTogether:
    @pytest.mark.parametrize("count", [2, 5, 16, MOST_ROWS + 4])
    def test_each_gets_what_it_gets_alone(self, model, shared, count):
        alone = [tokens(loop_of(pooled(delay=0.0), prompt)) for prompt in prompts(count)]
        with ThreadPoolExecutor(count) as pool:
            found = list(pool.map(lambda p: tokens(loop_of(shared, p)), prompts(count)))
        assert found == alone
        assert model.sessions_open == 0

    def test_steps_are_shared(self, model, shared):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda p: tokens(loop_of(shared, p, max_new_tokens=40)), prompts(8)))
        # 8 times 39 steps; most of them for all eight.
        assert sum(model.steps) > 200
        assert len(model.steps) < 120
        assert max(model.steps) == 8

    def test_sequences_join_and_leave(self, model, shared):
        lengths = [5, 60, 25, 40, 12, 33]
        alone = [
            tokens(loop_of(pooled(delay=0.0), prompt, max_new_tokens=length))
            for prompt, length in zip(prompts(6), lengths, strict=True)
        ]

        def run(number):
            time.sleep(number * 3 * DELAY)
            return tokens(loop_of(shared, prompts(6)[number], max_new_tokens=lengths[number]))

        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(run, range(6))) == alone
        assert model.sessions_open == 0

    def test_a_request_alone_has_a_session_of_its_own(self, model, shared):
        tokens(loop_of(shared, [1, 2, 3]))
        assert model.pools_opened == []
        assert model.steps == []

    def test_a_slow_reader_holds_up_nobody(self, model, shared):
        slow, quick = (loop_of(shared, prompt, max_new_tokens=60) for prompt in prompts(2))
        started = threading.Event()

        def read_slowly():
            for _ in slow:
                started.set()
                time.sleep(0.15)
                if quick.finish_reason:
                    return

        thread = threading.Thread(target=read_slowly)
        thread.start()
        assert started.wait(10)
        begin = time.perf_counter()
        found = tokens(quick)
        seconds = time.perf_counter() - begin
        thread.join(20)
        slow.finish("cancelled")
        assert found == tokens(loop_of(pooled(delay=0.0), prompts(2)[1], max_new_tokens=60))
        # A step in turn with each of the reader's pauses would take 9 seconds.
        assert seconds < 4

    def test_the_pool_grows_with_the_sequences(self, model, shared):
        with ThreadPoolExecutor(12) as pool:
            list(pool.map(lambda p: tokens(loop_of(shared, p, max_new_tokens=30)), prompts(12)))
        slots = [count for count, _ in model.pools_opened]
        assert slots == sorted(slots)
        assert slots[-1] == 16
        assert model.pools_open == 1
        shared.close()
        assert model.pools_open == 0
        assert model.unloaded

    def test_the_pool_goes_with_the_last_sequence_of_a_closed_model(self, model, shared):
        first, second = (loop_of(shared, prompt) for prompt in prompts(2))
        threads = [threading.Thread(target=tokens, args=(loop,)) for loop in (first, second)]
        first.step(), second.step()
        for thread in threads:
            thread.start()
        shared.close()
        for thread in threads:
            thread.join(20)
        assert model.pools_open == model.sessions_open == 0
        assert model.unloaded


class TestNewcomers:
    def test_a_long_prompt_comes_in_parts_while_others_generate(self, model, shared):
        running = loop_of(shared, [5] * 3, max_new_tokens=150)
        thread = threading.Thread(target=tokens, args=(running,))
        thread.start()
        while running.usage.completion_tokens < 5:
            time.sleep(0.001)
        before = running.usage.completion_tokens
        newcomer = loop_of(shared, [7] * 200, max_new_tokens=1)
        found = tokens(newcomer)
        passed = running.usage.completion_tokens - before
        parts = [count for kind, count in model.calls if kind == "run" and count > 1]
        parts.remove(3)  # the other's prompt
        running.cancel()
        thread.join(20)
        assert found == tokens(loop_of(pooled(delay=0.0), [7] * 200, max_new_tokens=1))
        # In parts, none of one token, with steps of the other between them.
        assert sum(parts) == 200
        assert len(parts) > 1
        assert passed >= len(parts) // 2

    def test_alone_it_comes_at_once(self, model, shared):
        tokens(loop_of(shared, [7] * 200, max_new_tokens=1))
        assert model.calls == [("run", 200)]

    def test_a_kept_session_is_waited_for_no_more(self, model, shared):
        cache = PrefixCache(capacity_bytes=10**6, bytes_per_token=1)
        tokens(loop_of(shared, [5] * 20, prefixes=cache))
        model.calls.clear()
        tokens(loop_of(shared, [7] * 200, max_new_tokens=1, prefixes=cache))
        assert model.calls == [("run", 200)]
        cache.close()

    def test_the_first_call_of_the_long_rotary_regime_is_not_parted(self):
        model = pooled(rope_boundary=50)
        shared = SharedModel(model)
        with ThreadPoolExecutor(3) as pool:
            found = list(
                pool.map(lambda p: tokens(loop_of(shared, p)), ([5] * 4, [6] * 60, [7] * 45))
            )
        assert found == [
            tokens(loop_of(pooled(rope_boundary=50, delay=0.0), p))
            for p in ([5] * 4, [6] * 60, [7] * 45)
        ]


class TestFaults:
    def test_a_step_that_fails_fails_for_all_that_took_part(self):
        def poisoned(ids):
            if len(ids) > 12 and ids[0] == 9:
                raise BackendRuntimeError("lost")
            return mixing(ids)

        model = pooled(rule=poisoned)
        shared = SharedModel(model)
        errors = []

        def run(prompt):
            loop = loop_of(shared, prompt, max_new_tokens=40)
            try:
                tokens(loop)
            except BackendRuntimeError as error:
                errors.append(error)
            return loop.finish_reason

        with ThreadPoolExecutor(3) as pool:
            reasons = list(pool.map(run, ([9, 1], [3, 1], [4, 1])))
        assert "error" in reasons
        assert len({id(error) for error in errors}) == len(errors)
        assert model.sessions_open == 0
        assert tokens(loop_of(shared, [3, 1])) == tokens(loop_of(pooled(delay=0.0), [3, 1]))

    def test_a_cancelled_request_leaves_the_others_alone(self, model, shared):
        loops = [loop_of(shared, prompt, max_new_tokens=60) for prompt in prompts(4)]
        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(tokens, loop) for loop in loops]
            while loops[2].usage.completion_tokens < 5:
                time.sleep(0.001)
            loops[2].cancel()
            futures[2].result(10)
            rest = [futures[index].result(20) for index in (0, 1, 3)]
        assert loops[2].finish_reason == "cancelled"
        expected = [
            tokens(loop_of(pooled(delay=0.0), prompts(4)[index], max_new_tokens=60))
            for index in (0, 1, 3)
        ]
        assert rest == expected
        assert model.sessions_open == 0

    def test_an_interruption_ends_a_call_that_runs(self):
        model = pooled(stall=True)
        shared = SharedModel(model)
        loop = loop_of(shared, [1, 2, 3])
        thread = threading.Thread(target=loop.step)
        thread.start()
        while not model.calls:
            time.sleep(0.001)
        loop.cancel()
        thread.join(10)
        assert not thread.is_alive()
        assert model.sessions_open == 0

    def test_a_request_that_ends_inside_a_call_does_not_wait_for_itself(self, model):
        """A garbage collection may find a dropped stream while a step runs."""
        shared = SharedModel(model)
        session = shared.new_session(max_length=50, expected_length=50)
        session.prefill([1, 2, 3])

        class Dropped:
            itself: object = None

            def __del__(self):
                errors.append(None)
                with pytest.raises(SessionClosedError):
                    session.truncate(2)
                session.close()

        errors: list[None] = []

        def collecting(ids):
            cycle = Dropped()
            cycle.itself = cycle
            del cycle
            gc.collect()
            return mixing(ids)

        model.rule = collecting
        other = shared.new_session(max_length=50, expected_length=50)
        other.prefill([4, 5])
        assert errors
        other.close()
        assert model.sessions_open == 0

    def test_memory_for_a_pool_that_is_not_there(self, model, shared, monkeypatch):
        def none(**_):
            raise OutOfMemoryError("no memory for a pool")

        monkeypatch.setattr(model, "new_pool", none)
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda p: tokens(loop_of(shared, p)), prompts(3)))
        assert found == [tokens(loop_of(pooled(delay=0.0), prompt)) for prompt in prompts(3)]

    @pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
    def test_a_forked_child_gets_an_error_and_does_not_hang(self, model, shared):
        posix: Any = os  # which typeshed lacks in part for Windows
        loop = loop_of(shared, [1, 2, 3])
        loop.step()
        with shared.turns._changed:  # as if another thread held it
            child = posix.fork()
            if child == 0:
                code = 100
                try:
                    loop.step()
                except Exception as error:
                    loop.finish("cancelled")
                    code = 0 if "process" in str(error) else 101
                finally:
                    os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert len(tokens(loop)) == 19


class TestRows:
    def test_kept_sessions_make_room_for_running_ones(self, model, shared):
        cache = PrefixCache(capacity_bytes=10**6, bytes_per_token=1)
        for start in range(1, 40, 8):
            batch = [[number] * 20 for number in range(start, start + 8)]
            with ThreadPoolExecutor(8) as pool:
                found = list(
                    pool.map(
                        lambda p: tokens(loop_of(shared, p, max_new_tokens=30, prefixes=cache)),
                        batch,
                    )
                )
            for prompt, ids in zip(batch, found, strict=True):
                assert ids == tokens(loop_of(pooled(delay=0.0), prompt, max_new_tokens=30))
        # 40 sequences are kept, and the pool has not grown with them all.
        assert max(count for count, _ in model.pools_opened) <= 32
        again = loop_of(shared, [[3] * 20][0] + [1, 2, 3], prefixes=cache)
        assert tokens(again) == tokens(loop_of(pooled(delay=0.0), [3] * 20 + [1, 2, 3]))
        assert again.usage.cached_tokens >= 18
        cache.close()
        assert model.sessions_open == 0


def test_who_can_share():
    assert can_share(pooled())
    assert not can_share(pooled(kv=False))
    assert not can_share(pooled(batch=False))
    assert not can_share(FakeModel())
