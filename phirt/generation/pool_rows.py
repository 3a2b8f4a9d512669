"""Which sequences lie in the rows of the pool that shared steps run on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

from phirt.errors import PhirtError
from phirt.protocols import KVPool, LoadedModel, Logits, Session

__all__ = ["Holder", "PoolRows"]

_logger = logging.getLogger(__name__)

_FEWEST_ROWS = 4
_IDLE_STEPS = 16
"""After so many steps without its sequence a row is taken back: another run for it each time
costs less for a while than moving it."""

_ROOM = 256
"""Tokens beyond the longest sequence that a new pool has room for at once."""


class Holder(Protocol):
    """A sequence that can move between sessions."""

    inner: Session
    max_length: int


class PoolRows:
    """Moves sequences into a pool, together, and out of it again.

    One thread at a time uses it. A pool's sessions are acquired on its first free row
    (`phirt.protocols.KVPool`), so that sequences which step together are kept on the first rows:
    runtimes run neighbours at once.

    Args:
        model: The loaded model.
        most: Most rows.
    """

    def __init__(self, model: LoadedModel, *, most: int) -> None:
        self._model = model
        self._most = most
        info = model.info
        boundary = info.rope_boundary
        # Of LongRoPE's two regimes the short one; sequences of the other step by themselves.
        self._capacity = info.context_length if boundary is None else boundary
        self._pool: KVPool | None = None
        self._held: list[Holder | None] = []
        self._idle: dict[int, int] = {}  # steps that the sequence of a row took no part in

    def gather(self, sequences: Sequence[Holder]) -> list[Holder]:
        """Move sequences to rows of the pool.

        Returns:
            Those that are in it now. Not in it is what is of another rotary regime, or for what
            there is no memory.
        """
        regime = self._model.info.regime
        wanted = [each for each in sequences if regime(each.max_length) == regime(self._capacity)]
        wanted = wanted[: self._most]
        if len(wanted) < 2:
            return []
        try:
            self._take_back(wanted)
            self._make_room(wanted)
            for each in wanted:
                if each not in self._held:
                    self._enter(each)
            self._close_gaps()
        except PhirtError as error:
            _logger.info("Sequences do not share a pool: %s", error)
        for index, held in enumerate(self._held):
            self._idle[index] = 0 if held in wanted else self._idle.get(index, 0) + 1
        return [each for each in wanted if each in self._held]

    def decode(self, sessions: Sequence[Session], token_ids: Sequence[int]) -> Logits:
        """One step for rows that `gather` returned."""
        assert self._pool is not None  # noqa: S101 - there are rows
        return self._pool.decode(sessions, token_ids)

    def forget(self, sequence: Holder) -> None:
        """A sequence ends; its session is about to be closed."""
        if sequence in self._held:
            self._held[self._held.index(sequence)] = None

    def close_if_empty(self) -> None:
        """Free the pool where no sequence is in it."""
        if self._pool is not None and not any(self._held):
            self._pool.close()
            self._pool, self._held = None, []

    def _take_back(self, wanted: Sequence[Holder]) -> None:
        """Move sequences that have not stepped for long to sessions of their own."""
        for index, held in enumerate(self._held):
            if held is None or held in wanted or self._idle.get(index, 0) < _IDLE_STEPS:
                continue
            session = self._model.new_session(
                max_length=held.max_length, expected_length=held.inner.length + 1
            )
            self._held[index] = None
            _move(held, session)

    def _make_room(self, wanted: Sequence[Holder]) -> None:
        """See to it that there is a row for each, in a larger pool if need be."""
        missing = sum(each not in self._held for each in wanted)
        if self._pool is not None and self._held.count(None) >= missing:
            return
        staying = [each for each in self._held if each is not None]
        count = len(staying) + missing
        slots = _FEWEST_ROWS
        while slots < count:
            slots *= 2
        longest = max(each.inner.length for each in [*wanted, *staying])
        pool = self._model.new_pool(
            slots=slots,
            capacity=self._capacity,
            expected_length=min(longest + _ROOM, self._capacity),
        )
        before, self._pool = self._pool, pool
        self._held = [None] * slots
        self._idle = {}
        try:
            for each in staying:
                self._enter(each)
        finally:
            if before is not None and all(each in self._held for each in staying):
                before.close()

    def _enter(self, sequence: Holder) -> None:
        assert self._pool is not None  # noqa: S101 - made by _make_room
        session = self._pool.acquire()
        index = self._held.index(None)
        _move(sequence, session)
        self._held[index] = sequence

    def _close_gaps(self) -> None:
        """Move sequences of the last rows to free ones before them."""
        assert self._pool is not None  # noqa: S101 - made by _make_room
        while True:
            last = max(
                (index for index, held in enumerate(self._held) if held is not None), default=0
            )
            if None not in self._held[:last]:
                return
            held = self._held[last]
            if held is None:
                return
            # First the new row, which is the first free one, then the old one goes.
            session = self._pool.acquire()
            index = self._held.index(None)
            _move(held, session)
            self._held[last], self._held[index] = None, held


def _move(sequence: Holder, session: Session) -> None:
    """Let a sequence go on in another session; where that fails, it stays where it was."""
    before = sequence.inner
    try:
        if before.length:
            session.import_kv(before.export_kv())
    except BaseException:
        session.close()
        raise
    sequence.inner = session
    before.close()
