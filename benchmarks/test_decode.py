"""Decode speed on one model file, phirt against other loops, taking turns in one run."""

from __future__ import annotations

import pytest

import phirt
from benchmarks.alternate import Comparison, alternate
from benchmarks.bare_loop import BareLoop
from benchmarks.rivals import GenaiLoop

NEW_TOKENS = 64


@pytest.fixture
def ours(model, prompt_ids):
    def run() -> float:
        result = model.generate(prompt_ids, max_new_tokens=NEW_TOKENS, ignore_eos=True)
        rate: float | None = result.timings.decode_tokens_per_s
        assert rate is not None
        return rate

    return run


def report(benchmark, model: phirt.Model, rival: str, result: Comparison, kl: float) -> None:
    benchmark.extra_info["mean_kl_to_fp32"] = round(kl, 4)
    print(
        f"\ndecode of {model.name} in {model.precision} (mean KL to fp32 {kl:.4f}), phirt "
        f"against {rival}, tokens/s: {result}"
    )


def test_against_onnxruntime_genai(benchmark, model: phirt.Model, prompt_ids, ours, kl):
    """Both as they come, with their own defaults for threads and spinning."""
    rival = GenaiLoop(model.path)
    result = alternate(benchmark, ours, lambda: rival.decode_rate(prompt_ids, NEW_TOKENS))
    report(benchmark, model, "onnxruntime-genai's own loop", result, kl)
    if benchmark.enabled:
        assert result.ratio >= 1.3


def test_against_a_bare_loop(benchmark, model: phirt.Model, prompt_ids, ours, kl):
    """What phirt's loop costs over the least that decodes at all."""
    rival = BareLoop(model.path)

    def theirs() -> float:
        return (NEW_TOKENS - 1) / sum(rival.decode_seconds(prompt_ids, NEW_TOKENS - 1))

    result = alternate(benchmark, ours, theirs)
    report(benchmark, model, "a bare IOBinding loop", result, kl)
    if benchmark.enabled:
        assert result.ratio >= 0.97
