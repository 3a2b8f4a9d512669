"""What one request takes and says: until its first token, until the second, and from there on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

import phirt
from phirt.types import FloatArray

__all__ = ["Turn", "forced", "take_turns"]

NEW_TOKENS = 32


@dataclass(frozen=True)
class Turn:
    """What one request took.

    Attributes:
        first_s: Until the first token.
        second_s: From there to the second, in which the pair's cache is handed over.
        rate: Tokens a second from the second on.
    """

    first_s: float
    second_s: float
    rate: float


def take_turns(
    benchmark: Any,
    models: Mapping[str, phirt.Model],
    prompt_ids: list[int],
    *,
    measured: str,
    rounds: int,
) -> dict[str, list[Turn]]:
    """What the same request takes on each model, round by round, after one that does not count.

    Args:
        benchmark: pytest-benchmark's fixture; it records one of the models.
        models: By name.
        prompt_ids: The prompt.
        measured: The name of the one that is recorded; it goes last in each round.
        rounds: Rounds that count.
    """
    turns: dict[str, list[Turn]] = {name: [] for name in models}

    def take(name: str) -> None:
        turns[name].append(_turn(models[name], prompt_ids))

    def others() -> None:
        for name in models:
            if name != measured:
                take(name)

    benchmark.pedantic(lambda: take(measured), setup=others, rounds=rounds, warmup_rounds=1)
    # pytest-benchmark runs nothing but the one call where it is disabled.
    skip = 1 if len(turns[measured]) > 1 else 0
    return {name: found[skip : len(turns[measured])] for name, found in turns.items()}


def _turn(model: phirt.Model, prompt_ids: list[int]) -> Turn:
    # A runtime's idle workers may spin for a while after its turn.
    time.sleep(0.05)
    times = [time.perf_counter()]
    with model.stream(prompt_ids, max_new_tokens=NEW_TOKENS, ignore_eos=True) as stream:
        times += [time.perf_counter() for _ in stream]
    first, second, *rest = np.diff(times).tolist()
    return Turn(first, second, len(rest) / sum(rest))


def forced(model: phirt.Model, token_ids: list[int], prompt_tokens: int) -> FloatArray:
    """Logits of the positions after the prompt, each given the text so far, (n, vocab)."""
    count = len(token_ids)
    session = model.loaded.new_session(max_length=count, expected_length=count)
    try:
        half = prompt_tokens // 2
        session.prefill(token_ids[:half])
        session.prefill(token_ids[half:prompt_tokens])
        rows = [session.decode(token).numpy()[0].copy() for token in token_ids[prompt_tokens:-1]]
    finally:
        session.close()
    return np.stack(rows)
