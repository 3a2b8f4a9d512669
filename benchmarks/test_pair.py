"""Two runtimes for one generation, against each of them alone: first token, decode, distance."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

import numpy as np
import pytest

import phirt
from benchmarks.first_token import Turn, forced, take_turns
from benchmarks.precision_table import TEXT
from phirt.quality.divergence import Rows, compare_rows

PROMPT_TOKENS = 1000
FORCED = 200
ROUNDS = 5
PREFILL, DECODE, PAIR = "openvino", "onnxruntime", "pair"


@pytest.fixture(scope="module")
def models() -> Iterator[dict[str, phirt.Model]]:
    """Each alone and both as one, none of which keeps a cache of the prompt."""
    with (
        phirt.load(backend=PREFILL, prefix_cache_bytes=0) as prefill,
        phirt.load(backend=DECODE, prefix_cache_bytes=0) as decode,
        phirt.load(prefill=PREFILL, decode=DECODE, prefix_cache_bytes=0) as pair,
    ):
        yield {PREFILL: prefill, DECODE: decode, PAIR: pair}


@pytest.fixture(scope="module")
def token_ids(models: dict[str, phirt.Model]) -> list[int]:
    """A text of as many tokens as are prefilled and forced."""
    ids = models[PAIR].encode(TEXT.read_text(encoding="utf-8"))[: PROMPT_TOKENS + FORCED]
    assert len(ids) == PROMPT_TOKENS + FORCED
    return ids


def test_first_token_and_decode(benchmark, models, token_ids):
    """The three take turns; ratios are of each round, and of those the median."""
    prompt_ids = token_ids[:PROMPT_TOKENS]
    counted = take_turns(benchmark, models, prompt_ids, measured=PAIR, rounds=ROUNDS)
    for name, found in counted.items():
        first, second, rate = (
            statistics.median(getattr(each, field) for each in found)
            for field in ("first_s", "second_s", "rate")
        )
        print(
            f"\n{name}: first token of a {PROMPT_TOKENS}-token prompt after {first:.2f} s, second "
            f"{1000 * second:.0f} ms later, then {rate:.1f} tokens/s"
        )
    for rival in (PREFILL, DECODE):
        for what, better in (
            ("first token", lambda ours, theirs: theirs.first_s / ours.first_s),
            ("two tokens", lambda ours, theirs: _two(theirs) / _two(ours)),
            ("decode", lambda ours, theirs: ours.rate / theirs.rate),
        ):
            ratios = [
                better(ours, theirs)
                for ours, theirs in zip(counted[PAIR], counted[rival], strict=True)
            ]
            ratio = statistics.median(ratios)
            benchmark.extra_info[f"{what} against {rival}"] = round(ratio, 3)
            print(
                f"the pair against {rival}, {what}: {ratio:.2f} times as fast (rounds from "
                f"{min(ratios):.2f} to {max(ratios):.2f})"
            )


def _two(each: Turn) -> float:
    return each.first_s + each.second_s


def test_distance(benchmark, models, token_ids):
    """Of what the decoder says on the other's cache from what it says on its own."""
    found = {
        name: forced(model, token_ids, PROMPT_TOKENS)
        for name, model in models.items()
        if name != PAIR
    }
    found[PAIR] = benchmark.pedantic(lambda: forced(models[PAIR], token_ids, PROMPT_TOKENS))
    targets = np.array(token_ids[PROMPT_TOKENS + 1 :])
    for name in (PAIR, PREFILL):
        rows = compare_rows(found[DECODE], found[name], targets)
        print(f"\n{name} against {DECODE}: {_said_of(rows)}")
    rows = compare_rows(found[DECODE], found[PAIR], targets)
    benchmark.extra_info["mean_kl"] = round(float(rows.kl.mean()), 5)
    assert rows.kl.mean() <= 0.01


def _said_of(rows: Rows) -> str:
    return (
        f"mean KL {rows.kl.mean():.5f}, largest {rows.kl.max():.4f}, the same most likely token "
        f"at {100 * (rows.reference_ids == rows.candidate_ids).mean():.1f} % of {len(rows)} "
        f"positions, mean loss {rows.candidate_losses.mean():.4f} against "
        f"{rows.reference_losses.mean():.4f}"
    )
