"""phirt's own time: per token, over a model that costs nothing, and for its import."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import pytest

from benchmarks.null_model import NullModel
from phirt.generation.loop import DecodeLoop
from phirt.generation.params import GenerationParams
from phirt.generation.params_resolved import GenerationDefaults
from phirt.stream import TokenStream

PROMPT = list(range(100, 600))
NEW_TOKENS = 500
SAMPLED = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 1}


def own_seconds(tokenizer, vocab: int, **params) -> float:
    """Seconds per token from logits to text, less the model's own copy of the logits."""
    model = NullModel(vocab)
    started = time.perf_counter()
    loop = DecodeLoop(
        model,
        PROMPT,
        GenerationParams(max_new_tokens=NEW_TOKENS, **params),
        defaults=GenerationDefaults(),
    )
    tokens = sum(1 for _ in TokenStream(loop, tokenizer, load_s=0.0))
    assert tokens == NEW_TOKENS
    return (time.perf_counter() - started - model.seconds) / NEW_TOKENS


@pytest.mark.parametrize(
    ("vocab", "params", "limit_us"),
    [(49_152, {}, 150), (200_000, SAMPLED, 600)],
    ids=["greedy-49k", "sampled-200k"],
)
def test_time_per_token(benchmark, model, vocab, params, limit_us):
    """Loop, processors, sampler, detokenizer and stream."""
    taken: list[float] = []
    benchmark.pedantic(
        lambda: taken.append(own_seconds(model.tokenizer, vocab, **params) * 1e6),
        rounds=7,
        warmup_rounds=1,
    )
    median = statistics.median(taken)
    benchmark.extra_info["us_per_token"] = round(median, 1)
    print(f"\nphirt's own time per token: {median:.0f} us (limit {limit_us} us)")
    if benchmark.enabled:
        assert median < limit_us


def test_import(benchmark):
    """``import phirt``, over an interpreter that imports nothing."""

    def seconds(program: str) -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", program], check=True)  # noqa: S603 - our own words
        return time.perf_counter() - started

    taken: list[float] = []
    benchmark.pedantic(
        lambda: taken.append(seconds("import phirt") - seconds("pass")), rounds=9, warmup_rounds=1
    )
    median = statistics.median(taken)
    benchmark.extra_info["seconds"] = round(median, 3)
    print(f"\nimport phirt: {median * 1000:.0f} ms (limit 200 ms)")
    if benchmark.enabled:
        assert median < 0.2
