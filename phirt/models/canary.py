"""canary.json: what a model's original weights say to a few fixed tokens.

A converter computes it from the weights before they are rounded, and whoever loads the model
compares: a device that computes something else is found out by a handful of tokens.

Kept are the most probable tokens at the last positions and their log-probabilities. A
divergence is taken over these tokens and one bucket for all the others. Merging outcomes
never increases a divergence (the data processing inequality), so that it is a lower bound of
that over the whole vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phirt.errors import ModelFormatError
from phirt.models.remembered import Remembered
from phirt.models.safe_json import JsonFields, parse_versioned, read_bytes
from phirt.types import FloatArray, IntArray

__all__ = [
    "CANARY_NAME",
    "CANARY_TEXT",
    "POSITIONS",
    "Canary",
    "choose_tokens",
    "make_canary",
    "mean_kl",
    "read_canary",
    "read_own_kl",
    "write_canary",
]

CANARY_NAME = "canary.json"

CANARY_TEXT = (
    "Miners once took a canary into the coal mine with them, because the small bird would fall "
    "silent before the bad air could harm the men who worked there."
)
"""What the tokens of a canary are the beginning of."""

POSITIONS = 8
"""Positions at the end of the tokens whose probabilities are kept."""

_TOP = 20
_TOKENS = 16

_FORMAT_VERSION = 1
_MAX_FILE_BYTES = 1 << 16
_MAX_VOCAB = 1 << 24
_LARGEST_KL = 1e6
# A log-probability in float32 cannot be lower than the difference of two logits.
_LOWEST = -1e38
_TINY = np.finfo(np.float64).tiny


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Canary:
    """Tokens, and how probable a model finds what may follow the last of them.

    Attributes:
        token_ids: 16 ids; the model's own tokenizer made them of `CANARY_TEXT`.
        top_ids: The most probable tokens after each of the last 8, shape (8, k), k at most 20,
            the most probable first.
        log_probabilities: Their natural log-probabilities, shape (8, k), float32.
        own_kl: The mean divergence that the artifact's rounding of the weights makes, in nats;
            None where nobody measured it.
    """

    token_ids: tuple[int, ...]
    top_ids: IntArray
    log_probabilities: FloatArray
    own_kl: float | None = None


def choose_tokens(
    encoded: Sequence[int], *, vocab_size: int, longest: int
) -> tuple[int, ...] | None:
    """The tokens of a canary.

    Args:
        encoded: `CANARY_TEXT`, encoded with the model's tokenizer.
        vocab_size: Of the model.
        longest: Most tokens that the model takes, with LongRoPE its boundary.

    Returns:
        16 ids; None where there are fewer, or one is beyond the vocabulary.
    """
    chosen = tuple(encoded[: min(_TOKENS, longest)])
    if len(chosen) < _TOKENS or max(chosen) >= vocab_size:
        return None
    return chosen


def make_canary(token_ids: Sequence[int], logits: FloatArray) -> Canary:
    """What to hold others against.

    Args:
        token_ids: The tokens.
        logits: At the last 8 of them, shape (8, vocab).

    Raises:
        ValueError: The logits are not finite.
    """
    if not np.isfinite(logits).all():
        raise ValueError("The logits hold NaN or infinity.")
    k = min(_TOP, logits.shape[-1])
    log_probabilities = _log_softmax(logits)
    candidates = np.argpartition(-logits, k - 1, axis=-1)[:, :k]
    order = np.argsort(-np.take_along_axis(logits, candidates, -1), axis=-1, kind="stable")
    top = np.take_along_axis(candidates, order, -1).astype(np.int64)
    return Canary(
        token_ids=tuple(int(token) for token in token_ids),
        top_ids=top,
        log_probabilities=np.take_along_axis(log_probabilities, top, -1).astype(np.float32),
    )


def mean_kl(canary: Canary, logits: FloatArray) -> float:
    """Mean KL divergence of other logits from the canary's, in nats.

    ``sum(p * log(p / q))`` over the canary's tokens and one bucket for the rest of the
    vocabulary, where p is the canary's distribution and q that of the logits; the mean over
    the 8 positions. It is a lower bound of the divergence over the whole vocabulary.

    Args:
        canary: What they are held against.
        logits: At the last 8 of the canary's tokens, shape (8, vocab).

    Returns:
        The divergence; infinite where a logit is not finite.
    """
    if not np.isfinite(logits).all():
        return math.inf
    log_q = _log_softmax(logits)
    others = np.exp(log_q)
    np.put_along_axis(others, canary.top_ids, 0, -1)
    log_p = canary.log_probabilities.astype(np.float64)
    p = np.exp(log_p)
    # What is left of 1: below float32's precision, it is rounding.
    rest = 1 - p.sum(axis=-1)
    rest = np.where(rest > 1e-6, rest, 0)
    terms = p * (log_p - np.take_along_axis(log_q, canary.top_ids, -1))
    of_rest = rest * (_log(rest) - _log(others.sum(axis=-1)))
    # Never negative but by rounding.
    return max(0.0, float(np.mean(terms.sum(axis=-1) + of_rest)))


def write_canary(folder: Path, canary: Canary) -> None:
    """Write canary.json into a model folder."""
    positions = [
        # The shortest digits that read back as the same float32.
        {"ids": ids.tolist(), "log_probabilities": [float(str(value)) for value in values]}
        for ids, values in zip(canary.top_ids, canary.log_probabilities, strict=True)
    ]
    document = {
        "format_version": _FORMAT_VERSION,
        "token_ids": list(canary.token_ids),
        "positions": positions,
        "own_kl": canary.own_kl,
    }
    text = json.dumps(document, allow_nan=False) + "\n"
    (folder / CANARY_NAME).write_text(text, encoding="utf-8", newline="\n")


def read_canary(folder: Path, *, vocab_size: int | None = None) -> Canary | None:
    """Read canary.json, or return None where the folder has none.

    Args:
        folder: A model folder.
        vocab_size: Of the model, where it is known: every id must be below.

    Raises:
        ModelFormatError: It is damaged, or of a newer format than this phirt reads.
    """
    path = folder / CANARY_NAME
    if not path.exists():
        return None
    fields = _fields(read_bytes(path, max_bytes=_MAX_FILE_BYTES), path)
    largest = (vocab_size or _MAX_VOCAB) - 1
    token_ids = fields.integers("token_ids", minimum=0, maximum=largest)
    positions = fields.value("positions")
    if len(token_ids) != _TOKENS:
        raise ModelFormatError(f"{path}: {len(token_ids)} token ids; there must be {_TOKENS}.")
    if not isinstance(positions, list) or len(positions) != POSITIONS:
        raise ModelFormatError(f"{path}: the field 'positions' must be a list of {POSITIONS}.")
    rows = [_position(path, entry, largest) for entry in positions]
    if len({len(ids) for ids, _ in rows}) != 1:
        raise ModelFormatError(f"{path}: its positions have different numbers of tokens.")
    return Canary(
        token_ids=token_ids,
        top_ids=np.array([ids for ids, _ in rows], np.int64),
        log_probabilities=np.array([values for _, values in rows], np.float32),
        own_kl=_own_kl(fields),
    )


def read_own_kl(folder: Path) -> float | None:
    """What rounding the weights makes, in nats; None where a folder's canary does not say it.

    The rest of the file is not looked at.

    Args:
        folder: A model folder.

    Raises:
        ModelFormatError: It is damaged, or of a newer format than this phirt reads.
    """
    path = folder / CANARY_NAME
    if not path.exists():
        return None
    data = read_bytes(path, max_bytes=_MAX_FILE_BYTES)
    # In a tuple, as the number may be None.
    return _OWN_KLS.of(data, lambda: (_own_kl(_fields(data, path)),))[0]


_OWN_KLS: Remembered[tuple[float | None]] = Remembered()


def _fields(data: bytes, path: Path) -> JsonFields:
    return parse_versioned(data, path, newest=_FORMAT_VERSION)


def _own_kl(fields: JsonFields) -> float | None:
    return fields.optional_number("own_kl", minimum=0, maximum=_LARGEST_KL)


def _position(path: Path, entry: Any, largest: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    if not isinstance(entry, dict):
        raise ModelFormatError(f"{path}: each of its positions must be an object.")
    fields = JsonFields(entry, source=str(path))
    ids = fields.integers("ids", minimum=0, maximum=largest)
    values = fields.numbers("log_probabilities", minimum=_LOWEST, maximum=0)
    if not 1 <= len(ids) <= _TOP or len(ids) != len(values) or len(set(ids)) != len(ids):
        raise ModelFormatError(
            f"{path}: a position needs up to {_TOP} different ids and as many log-probabilities."
        )
    if sum(map(math.exp, values)) > 1.001:
        raise ModelFormatError(f"{path}: the probabilities of a position exceed 1 in all.")
    return ids, values


def _log_softmax(logits: FloatArray) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    values: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return values


def _log(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.log(np.maximum(values, _TINY))
