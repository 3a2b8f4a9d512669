"""Decode speed with prompt lookup against without, on answers that repeat and on free writing."""

from __future__ import annotations

import statistics
from collections import Counter

import pytest

import phirt
from benchmarks.speculation_prompts import REPEATING, WRITING

NEW_TOKENS = 64
GUESS = 16


@pytest.fixture(params=["int8", "fp32"])
def sides(request):
    """The default model in a precision, without prefix reuse."""
    with phirt.load(precision=request.param, prefix_cache_bytes=0) as model:
        model.generate([1, 2, 3, 4], max_new_tokens=8)
        yield model


def repeats(token_ids: list[int]) -> int:
    """How often the most frequent 8-gram occurs."""
    grams = Counter(zip(*(token_ids[start:] for start in range(8)), strict=False))
    return max(grams.values(), default=0)


def ratios(model: phirt.Model, prompts: list[str]) -> tuple[list[float], int, int, int]:
    """Ratio of each prompt that counts; guessed and accepted tokens; prompts that changed."""
    found, drafted, accepted, changed = [], 0, 0, 0
    for prompt in prompts:
        chat = [{"role": "user", "content": prompt}]
        plainly = phirt.GenerationParams(max_new_tokens=NEW_TOKENS, ignore_eos=True, temperature=0)
        with_, without = [], []
        for _ in range(2):
            plain = model.generate(chat, params=plainly)
            guessing = model.generate(chat, params=plainly, prompt_lookup_num_tokens=GUESS)
            without.append(rate(plain))
            with_.append(rate(guessing))
        if repeats(plain.token_ids) > 3:
            continue
        found.append(statistics.median(a / b for a, b in zip(with_, without, strict=True)))
        drafted += guessing.usage.drafted_tokens
        accepted += guessing.usage.accepted_tokens
        changed += guessing.token_ids != plain.token_ids
    return found, drafted, accepted, changed


def rate(result: phirt.Generation) -> float:
    assert result.timings.decode_tokens_per_s is not None
    return result.timings.decode_tokens_per_s


@pytest.mark.parametrize(
    ("kind", "prompts"),
    [("repeating", REPEATING), ("writing", WRITING)],
    ids=lambda kind: str(kind)[:9],
)
def test_prompt_lookup(benchmark, sides, kind, prompts):
    chosen = prompts if benchmark.enabled else prompts[:1]
    found, drafted, accepted, changed = benchmark.pedantic(
        ratios, args=(sides, chosen), rounds=1, iterations=1
    )
    if not found:
        return  # one prompt alone, run unmeasured, may repeat itself
    benchmark.extra_info["ratio"] = round(statistics.median(found), 3)
    print(
        f"\nprompt lookup on {kind} prompts, {sides.precision}: decode with against without, "
        f"median {statistics.median(found):.2f} (from {min(found):.2f} to {max(found):.2f}) over "
        f"{len(found)} prompts that count of {len(chosen)}; {accepted} of {drafted} guessed "
        f"tokens held; {changed} answers differ from those without"
    )
