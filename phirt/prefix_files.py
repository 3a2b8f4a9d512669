"""The beginning of prompts on disk: `phirt.Model.save_prefix` and `phirt.Model.load_prefix`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from phirt.errors import ContextLengthError, UnsupportedModelError
from phirt.generation.forward import PREFILL_CHUNK, split_prompt
from phirt.generation.prefix import OpenSession, PrefixCache
from phirt.models.kv_file import read_kv, write_kv
from phirt.protocols import LoadedModel, RopeRegime

__all__ = ["load_prefix", "save_prefix"]

_ROOM = 256  # tokens beyond the prefix that are allocated for at once


def save_prefix(
    model: LoadedModel, prefixes: PrefixCache | None, token_ids: Sequence[int], path: Path
) -> None:
    """Write the KV cache of some tokens to a file.

    What is kept of them is not computed again, and what is computed is kept.

    Args:
        model: The loaded model.
        prefixes: Its kept caches, if it keeps any.
        token_ids: The tokens, n >= 1.
        path: The file; what is there is replaced.

    Raises:
        UnsupportedModelError: The runtime cannot give its caches away.
        ContextLengthError: There are more tokens than the model's context.
        ValueError: There are none, or one is outside the vocabulary.
        OSError: The file cannot be written.
    """
    info, length = model.info, len(token_ids)
    _check_kv(model)
    if not length:
        raise ValueError("The prefix is empty; it needs at least one token.")
    if length > info.context_length:
        raise ContextLengthError(
            f"The prefix has {length} tokens; the model's context is {info.context_length}.",
            required=length,
            available=info.context_length,
        )
    if min(token_ids) < 0 or max(token_ids) >= info.vocab_size:
        raise ValueError(f"A token id is outside the model's vocabulary of {info.vocab_size}.")
    limit = _longest(model, info.regime(length))
    ids = np.asarray(token_ids, np.int64)
    opened = None if prefixes is None else prefixes.take(model, ids, limit=limit)
    if opened is None:
        session = model.new_session(max_length=limit, expected_length=length)
        opened = OpenSession(session, model, limit)
    try:
        _run(opened, token_ids)
        cache = opened.session.export_kv()
    except BaseException:
        opened.session.close()
        raise
    if prefixes is None:
        opened.session.close()
    else:
        prefixes.give(opened, ids)
    write_kv(path, cache, token_ids)


def load_prefix(
    model: LoadedModel, prefixes: PrefixCache | None, path: Path, *, bytes_per_token: int
) -> int:
    """Keep the KV cache of a file for requests that begin with its tokens.

    Args:
        model: The loaded model.
        prefixes: Its kept caches, if it keeps any.
        path: The file.
        bytes_per_token: Most bytes of a token's keys and values, in float32.

    Returns:
        How many tokens it holds.

    Raises:
        ModelNotFoundError: There is no such file.
        ModelFormatError: It is damaged.
        UnsupportedModelError: It is of other weights or of another version of the format, or the
            runtime cannot take it over.
        ContextLengthError: It holds more tokens than the model's context.
        OutOfMemoryError: There is no memory for it.
        ValueError: The model keeps no caches, or none of that size.
    """
    _check_kv(model)
    if prefixes is None:
        raise ValueError(
            "The model keeps no KV caches, so that a prefix would be gone at once. Load it with a "
            "prefix_cache_bytes above 0."
        )
    stored = read_kv(path, info=model.info, bytes_per_token=bytes_per_token)
    cache = stored.cache
    refusal = prefixes.refusal(cache.length)
    if refusal is not None:
        raise ValueError(f"{path} holds a cache of {cache.length} tokens: {refusal}.")
    limit = _longest(model, cache.regime)
    session = model.new_session(max_length=limit, expected_length=min(limit, cache.length + _ROOM))
    try:
        session.import_kv(cache)
    except ValueError as error:
        session.close()
        raise UnsupportedModelError(f"{path} does not fit this model: {error}") from error
    except BaseException:
        session.close()
        raise
    prefixes.give(OpenSession(session, model, limit), stored.token_ids)
    return cache.length


def _check_kv(model: LoadedModel) -> None:
    if not model.capabilities.kv:
        raise UnsupportedModelError(
            "The runtime's KV caches cannot be taken out or put back: "
            f"{model.capabilities.lacks['kv'].reason}. Load the model with another backend."
        )


def _longest(model: LoadedModel, regime: RopeRegime | None) -> int:
    """Most tokens that a session of the regime may hold, so that it serves any request."""
    boundary = model.info.rope_boundary
    return boundary if regime == "short" and boundary is not None else model.info.context_length


def _run(opened: OpenSession, token_ids: Sequence[int]) -> None:
    """Run what the session does not hold yet."""
    session, start = opened.session, opened.session.length
    count = len(token_ids) - start
    chunk = PREFILL_CHUNK if session.can_extend else count
    first = 1 if start else opened.model.info.first_call(opened.limit)
    for size in split_prompt(count, chunk, first=first):
        session.prefill(token_ids[start : start + size])
        start += size
