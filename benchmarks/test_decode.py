"""Decode speed on one model file, phirt against other loops, taking turns in one run."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import cast

import pytest

import phirt
from benchmarks.alternate import Comparison, alternate
from benchmarks.bare_loop import BareLoop
from benchmarks.rivals import GenaiLoop, LlamaCppLoop, MlxLoop, OpenVinoLoop
from phirt.backends.onnxruntime.adapter import OrtModel
from phirt.models.catalog import DEFAULT_MODEL, get_entry
from phirt.models.pypi import resolve_source
from phirt.models.store import Store

NEW_TOKENS = 64


def our_rate(model: phirt.Model, prompt_ids: list[int]) -> float:
    result = model.generate(prompt_ids, max_new_tokens=NEW_TOKENS, ignore_eos=True)
    rate: float | None = result.timings.decode_tokens_per_s
    assert rate is not None
    return rate


class Reloaded:
    """A side that is loaded anew every few turns.

    Where its weights come to lie in memory makes a loaded model up to a twentieth faster or
    slower than the next load of the same file, for as long as it lives.
    """

    def __init__(self, load: Callable[[], Callable[[], float]], *, turns: int = 5) -> None:
        self._load = load
        self._turns = turns
        self._taken = 0
        self._run: Callable[[], float] | None = None

    def __call__(self) -> float:
        if self._run is None or self._taken % self._turns == 0:
            self._run = None  # freed before the next is loaded
            self._run = self._load()
            self._run()  # warms up
        self._taken += 1
        return self._run()


def report(benchmark, model: phirt.Model, rival: str, result: Comparison, kl: float) -> None:
    benchmark.extra_info["mean_kl_to_fp32"] = round(kl, 4)
    print(
        f"\ndecode of {model.name} in {model.precision} (mean KL to fp32 {kl:.4f}), phirt "
        f"against {rival}, tokens/s: {result}"
    )


def test_against_onnxruntime_genai(benchmark, model: phirt.Model, prompt_ids, kl):
    """Both as they come, with their own defaults for threads and spinning."""

    def load_ours() -> Callable[[], float]:
        loaded = phirt.load(model.path)
        return lambda: our_rate(loaded, prompt_ids)

    def load_theirs() -> Callable[[], float]:
        rival = GenaiLoop(model.path)
        return lambda: rival.decode_rate(prompt_ids, NEW_TOKENS)

    result = alternate(benchmark, Reloaded(load_ours), Reloaded(load_theirs))
    report(benchmark, model, "onnxruntime-genai's own loop", result, kl)
    if benchmark.enabled:
        assert result.ratio >= 1.3


def test_against_onnxruntime_genai_with_as_many_threads(benchmark, model, prompt_ids, kl):
    """What is left of that where both compute with a thread a logical processor."""
    threads = os.cpu_count() or 1

    def load_ours() -> Callable[[], float]:
        loaded = phirt.load(model.path, threads=threads)
        return lambda: our_rate(loaded, prompt_ids)

    def load_theirs() -> Callable[[], float]:
        rival = GenaiLoop(model.path, threads=threads)
        return lambda: rival.decode_rate(prompt_ids, NEW_TOKENS)

    result = alternate(benchmark, Reloaded(load_ours), Reloaded(load_theirs))
    report(benchmark, model, f"onnxruntime-genai's own loop, {threads} threads", result, kl)


def test_against_a_bare_loop(benchmark, model: phirt.Model, prompt_ids, kl):
    """What phirt's loop costs over the least that decodes at all, on one loaded graph."""
    loaded = cast("OrtModel", model._loaded)
    rival = BareLoop(model.path, session=loaded.inference)

    def theirs() -> float:
        return (NEW_TOKENS - 1) / sum(rival.decode_seconds(prompt_ids, NEW_TOKENS - 1))

    result = alternate(benchmark, lambda: our_rate(model, prompt_ids), theirs)
    report(benchmark, model, "a bare IOBinding loop", result, kl)
    if benchmark.enabled:
        assert result.ratio >= 0.97


def test_against_llama_cpp(benchmark, model: phirt.Model, prompt_ids, kl):
    """llama.cpp on the file that the default model is made of, with as many threads."""
    pytest.importorskip("cyllama", reason="cyllama has no wheel for this platform")
    path = resolve_source(get_entry(DEFAULT_MODEL).pypi_source(), Store())
    threads = os.cpu_count() or 1

    def load_ours() -> Callable[[], float]:
        loaded = phirt.load(model.path)
        return lambda: our_rate(loaded, prompt_ids)

    def load_theirs() -> Callable[[], float]:
        rival = LlamaCppLoop(path, threads=threads)
        return lambda: rival.decode_rate(prompt_ids, NEW_TOKENS)

    result = alternate(benchmark, Reloaded(load_ours), Reloaded(load_theirs))
    report(benchmark, model, f"llama.cpp on {path.name}, {threads} threads", result, kl)


def test_against_openvino_genai(benchmark, model: phirt.Model, prompt_ids, kl):
    """LLMPipeline on phirt's own IR in int8, against phirt's fastest on this machine."""
    pytest.importorskip("openvino_genai", reason="openvino-genai has no wheel for this platform")
    folder = phirt.pull(backend="openvino", precision="int8")

    def load_ours() -> Callable[[], float]:
        loaded = phirt.load(model.path)
        return lambda: our_rate(loaded, prompt_ids)

    def load_theirs() -> Callable[[], float]:
        rival = OpenVinoLoop(folder)
        return lambda: rival.decode_rate(prompt_ids, NEW_TOKENS)

    result = alternate(benchmark, Reloaded(load_ours), Reloaded(load_theirs))
    report(benchmark, model, "openvino_genai.LLMPipeline", result, kl)


def test_against_mlx_lm(benchmark, model: phirt.Model, prompt_ids, kl):
    """mlx-lm on the same weights in bfloat16, which is what it can have of them at best here."""
    pytest.importorskip("mlx_lm", reason="mlx-lm has no wheel for this platform")
    rival = MlxLoop(phirt.pull(backend="mlx"))
    result = alternate(
        benchmark,
        lambda: our_rate(model, prompt_ids),
        lambda: rival.decode_rate(prompt_ids, 16),
        rounds=5,
    )
    report(benchmark, model, "mlx-lm on the CPU", result, kl)
