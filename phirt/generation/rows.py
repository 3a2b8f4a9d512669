"""Several sequences of one prompt on their way through the model, one step for all.

The prompt is prefilled once, in one row of a pool, and the others become copies of it. A model
that has no pools gives each sequence a session of its own: copied through the host where its
caches can move, else prefilled anew.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Protocol

import numpy as np

from phirt.errors import SessionClosedError
from phirt.generation.forward import PREFILL_CHUNK, split_prompt
from phirt.generation.history import TokenHistory
from phirt.protocols import KVPool, LoadedModel, Session
from phirt.types import FloatArray

__all__ = ["Rows"]


class Rows:
    """Gives the logits of the next position of several sequences, again and again.

    It is driven by one thread at a time; only `cancel` may be called from another. Close it,
    or use it as a context manager: its rows are free afterwards, however it ended.

    Args:
        model: The loaded model.
        count: Most sequences at once. The memory for keys and values grows with it.
        max_new_tokens: Most tokens that a sequence may generate, or None.
        prefill_chunk: Most prompt tokens per call of the model.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        count: int,
        max_new_tokens: int | None,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> None:
        self._model = model
        self._count = count
        self._max_new_tokens = max_new_tokens
        self._prefill_chunk = prefill_chunk
        self._limit = 0
        self._store: _Store | None = None
        self._sessions: list[Session] = []
        self._cancelled = threading.Event()

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def cancel(self) -> None:
        """Let the next call of the model not begin. Callable from any thread."""
        self._cancelled.set()

    def close(self) -> None:
        """Free every row. Calling it again does nothing."""
        store, self._store = self._store, None
        self._sessions = []
        if store is not None:
            store.close()

    def prefill(self, history: TokenHistory) -> FloatArray:
        """Run a prompt, which becomes row 0 and the only one.

        Args:
            history: The prompt's tokens.

        Returns:
            Logits of the position after it, shape (1, vocab), the caller's to write to.

        Raises:
            SessionClosedError: The request was cancelled, or the model closed.
            OutOfMemoryError: The rows cannot be allocated.
        """
        return self._fill_all([history])

    def step(self, sources: Sequence[int], histories: Sequence[TokenHistory]) -> FloatArray:
        """Run the last token of each sequence.

        Args:
            sources: For each sequence, the row of the step before that it continues; a row may
                be named several times, and one that is not named is free afterwards.
            histories: The sequences, of one length. Their places are the rows of this step.

        Returns:
            Logits of the positions after them, shape (rows, vocab), the caller's to write to.

        Raises:
            SessionClosedError: The request was cancelled, or the model closed.
        """
        self._check_cancelled()
        if len(histories[0]) > self._limit:
            # LongRoPE's boundary: keys of the short factors are of no use beyond it.
            return self._fill_all(histories)
        assert self._store is not None  # noqa: S101 - prefill made it
        inherited = dict(zip(sources[::-1], range(len(sources) - 1, -1, -1), strict=True))
        spare = [row for number, row in enumerate(self._sessions) if number not in inherited]
        copied = [place for place, row in enumerate(sources) if inherited[row] != place]
        sessions = {place: self._sessions[row] for row, place in inherited.items()}
        targets = self._store.copy([self._sessions[sources[place]] for place in copied], spare)
        unfilled: list[int] = []
        for place, target in zip(copied, targets, strict=True):
            sessions[place] = target
            if target.length == 0:
                unfilled.append(place)
        self._sessions = [sessions[place] for place in range(len(sources))]
        together = [place for place in range(len(sources)) if place not in unfilled]
        logits = self._store.decode(
            [self._sessions[place] for place in together],
            [histories[place].last_id for place in together],
        )
        if not unfilled:
            return logits
        result = np.empty((len(sources), logits.shape[1]), np.float32)
        result[together] = logits
        for place in unfilled:
            result[place] = self._fill(self._sessions[place], histories[place])
        return result

    def _fill_all(self, histories: Sequence[TokenHistory]) -> FloatArray:
        """Prefill every sequence whole, in rows that have room for what is to come."""
        self.close()
        info, length = self._model.info, len(histories[0])
        limit = info.context_length
        if self._max_new_tokens is not None:
            limit = histories[0].prompt_length + self._max_new_tokens
        boundary = info.rope_boundary
        if boundary is not None and length <= boundary < limit:
            # The short rotary factors until there; the next token is in other rows.
            limit = boundary
        room = limit if self._max_new_tokens is not None else min(limit, length + PREFILL_CHUNK)
        self._limit = limit
        kind = _Pooled if self._model.capabilities.batch else _Separate
        self._store = kind(self._model, count=self._count, limit=limit, room=room)
        result = np.empty((len(histories), info.vocab_size), np.float32)
        for row, history in enumerate(histories):
            session = self._store.acquire()
            self._sessions.append(session)
            result[row] = self._fill(session, history)
        return result

    def _fill(self, session: Session, history: TokenHistory) -> FloatArray:
        """Prefill one sequence; logits of the position after it, (vocab,)."""
        ids = history.token_ids.tolist()
        chunk = self._prefill_chunk if session.can_extend else len(ids)
        first = self._model.info.first_call(self._limit)
        start = 0
        for size in split_prompt(len(ids), chunk, first=first):
            self._check_cancelled()
            part = ids[start : start + size]
            start += size
            logits = session.prefill(part, needs_logits=start == len(ids))
        row: FloatArray = logits.numpy()[-1]
        return row

    def _check_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise SessionClosedError("The generation was cancelled.")


class _Store(Protocol):
    """Where the sessions of the rows come from."""

    def acquire(self) -> Session:
        """An empty session."""

    def copy(self, sources: Sequence[Session], spare: Sequence[Session]) -> list[Session]:
        """A session like each of the sources, or an empty one where caches cannot be copied.

        The spare ones are of no more use: they are overwritten or closed.
        """

    def decode(self, sessions: Sequence[Session], token_ids: Sequence[int]) -> FloatArray:
        """Append one token to each; their logits, (sessions, vocab)."""

    def close(self) -> None:
        """Close all sessions."""


class _Pooled:
    """Rows of a pool."""

    def __init__(self, model: LoadedModel, *, count: int, limit: int, room: int) -> None:
        self._pool: KVPool = model.new_pool(slots=count, capacity=limit, expected_length=room)

    def acquire(self) -> Session:
        return self._pool.acquire()

    def copy(self, sources: Sequence[Session], spare: Sequence[Session]) -> list[Session]:
        reused = list(spare[: len(sources)])
        for session in spare[len(sources) :]:
            session.close()
        targets = reused + [self._pool.acquire() for _ in sources[len(reused) :]]
        if targets:
            self._pool.reorder(targets, sources)
        return targets

    def decode(self, sessions: Sequence[Session], token_ids: Sequence[int]) -> FloatArray:
        return self._pool.decode(sessions, token_ids).numpy()

    def close(self) -> None:
        self._pool.close()


class _Separate:
    """A session of its own for each row, of a model that has no pools."""

    def __init__(self, model: LoadedModel, *, count: int, limit: int, room: int) -> None:
        del count
        self._model = model
        self._limit = limit
        self._room = room
        self._open: list[Session] = []

    def acquire(self) -> Session:
        session = self._model.new_session(max_length=self._limit, expected_length=self._room)
        self._open.append(session)
        return session

    def copy(self, sources: Sequence[Session], spare: Sequence[Session]) -> list[Session]:
        # They go first, for their memory; a cache is taken over by empty sessions only.
        for session in spare:
            self._open.remove(session)
            session.close()
        targets = []
        caches = {}
        for source in sources:
            target = self.acquire()
            targets.append(target)
            if self._model.capabilities.kv:
                if id(source) not in caches:
                    caches[id(source)] = source.export_kv()
                target.import_kv(caches[id(source)])
        return targets

    def decode(self, sessions: Sequence[Session], token_ids: Sequence[int]) -> FloatArray:
        rows = [
            # A copy each: the next call of the model may overwrite them.
            session.decode(token).numpy()[-1:].copy()
            for session, token in zip(sessions, token_ids, strict=True)
        ]
        return np.concatenate(rows)

    def close(self) -> None:
        open_sessions, self._open = self._open, []
        with ExitStack() as stack:  # one that fails to close keeps none of the others
            for session in open_sessions:
                stack.callback(session.close)
