"""Rows of a pool, decoded together, are what each of them is alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from phirt.errors import ContextLengthError, SessionClosedError
from phirt.protocols import KVPool, Session
from phirt.testing.subject import Subject, random_ids

__all__ = ["PoolConformance"]

# Prompts of three rows, on either side of LongRoPE's boundary of 32 and of windows of 16,
# and the room that a row has: 30 tokens are short, 60 are long.
_SHORT, _LONG = ((5, 12, 20), 30), ((34, 40, 47), 60)
_STEPS = 5
_BOTH = pytest.mark.parametrize(("lengths", "room"), [_SHORT, _LONG], ids=["short", "long"])


class PoolConformance:
    """The capability ``batch``."""

    @pytest.fixture
    def batching(self, subject: Subject) -> Subject:
        """A subject that can make pools."""
        if not subject.model.capabilities.batch:
            pytest.skip(f"declared lack: {subject.model.capabilities.lacks['batch'].reason}")
        return subject

    @_BOTH
    def test_rows_of_different_lengths(
        self, batching: Subject, lengths: tuple[int, ...], room: int
    ) -> None:
        """Each row's logits are its own, whatever stands in the others."""
        rows = _Rows(batching, lengths)
        with _pool(batching, slots=3, room=room) as pool:
            sessions = rows.prefill(pool)
            for step in range(_STEPS):
                rows.decode(pool, sessions, [0, 1, 2], f"step {step + 1}")

    @_BOTH
    def test_some_rows_in_any_order(
        self, batching: Subject, lengths: tuple[int, ...], room: int
    ) -> None:
        """Rows that sit a step out stay as they are; logits come in the order given."""
        rows = _Rows(batching, lengths)
        with _pool(batching, slots=3, room=room) as pool:
            sessions = rows.prefill(pool)
            for order in ([2, 0], [1], [0, 2, 1], [1, 0], [2, 1, 0]):
                rows.decode(pool, sessions, order, f"rows {order}")

    @_BOTH
    def test_reorder(self, batching: Subject, lengths: tuple[int, ...], room: int) -> None:
        """All at once: a row may be copied several times, and overwritten in the same call."""
        rows = _Rows(batching, lengths)
        with _pool(batching, slots=3, room=room) as pool:
            sessions = rows.prefill(pool)
            rows.decode(pool, sessions, [0, 1, 2], "before reorder")
            for sources in ([1, 0, 0], [2, 2, 1], [0, 1, 2]):
                pool.reorder(sessions, [sessions[source] for source in sources])
                rows.ids = [list(rows.ids[source]) for source in sources]
                found = [session.length for session in sessions]
                lengths_now = [len(ids) for ids in rows.ids]
                batching.check(
                    found == lengths_now, f"reorder left lengths {found}, not {lengths_now}"
                )
                rows.decode(pool, sessions, [0, 1, 2], f"after reorder {sources}")

    @_BOTH
    def test_reorder_onto_fresh_rows(
        self, batching: Subject, lengths: tuple[int, ...], room: int
    ) -> None:
        """One prompt is prefilled once, and rows that never held a token become copies of it."""
        rows = _Rows(batching, lengths[:1])
        with _pool(batching, slots=3, room=room) as pool:
            sessions = rows.prefill(pool)
            sessions += [pool.acquire(), pool.acquire()]
            pool.reorder(sessions[1:], [sessions[0], sessions[0]])
            rows.ids = [list(rows.ids[0]) for _ in sessions]
            for step in range(_STEPS):
                rows.decode(pool, sessions, [0, 1, 2], f"step {step + 1} of three copies")

    @_BOTH
    def test_a_row_alone(self, batching: Subject, lengths: tuple[int, ...], room: int) -> None:
        """A session of a pool is a session: it decodes by itself between two steps of all."""
        rows = _Rows(batching, lengths)
        with _pool(batching, slots=3, room=room) as pool:
            sessions = rows.prefill(pool)
            rows.decode(pool, sessions, [0, 1, 2], "together")
            token = rows.next_token()
            rows.ids[1].append(token)
            logits = sessions[1].decode(token).numpy().copy()
            batching.assert_logits(logits, rows.expected(1), "one row alone")
            rows.decode(pool, sessions, [2, 1, 0], "together again")

    @_BOTH
    def test_a_row_that_rolls_back(
        self, batching: Subject, lengths: tuple[int, ...], room: int
    ) -> None:
        """One row truncates, the others stay, and all go on together."""
        if not batching.model.capabilities.truncate:
            pytest.skip(f"declared lack: {batching.model.capabilities.lacks['truncate'].reason}")
        rows = _Rows(batching, lengths)
        with _pool(batching, slots=3, room=room) as pool:
            sessions = rows.prefill(pool)
            for _ in range(3):
                rows.decode(pool, sessions, [0, 1, 2], "before truncate")
            kept = max(sessions[2].floor, len(rows.ids[2]) - 2)
            sessions[2].truncate(kept)
            del rows.ids[2][kept:]
            for step in range(3):
                rows.decode(pool, sessions, [0, 1, 2], f"step {step + 1} after truncate")

    @_BOTH
    def test_a_cache_in_a_row(self, batching: Subject, lengths: tuple[int, ...], room: int) -> None:
        """A row takes over a cache of the reference, and another session takes the row's."""
        if not batching.model.capabilities.kv:
            pytest.skip(f"declared lack: {batching.model.capabilities.lacks['kv'].reason}")
        rows = _Rows(batching, lengths[:2])
        own = batching.model.info.weights_id
        with _pool(batching, slots=2, room=room) as pool:
            sessions = [pool.acquire(), pool.acquire()]
            for session, ids in zip(sessions, rows.ids, strict=True):
                session.import_kv(replace(batching.oracle.cache(ids), weights_id=own))
            rows.decode(pool, sessions, [0, 1], "on caches of the reference")
            rows.decode(pool, sessions, [1, 0], "on caches of the reference, again")
            cache = sessions[0].export_kv()
        token = rows.next_token()
        rows.ids[0].append(token)
        with batching.session(room) as session:
            session.import_kv(cache)
            batching.assert_logits(session.decode(token), rows.expected(0), "on a row's cache")

    def test_grow(self, batching: Subject) -> None:
        """More room for every row; what they hold stays."""
        rows = _Rows(batching, (34, 36))
        pool = batching.model.new_pool(slots=2, capacity=100, expected_length=40)
        sessions = rows.prefill(pool)
        rows.decode(pool, sessions, [0, 1], "before grow")
        pool.grow(100)
        batching.check(pool.capacity >= 100, f"grow(100) left a capacity of {pool.capacity}")
        for step in range(8):
            rows.decode(pool, sessions, [1, 0], f"step {step + 1} after grow")
        pool.close()

    def test_rows_run_out_and_come_back(self, batching: Subject) -> None:
        """A closed session gives its row back, with nothing of it left in there."""
        first, second = _Rows(batching, (20, 12)), _Rows(batching, (5, 12))
        with _pool(batching, slots=2, room=30) as pool:
            batching.check(pool.slots == 2, f"slots is {pool.slots}, not 2")
            sessions = first.prefill(pool)
            with pytest.raises(ValueError, match=r"row|slot"):
                pool.acquire()
            sessions[0].close()
            row = pool.acquire()
            batching.check(row.length == 0, f"a fresh row holds {row.length} tokens")
            row.prefill(second.ids[0])
            second.ids[1] = first.ids[1]
            second.decode(pool, [row, sessions[1]], [0, 1], "after a row came back")

    def test_a_row_that_is_full(self, batching: Subject) -> None:
        """No row of the step advances."""
        rows = _Rows(batching, (29, 30))
        with _pool(batching, slots=2, room=30) as pool:
            sessions = rows.prefill(pool)
            with pytest.raises(ContextLengthError):
                pool.decode(sessions, [1, 1])
            found = sessions[0].length
            batching.check(found == 29, f"a step that failed left {found} tokens in another row")

    def test_a_session_named_twice(self, batching: Subject) -> None:
        """A row advances once a step."""
        rows = _Rows(batching, (5, 12))
        with _pool(batching, slots=2, room=30) as pool:
            sessions = rows.prefill(pool)
            with pytest.raises(ValueError, match=r"\w"):
                pool.decode([sessions[0], sessions[0]], [1, 2])

    def test_close(self, batching: Subject) -> None:
        """Closing a pool closes its sessions; closing it again does nothing."""
        rows = _Rows(batching, (5, 12))
        with _pool(batching, slots=2, room=30) as pool:
            sessions = rows.prefill(pool)
            pool.close()
            pool.close()
            for session in sessions:
                with pytest.raises(SessionClosedError):
                    session.decode(1)

    def test_two_pools(self, batching: Subject) -> None:
        """Pools do not share rows."""
        here, there = _Rows(batching, (5, 12)), _Rows(batching, (20, 7), seed=5)
        with _pool(batching, slots=2, room=30) as one, _pool(batching, slots=2, room=30) as two:
            ours, theirs = here.prefill(one), there.prefill(two)
            for step in range(3):
                here.decode(one, ours, [0, 1], f"one pool, step {step + 1}")
                there.decode(two, theirs, [1, 0], f"the other pool, step {step + 1}")


@contextmanager
def _pool(subject: Subject, *, slots: int, room: int) -> Iterator[KVPool]:
    pool = subject.model.new_pool(slots=slots, capacity=room, expected_length=room)
    try:
        yield pool
    finally:
        pool.close()


class _Rows:
    """What the rows of a pool should hold, and what they should answer.

    Args:
        subject: What is tested.
        lengths: Tokens of each row's prompt.
        seed: Seed of the prompts.
    """

    def __init__(self, subject: Subject, lengths: tuple[int, ...], *, seed: int = 0) -> None:
        self._subject = subject
        self._random = np.random.default_rng(seed)
        self.ids = [random_ids(length, seed=seed + index) for index, length in enumerate(lengths)]

    def next_token(self) -> int:
        """Some token."""
        return int(self._random.integers(0, 300))

    def expected(self, row: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        """The logits after the last token of a row, shape (1, vocab)."""
        return self._subject.oracle.logits(self.ids[row])[-1:]

    def prefill(self, pool: KVPool) -> list[Session]:
        """A session for each row, holding its prompt."""
        sessions = []
        for row, ids in enumerate(self.ids):
            session = pool.acquire()
            logits = session.prefill(ids)
            self._subject.assert_logits(logits, self.expected(row), f"prefill of row {row}")
            sessions.append(session)
        return sessions

    def decode(self, pool: KVPool, sessions: list[Session], order: list[int], what: str) -> None:
        """One step of the rows named, in that order, and what it should give."""
        tokens = [self.next_token() for _ in order]
        for row, token in zip(order, tokens, strict=True):
            self.ids[row].append(token)
        logits = pool.decode([sessions[row] for row in order], tokens)
        expected = np.concatenate([self.expected(row) for row in order])
        self._subject.assert_logits(logits, expected, f"a batch of {len(order)}: {what}")
