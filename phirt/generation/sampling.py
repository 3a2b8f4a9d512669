"""From one position's logits to one token.

Greedy, or at random after temperature, top-k, top-p and min-p, in the order and with the
meaning of `transformers`.

Every path starts with one argmax over the vocabulary, which also finds what must not be
there: NaN and +inf win every comparison. The rest works on the few tokens that can still
be chosen. Nothing here sorts a vocabulary.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from phirt.errors import NonFiniteLogitsError
from phirt.generation.params_resolved import Sampling
from phirt.generation.sampling_subsets import LOWEST, nucleus, top_ids
from phirt.types import FloatArray, IntArray

__all__ = ["Probabilities", "candidates", "choose", "choose_token", "greedy"]

Probabilities: TypeAlias = NDArray[np.floating[Any]]
"""Probabilities that sum to 1: float64, or float32 where they are a whole vocabulary's."""

_NUCLEUS_DEPTH = 12.0
"""Nats below the most probable token that nearly always hold the nucleus."""
_BLOCK = 2048
"""Probabilities summed at once on the way to the chosen one."""


def choose_token(logits: FloatArray, sampling: Sampling | None, uniform: float) -> int:
    """Choose a token from processed logits.

    Args:
        logits: Shape (vocab,); -inf forbids a token. Not changed.
        sampling: How, or None for greedy.
        uniform: A number in [0, 1); greedy does not use it.

    Raises:
        NonFiniteLogitsError: NaN or +inf among the logits, or all of them -inf.
    """
    if sampling is None:
        return greedy(logits)
    ids, probabilities = candidates(logits, sampling)
    return choose(ids, probabilities, uniform)


def greedy(logits: FloatArray) -> int:
    """The token with the largest logit; of equal ones the lowest id.

    Raises:
        NonFiniteLogitsError: NaN or +inf among the logits, or all of them -inf.
    """
    token = int(logits.argmax())
    _check_largest(logits, token)
    return token


def candidates(logits: FloatArray, sampling: Sampling) -> tuple[IntArray, Probabilities]:
    """The tokens that may be chosen, and how probable each is.

    Temperature, then top-k (with the ties of the k-th), then top-p (the smallest set of
    most probable tokens that reaches it; of ties, the lowest ids), then min-p (relative
    to the most probable token).

    Args:
        logits: Shape (vocab,). Not changed.
        sampling: How to choose.

    Returns:
        Token ids (c,) in ascending order, and their probabilities (c,).

    Raises:
        NonFiniteLogitsError: NaN or +inf among the logits, or all of them -inf.
    """
    largest = int(logits.argmax())
    _check_largest(logits, largest)
    peak = float(logits[largest])
    # Beyond these the distribution is one-hot or uniform, and float32 would overflow.
    temperature = min(max(sampling.temperature, 1e-30), 1e30)
    # min-p compares a token with the most probable one, so its normaliser cancels, and it
    # may be applied to unnormalised weights, in which the largest is 1.
    if sampling.top_k:
        ids = top_ids(logits, sampling.top_k)
        weights = _weights(logits[ids], peak, temperature)
        if sampling.top_p < 1:
            kept = nucleus(weights, sampling.top_p * float(weights.sum()))
            ids, weights = ids.compress(kept), weights.compress(kept)
    elif sampling.top_p < 1:
        ids, weights = _whole_nucleus(logits, peak, temperature, sampling.top_p)
    elif sampling.min_p:
        # One nat of slack: the exact comparison follows, in float64.
        depth = 1.0 - float(np.log(sampling.min_p))
        ids = _at_least(logits, peak - depth * temperature)
        weights = _weights(logits[ids], peak, temperature)
    else:
        everything = _whole_weights(logits, peak, temperature)
        everything /= everything.sum()
        return np.arange(logits.size), everything
    if sampling.min_p:
        likely = weights >= sampling.min_p
        ids, weights = ids.compress(likely), weights.compress(likely)
    return ids, weights / weights.sum()


def choose(ids: IntArray, probabilities: Probabilities, uniform: float) -> int:
    """Invert the cumulative distribution over ``ids`` at ``uniform``.

    Args:
        ids: Token ids (c,) in an order that does not depend on the runtime (ascending).
        probabilities: Shape (c,), of any positive sum.
        uniform: In [0, 1).
    """
    start = 0
    if probabilities.size > _BLOCK:
        # A running sum of a vocabulary is slow (each step waits for the one before):
        # sum blocks first, and run through the one block that the number falls into.
        whole = probabilities.size // _BLOCK * _BLOCK
        blocks = np.empty(-(-probabilities.size // _BLOCK), np.float64)
        blocks[: whole // _BLOCK] = probabilities[:whole].reshape(-1, _BLOCK).sum(axis=1)
        if whole < probabilities.size:
            blocks[-1] = probabilities[whole:].sum()
        cumulative = blocks.cumsum()
        target = uniform * float(cumulative[-1])
        block = _first_above(cumulative, target)
        target -= float(cumulative[block] - blocks[block])
        start = block * _BLOCK
        cumulative = probabilities[start : start + _BLOCK].cumsum(dtype=np.float64)
    else:
        cumulative = probabilities.cumsum(dtype=np.float64)
        target = uniform * float(cumulative[-1])
    return int(ids[start + _first_above(cumulative, target)])


def _first_above(cumulative: NDArray[np.float64], target: float) -> int:
    """First index whose cumulative sum exceeds ``target``; never one of probability 0."""
    index = int(cumulative.searchsorted(target, side="right"))
    if index == cumulative.size:  # rounding put the target at the very end
        index = int(cumulative.searchsorted(cumulative[-1], side="left"))
    return index


def _weights(logits: FloatArray, peak: float, temperature: float) -> NDArray[np.float64]:
    """Unnormalised probabilities, 1 for the largest."""
    scaled = logits.astype(np.float64)
    scaled -= peak
    scaled /= temperature
    return np.exp(scaled, out=scaled)


def _whole_weights(logits: FloatArray, peak: float, temperature: float) -> FloatArray:
    """`_weights` of a whole vocabulary: in float32, for speed."""
    with np.errstate(over="ignore"):  # to -inf, of which exp is the right 0
        scaled = logits - np.float32(peak)
        if temperature != 1:
            scaled *= np.float32(1 / temperature)
    np.exp(scaled, out=scaled)
    return scaled


def _whole_nucleus(
    logits: FloatArray, peak: float, temperature: float, top_p: float
) -> tuple[IntArray, NDArray[np.float64]]:
    """Ids and weights of the nucleus of a whole vocabulary."""
    # The normaliser needs every token, but only the probable ones need float64.
    rest = _whole_weights(logits, peak, temperature)
    ids = _at_least(logits, peak - _NUCLEUS_DEPTH * temperature)
    weights = _weights(logits[ids], peak, temperature)
    rest[ids] = 0
    mass = float(weights.sum())
    target = top_p * (mass + float(rest.sum()))
    if mass < target:  # a flat distribution: the nucleus goes deeper
        ids = _at_least(logits, -np.inf)
        weights = _weights(logits[ids], peak, temperature)
        target = top_p * float(weights.sum())
    kept = nucleus(weights, target)
    return ids.compress(kept), weights.compress(kept)


def _at_least(logits: FloatArray, bound: float) -> IntArray:
    """Ascending ids of logits that are not below ``bound``, nor -inf."""
    return np.flatnonzero(logits >= max(np.float32(bound), LOWEST))


def _check_largest(logits: FloatArray, token: int) -> None:
    """Raise unless the largest logit, at ``token``, is finite. argmax prefers NaN."""
    value = logits[token]
    if np.isfinite(value):
        return
    advice = "Check the logits processors, and the model's weights and precision."
    if np.isneginf(value):
        raise NonFiniteLogitsError(
            f"All {logits.size} logits are -inf, so there is no token to choose: "
            f"together, the logits processors (or the model) forbid every one. {advice}"
        )
    raise NonFiniteLogitsError(
        f"The logit of token id {token} is {value}, so no token can be chosen. {advice}"
    )
