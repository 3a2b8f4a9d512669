"""Streams that share steps: tokens/s of many against one, and what a newcomer costs the others."""

from __future__ import annotations

import statistics
import threading
import time

import numpy as np
import pytest

import phirt
from benchmarks.streams import throughput


@pytest.fixture(params=["int8", "fp32"])
def model(request):
    """The default model in a precision, without prefix reuse."""
    with phirt.load(precision=request.param, prefix_cache_bytes=0) as loaded:
        yield loaded


@pytest.mark.parametrize("count", [8, 16])
def test_many_streams_against_one(benchmark, model, count):
    rates: list[tuple[float, float]] = []
    benchmark.pedantic(
        lambda: rates.append((throughput(model, count), throughput(model, 1))),
        rounds=5,
        warmup_rounds=1,
    )
    ratio = statistics.median(many / one for many, one in rates)
    benchmark.extra_info["ratio"] = round(ratio, 3)
    print(
        f"\n{count} streams against one, {model.precision}, tokens/s: "
        f"{statistics.median(many for many, _ in rates):.1f} against "
        f"{statistics.median(one for _, one in rates):.1f}, ratio {ratio:.2f}"
    )


def test_a_long_prompt_joins(benchmark, model):
    """Gaps of a running stream while 1,000 tokens join, and their TTFT against alone."""
    tokens = 1000 if benchmark.enabled else 50
    prompt = [(11 * index) % 9000 + 100 for index in range(tokens)]
    params = phirt.GenerationParams(ignore_eos=True, temperature=0)
    found: list[tuple[float, float, float]] = []

    def once() -> None:
        alone = model.generate(prompt, params=params, max_new_tokens=1).timings.ttft_s
        moments: list[float] = []
        joined, done = threading.Event(), threading.Event()

        def run() -> None:
            with model.stream([5] * 24, params=params, max_new_tokens=4000) as stream:
                for _ in stream:
                    moments.append(time.perf_counter())
                    if len(moments) == 60:
                        joined.set()
                    if done.is_set():
                        return

        thread = threading.Thread(target=run)
        thread.start()
        joined.wait()
        begin = time.perf_counter()
        beside = model.generate(prompt, params=params, max_new_tokens=1).timings.ttft_s
        end = time.perf_counter()
        done.set()
        thread.join()
        gaps = np.diff(moments)
        starts = np.array(moments[:-1])
        usual = float(np.median(gaps[starts < begin][8:]))
        during = gaps[(starts >= begin) & (starts < end)]
        assert alone is not None
        assert beside is not None
        found.append((float(np.quantile(during, 0.99)) / usual, beside / alone, usual))

    benchmark.pedantic(once, rounds=3, warmup_rounds=0)
    p99, ttft, usual = (statistics.median(column) for column in zip(*found, strict=True))
    print(
        f"\na prompt of {tokens} tokens joins a running stream, {model.precision}: its gaps' "
        f"p99 is {p99:.2f} of the usual gap ({1000 * usual:.1f} ms), and the newcomer's TTFT "
        f"{ttft:.2f} of its TTFT alone"
    )
