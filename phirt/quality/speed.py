"""How fast two loaded models are, taking turns, so that what the machine does hits both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from phirt.errors import ContextLengthError
from phirt.protocols import LoadedModel

__all__ = ["Rates", "Speed", "compare_speed"]

_PREFILL_TOKENS, _DECODE_STEPS, _ROUNDS = 128, 24, 7
# No further round is begun after it: large models take long for each.
_BUDGET_S = 30.0
# A runtime's idle workers spin for a while after its turn, at the other's expense.
_REST_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Speed of one phase.

    Attributes:
        reference: Tokens a second of the reference, the median of the rounds.
        candidate: Tokens a second of the candidate, likewise.
        ratio: Median over the rounds of the candidate's rate by the reference's: what else the
            machine did is in both of a round, so it scatters less than the rates do.
    """

    reference: float
    candidate: float
    ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Speeds of both models in this process.

    Attributes:
        prefill: A prompt of ``prompt_tokens``.
        decode: Tokens after it, one by one: by the lower quartile of the steps of a round, as
            a step that another process interrupted is not the model's.
        prompt_tokens: Tokens of the prompt.
        rounds: Turns of each, after one that is not counted.
    """

    prefill: Rates
    decode: Rates
    prompt_tokens: int
    rounds: int


def compare_speed(
    reference: LoadedModel, candidate: LoadedModel, token_ids: Sequence[int]
) -> Speed:
    """Time prefill and decode of two models that are loaded.

    Args:
        reference: One.
        candidate: The other.
        token_ids: At least two tokens to run; they are repeated as needed.

    Raises:
        ContextLengthError: The context of one has not even room for a few tokens.
    """
    length = _prompt_length(reference, candidate)
    repeats = -(-(length + _DECODE_STEPS) // len(token_ids))
    ids = (list(token_ids) * repeats)[: length + _DECODE_STEPS]
    started = time.perf_counter()
    rounds: list[tuple[tuple[float, float], tuple[float, float]]] = []
    for turn in range(_ROUNDS + 1):
        pair = _turn(reference, ids, length), _turn(candidate, ids, length)
        if turn:  # The first warms up: buffers, kernels that are chosen, caches.
            rounds.append(pair)
        if rounds and time.perf_counter() - started > _BUDGET_S:
            break
    prefill, decode = (
        Rates(
            reference=statistics.median(theirs[phase] for theirs, _ in rounds),
            candidate=statistics.median(ours[phase] for _, ours in rounds),
            ratio=statistics.median(ours[phase] / theirs[phase] for theirs, ours in rounds),
        )
        for phase in (0, 1)
    )
    return Speed(prefill=prefill, decode=decode, prompt_tokens=length, rounds=len(rounds))


def _prompt_length(*models: LoadedModel) -> int:
    limit = min(
        min(each.info.context_length, each.info.rope_boundary or each.info.context_length)
        for each in models
    )
    if limit <= 2 * _DECODE_STEPS:
        raise ContextLengthError(
            f"A context of {limit} tokens is too short to time. Compare without speed.",
            required=2 * _DECODE_STEPS + 1,
            available=limit,
        )
    return min(_PREFILL_TOKENS, limit - _DECODE_STEPS)


def _turn(model: LoadedModel, ids: Sequence[int], length: int) -> tuple[float, float]:
    """Tokens a second of the prefill of ``length`` tokens, and of decoding the rest."""
    time.sleep(_REST_S)
    session = model.new_session(max_length=len(ids), expected_length=len(ids))
    try:
        started = time.perf_counter()
        session.prefill(ids[:length]).numpy()
        prefilled = time.perf_counter()
        steps: list[float] = []
        for token in ids[length:]:
            before = time.perf_counter()
            session.decode(token).numpy()
            steps.append(time.perf_counter() - before)
    finally:
        session.close()
    return length / (prefilled - started), 1 / float(np.quantile(steps, 0.25))
