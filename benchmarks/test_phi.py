"""A model of Phi-3.5-mini's shape with random int4 weights, against onnxruntime-genai's loop."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import phirt
from benchmarks.alternate import alternate
from benchmarks.phi_shaped import write_phi_shaped
from benchmarks.rivals import GenaiLoop
from benchmarks.streams import throughput

PROMPT = list(range(100, 132))
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory) -> Path:
    """All 32 layers, or one where nothing is measured."""
    layers = 1 if request.config.getoption("benchmark_disable") else 32
    return write_phi_shaped(tmp_path_factory.mktemp("phi"), layers=layers)


@pytest.fixture
def model(folder) -> Iterator[phirt.Model]:
    with phirt.load(folder, backend="onnxruntime", prefix_cache_bytes=0) as loaded:
        yield loaded


def read_bandwidth() -> float:
    """Bytes a second that all processors together read from memory, the best of three."""
    threads = os.cpu_count() or 1
    parts = [np.ones(1 << 26, np.float32) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(3):
            started = time.perf_counter()
            list(pool.map(np.max, parts))
            seconds = time.perf_counter() - started
            best = max(best, sum(part.nbytes for part in parts) / seconds)
    return best


def rate(model: phirt.Model) -> float:
    params = phirt.GenerationParams(max_new_tokens=NEW_TOKENS, ignore_eos=True, temperature=0)
    found = model.generate(PROMPT, params=params).timings.decode_tokens_per_s
    assert found is not None
    return found


@pytest.mark.parametrize("threads", [None, os.cpu_count()], ids=["as it comes", "equal threads"])
def test_one_stream(benchmark, folder, model, threads):
    rival = GenaiLoop(folder, threads=threads)
    result = alternate(
        benchmark,
        lambda: rate(model),
        lambda: rival.decode_rate(PROMPT, NEW_TOKENS),
        rounds=5,
    )
    size = (folder / "model.onnx.data").stat().st_size
    bandwidth = read_bandwidth()
    used = statistics.median(result.ours) * size / bandwidth
    print(
        f"\nPhi-3.5-mini's shape, {size / 1e9:.2f} GB of int4, against onnxruntime-genai "
        f"({threads or 'its own number of'} threads), tokens/s: {result}; weights are read at "
        f"{used:.0%} of the {bandwidth / 1e9:.1f} GB/s that this machine reads"
    )


@pytest.mark.parametrize("count", [8, 16])
def test_streams(benchmark, model, count):
    rates: list[tuple[float, float]] = []
    benchmark.pedantic(
        lambda: rates.append((throughput(model, count), throughput(model, 1))), rounds=1
    )
    many, one = rates[-1]
    print(
        f"\nPhi-3.5-mini's shape, {count} streams against one, tokens/s: {many:.2f} against "
        f"{one:.2f}, ratio {many / one:.2f}"
    )
