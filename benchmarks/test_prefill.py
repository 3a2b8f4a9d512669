"""A long prompt with float activations, against the graph as it is and against fp32."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest

import phirt
from benchmarks.first_token import forced, take_turns
from benchmarks.precision_table import TEXT
from phirt.quality.divergence import compare_rows

PROMPT_TOKENS = 1000
ROUNDS = 5
FORCED = 100
AS_IT_IS, FLOATS, FP32 = "as it is", "float activations", "fp32"


@pytest.fixture(scope="module", params=["int8", "int4"])
def models(request) -> Iterator[dict[str, phirt.Model]]:
    """The graph in both ways, and fp32, none of which keeps a cache of the prompt."""
    with ExitStack() as stack:

        def load(precision: str, options: dict[str, object] | None = None) -> phirt.Model:
            model = phirt.load(
                backend="onnxruntime", precision=precision, options=options, prefix_cache_bytes=0
            )
            return stack.enter_context(model)

        yield {
            AS_IT_IS: load(request.param),
            FLOATS: load(request.param, {"float_prefill_from": 96}),
            FP32: load("fp32"),
        }


def test_first_token_and_decode(benchmark, models):
    """The three take turns; ratios are of each round, and of those the median."""
    tokens = PROMPT_TOKENS if benchmark.enabled else 120
    prompt_ids = models[FP32].encode(TEXT.read_text(encoding="utf-8"))[:tokens]
    counted = take_turns(benchmark, models, prompt_ids, measured=FLOATS, rounds=ROUNDS)
    precision = models[FLOATS].precision
    for name, found in counted.items():
        first, rate = (
            statistics.median(getattr(each, field) for each in found)
            for field in ("first_s", "rate")
        )
        print(f"\n{precision}, {name}: first token after {first:.2f} s, then {rate:.1f} tokens/s")
    for rival in (AS_IT_IS, FP32):
        pairs = list(zip(counted[FLOATS], counted[rival], strict=True))
        first = [theirs.first_s / ours.first_s for ours, theirs in pairs]
        rate = [ours.rate / theirs.rate for ours, theirs in pairs]
        print(
            f"{precision} with float activations against {rival}: first token "
            f"{statistics.median(first):.2f} times as fast (rounds from {min(first):.2f} to "
            f"{max(first):.2f}), decode {statistics.median(rate):.2f}"
        )


def test_distance(benchmark, models):
    """Of what is said after the prompt from what fp32 says, each on its own cache."""
    tokens = PROMPT_TOKENS if benchmark.enabled else 200
    ids = models[FP32].encode(TEXT.read_text(encoding="utf-8"))[: tokens + FORCED]
    expected = forced(models[FP32], ids, tokens)
    found = {AS_IT_IS: forced(models[AS_IT_IS], ids, tokens)}
    found[FLOATS] = benchmark.pedantic(lambda: forced(models[FLOATS], ids, tokens))
    for name, rows in found.items():
        compared = compare_rows(expected, rows, np.array(ids[tokens + 1 :]))
        print(
            f"\n{models[name].precision}, {name}, {len(rows)} positions after {tokens:,} tokens: "
            f"mean KL to fp32 {compared.kl.mean():.5f}, largest {compared.kl.max():.4f}"
        )
