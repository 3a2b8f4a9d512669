"""What pools share: whose sessions they decode, and what a step, a copy and growth may ask."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Sequence
from typing import Generic, TypeVar

from phirt.backends.base import BaseSession
from phirt.backends.execution import Execution
from phirt.errors import ContextLengthError, SessionClosedError
from phirt.protocols import Session

__all__ = ["BasePool", "PoolRow", "SeparatePool"]

_Row = TypeVar("_Row", bound="PoolRow")


class PoolRow(BaseSession):
    """A session that takes part in the steps of its pool; mixed in before a runtime's own."""

    @property
    def is_closed(self) -> bool:
        """Whether its place in the pool is free again."""
        return self._state == "closed"

    def check_ready(self) -> None:
        """Raise unless it is open, prefilled and has room for a token.

        Raises:
            SessionClosedError: It is closed, or has failed.
            ValueError: It holds no token yet.
            ContextLengthError: It is full.
        """
        self._check_open()
        if self._length == 0:
            raise ValueError("A session of the batch is empty; prefill it first.")
        if self._length >= self._max_length:
            raise ContextLengthError(
                f"A session of the batch holds {self._length} tokens, all that it was made for.",
                required=self._length + 1,
                available=self._max_length,
            )

    def advance(self) -> None:
        """A step appended one token."""
        self._length += 1

    def fail(self) -> None:
        """A step ended in the middle: some of its layers may hold the token, and others not."""
        self._state = "failed"


class BasePool(abc.ABC, Generic[_Row]):
    """The part of `phirt.protocols.KVPool` that is the same on every runtime: the checks.

    Each is done before anything has changed.

    Args:
        limit: Most tokens that one row will ever hold.
    """

    def __init__(self, *, limit: int) -> None:
        self._limit = limit
        self._closed = False

    @abc.abstractmethod
    def _held(self) -> Iterable[_Row]:
        """The rows whose sessions are open."""

    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosedError("The pool is closed; make a new one.")

    def _known(self, sessions: Sequence[Session]) -> list[_Row]:
        """The sessions as rows of this pool."""
        self._check_open()
        held = {id(row): row for row in self._held()}
        known = [held[id(session)] for session in sessions if id(session) in held]
        if len(known) != len(sessions):
            raise ValueError("A session is not of this pool, or is closed.")
        return known

    def _distinct(self, sessions: Sequence[Session]) -> list[_Row]:
        rows = self._known(sessions)
        if len({id(row) for row in rows}) != len(rows):
            raise ValueError("The sessions of one call must be distinct.")
        return rows

    def _ready(self, sessions: Sequence[Session], token_ids: Sequence[int]) -> list[_Row]:
        """The rows of a step."""
        rows = self._distinct(sessions)
        if not rows or len(token_ids) != len(rows):
            raise ValueError(f"{len(rows)} sessions were given {len(token_ids)} tokens.")
        for row in rows:
            row.check_ready()
        return rows

    def _copies(
        self, sessions: Sequence[Session], sources: Sequence[Session]
    ) -> list[tuple[_Row, _Row]]:
        """Each row that is overwritten, with its source."""
        rows, origins = self._distinct(sessions), self._known(sources)
        if len(rows) != len(origins):
            raise ValueError(f"{len(rows)} sessions were given {len(origins)} sources.")
        return list(zip(rows, origins, strict=True))

    def _check_capacity(self, capacity: int) -> None:
        self._check_open()
        if capacity > self._limit:
            raise ContextLengthError(
                f"The pool was made for rows of {self._limit} tokens; {capacity} is more.",
                required=capacity,
                available=self._limit,
            )


class SeparatePool(BasePool[_Row]):
    """A pool whose rows have caches of their own: made when acquired, and gone when closed.

    Args:
        execution: How calls of the model run.
        slots: Rows.
        capacity: Most tokens that one row will ever hold.
        expected_length: Tokens that a row is made for at first.
    """

    def __init__(
        self, execution: Execution, *, slots: int, capacity: int, expected_length: int
    ) -> None:
        super().__init__(limit=capacity)
        self._execution = execution
        self._slots = slots
        self._capacity = min(expected_length, capacity)
        self._rows: list[_Row] = []

    @property
    def slots(self) -> int:
        """Rows."""
        return self._slots

    @property
    def capacity(self) -> int:
        """Tokens that each row has room for at least."""
        return self._capacity

    def acquire(self) -> Session:
        """A session on a free row.

        Raises:
            ValueError: No row is free.
        """
        self._check_open()
        self._rows = self._held()
        if len(self._rows) == self._slots:
            raise ValueError(f"All {self._slots} rows of the pool are taken; close a session.")
        row = self._execution.run(self._new_row)
        self._rows.append(row)
        return row

    def grow(self, capacity: int) -> None:
        """Give every row room for ``capacity`` tokens."""
        self._check_capacity(capacity)
        self._capacity = max(self._capacity, capacity)

    def close(self) -> None:
        """Close every session. Calling it again does nothing."""
        self._closed = True
        for row in self._held():
            row.close()

    def _held(self) -> list[_Row]:
        return [row for row in self._rows if not row.is_closed]

    @abc.abstractmethod
    def _new_row(self) -> _Row:
        """A session for ``self._limit`` tokens that has room for ``self._capacity``."""
