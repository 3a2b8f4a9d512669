"""Logits processors: small functions that change one position's logits before the choice.

Each built-in takes the request's history and a float32 buffer of shape (vocab,) which the
loop owns, and changes it in place. A processor touches the entries that it changes and no
others, so that its cost does not grow with the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import TypeAlias

import numpy as np

from phirt.generation.history import TokenHistory
from phirt.generation.params_resolved import ResolvedParams
from phirt.types import FloatArray, IntArray, LogitsProcessor

__all__ = [
    "InPlaceProcessor",
    "apply_logit_bias",
    "apply_output_penalties",
    "apply_repetition_penalty",
    "apply_user_processor",
    "build_processors",
    "forbid_repeated_ngrams",
    "forbid_stop_tokens",
    "forbid_tokens",
]

InPlaceProcessor: TypeAlias = Callable[[TokenHistory, FloatArray], None]
"""``f(history, logits)`` changes ``logits``, float32 of shape (vocab,), in place."""


def build_processors(
    params: ResolvedParams, *, stop_token_ids: Collection[int]
) -> list[InPlaceProcessor]:
    """The processors that ``params`` asks for, none for a neutral value.

    The order is that of `transformers` (``GenerationMixin._get_logits_processor``), with
    OpenAI's penalties, which it lacks, next to its own: logit bias, repetition penalty,
    presence and frequency penalty, no-repeat n-gram, min_new_tokens, suppress_tokens, the
    user's processors. Temperature, top-k, top-p and min-p follow, in `sampling`.

    Args:
        params: What was asked for. Its token ids are below the vocabulary's size.
        stop_token_ids: Every token that ends this generation, the model's own included;
            min_new_tokens forbids them.
    """
    built: list[InPlaceProcessor] = []
    if params.logit_bias:
        ids = np.array(list(params.logit_bias.keys()), np.int64)
        biases = np.array(list(params.logit_bias.values()), np.float32)
        built.append(partial(apply_logit_bias, ids=ids, biases=biases))
    if params.repetition_penalty != 1:
        built.append(partial(apply_repetition_penalty, penalty=params.repetition_penalty))
    if params.presence_penalty or params.frequency_penalty:
        built.append(
            partial(
                apply_output_penalties,
                presence=params.presence_penalty,
                frequency=params.frequency_penalty,
            )
        )
    if params.no_repeat_ngram_size:
        built.append(partial(forbid_repeated_ngrams, size=params.no_repeat_ngram_size))
    if params.min_new_tokens and stop_token_ids:
        built.append(
            partial(
                forbid_stop_tokens,
                ids=_as_ids(stop_token_ids),
                min_new_tokens=params.min_new_tokens,
            )
        )
    if params.suppress_tokens:
        built.append(partial(forbid_tokens, ids=_as_ids(params.suppress_tokens)))
    built.extend(partial(apply_user_processor, function=f) for f in params.logits_processors)
    return built


def apply_logit_bias(
    _history: TokenHistory, logits: FloatArray, *, ids: IntArray, biases: FloatArray
) -> None:
    """Add ``biases`` (k,) to the logits of the distinct ``ids`` (k,)."""
    logits[ids] += biases


def apply_repetition_penalty(history: TokenHistory, logits: FloatArray, *, penalty: float) -> None:
    """Make tokens of prompt and output less likely, once each.

    A positive logit is divided by the penalty, a negative one multiplied (Keskar et al.
    2019, arXiv:1909.05858, with the case for negative logits that `transformers` adds).
    """
    ids = history.unique_ids()
    scores = logits[ids]
    negative = scores < 0
    # An extreme penalty makes infinities: -inf forbids a token, and +inf is refused when
    # one is chosen.
    with np.errstate(all="ignore"):
        np.multiply(scores, penalty, out=scores, where=negative)
        np.divide(scores, penalty, out=scores, where=~negative)
    logits[ids] = scores


def apply_output_penalties(
    history: TokenHistory, logits: FloatArray, *, presence: float, frequency: float
) -> None:
    """Subtract ``presence + frequency * count`` from tokens of the output.

    This is the formula of OpenAI's API for presence_penalty and frequency_penalty: the
    count is over generated tokens, the prompt's do not count.
    """
    ids, counts = history.output_counts()
    logits[ids] -= (presence + frequency * counts).astype(np.float32)


def forbid_repeated_ngrams(history: TokenHistory, logits: FloatArray, *, size: int) -> None:
    """Forbid every token that would repeat an n-gram of prompt and output."""
    if size == 1:
        logits[history.unique_ids()] = -np.inf
        return
    ids = history.token_ids
    if ids.size < size:
        return
    prefix = ids[ids.size - size + 1 :]
    # Ends of earlier n-grams: one comparison over the history for the token before the
    # end leaves few positions, and only those are compared further back.
    ends = np.flatnonzero(ids[size - 2 : -1] == prefix[-1]) + size - 1
    for back in range(2, size):
        ends = ends[ids[ends - back] == prefix[-back]]
    logits[ids[ends]] = -np.inf


def forbid_stop_tokens(
    history: TokenHistory, logits: FloatArray, *, ids: IntArray, min_new_tokens: int
) -> None:
    """Forbid the stop tokens ``ids`` until the output has ``min_new_tokens`` tokens."""
    if history.output_length < min_new_tokens:
        logits[ids] = -np.inf


def forbid_tokens(_history: TokenHistory, logits: FloatArray, *, ids: IntArray) -> None:
    """Forbid ``ids`` always."""
    logits[ids] = -np.inf


def apply_user_processor(
    history: TokenHistory, logits: FloatArray, *, function: LogitsProcessor
) -> None:
    """Call a user's ``f(token_ids, logits) -> logits`` and take over what it returns.

    The function may write to the logits that it gets; the token ids are read-only. What
    it raises propagates unchanged.

    Raises:
        TypeError: It returned something else than a float32 array.
        ValueError: It returned an array of another shape.
    """
    result: object = function(history.token_ids, logits)
    if result is logits:
        return
    name = getattr(function, "__qualname__", type(function).__qualname__)
    wanted = f"must return logits as a float32 array of shape {logits.shape}"
    if not isinstance(result, np.ndarray):
        raise TypeError(f"The logits processor {name} {wanted}, not {type(result).__name__}")
    if result.dtype != np.float32:
        raise TypeError(
            f"The logits processor {name} {wanted}, not of {result.dtype}: "
            f"return result.astype(numpy.float32)"
        )
    if result.shape != logits.shape:
        raise ValueError(f"The logits processor {name} {wanted}, not of shape {result.shape}")
    np.copyto(logits, result)


def _as_ids(token_ids: Collection[int]) -> IntArray:
    return np.array(sorted(token_ids), np.int64)
