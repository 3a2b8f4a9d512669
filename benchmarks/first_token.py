"""What one request takes and says: until its first token, until the second, and from there on."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

import phirt
from phirt.types import FloatArray

__all__ = ["Turn", "forced", "turn"]

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


def turn(model: phirt.Model, prompt_ids: list[int]) -> Turn:
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
