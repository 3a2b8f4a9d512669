"""A model without a runtime whose sessions can be rows of a pool, or move their caches."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from phirt.backends.base import HostLogits
from phirt.backends.execution import Execution
from phirt.backends.pool import PoolRow, SeparatePool
from phirt.errors import BackendRuntimeError
from phirt.protocols import (
    Capabilities,
    KVCache,
    KVLayer,
    KVPool,
    Lack,
    Logits,
    Session,
)
from tests.fakes import FakeModel, FakeSession, Rule


class PooledModel(FakeModel):
    """A `FakeModel` with the capabilities that are named.

    Attributes:
        pools_open: Pools that were not closed.
        steps: Rows of each step of a pool.
        copies: Rows copied in each reordering.
    """

    def __init__(
        self, rule: Rule, *, batch: bool = True, kv: bool = False, **options: object
    ) -> None:
        super().__init__(rule, **options)  # type: ignore[arg-type]
        have = {"batch": batch, "kv": kv}
        lacks = {name: Lack("never", "a fake needs none") for name in ("topk",)}
        lacks |= {name: Lack("never", "left out") for name, has in have.items() if not has}
        self.capabilities = Capabilities(
            truncate=True, verify=True, interrupt=True, lacks=lacks, **have
        )
        self.pools_open = 0
        self.pools_opened: list[tuple[int, int]] = []
        self.steps: list[int] = []
        self.copies: list[int] = []

    def _new_pool(self, *, slots: int, capacity: int, expected_length: int) -> KVPool:
        self.pools_open += 1
        self.pools_opened.append((slots, capacity))
        return FakePool(
            self, self.execution, slots=slots, capacity=capacity, expected_length=expected_length
        )

    def _new_session(self, *, max_length: int, expected_length: int) -> FakeSession:
        super()._new_session(max_length=max_length, expected_length=expected_length)
        return MovableSession(self, max_length=max_length)


class MovableSession(FakeSession):
    """A session whose cache is its ids."""

    def _export_kv(self) -> Sequence[KVLayer]:
        ids = np.array(self.ids, np.float32).reshape(1, -1, 1)
        return [KVLayer(0, ids, ids)]

    def _import_kv(self, cache: KVCache) -> None:
        self.ids = [int(token) for token in cache.layers[0].key.ravel()]


class FakeRow(PoolRow, MovableSession):
    """A row of a pool."""

    def become(self, ids: list[int]) -> None:
        self.ids = ids
        self._length = len(ids)


class FakePool(SeparatePool[FakeRow]):
    """Rows that know their ids."""

    def __init__(
        self,
        model: PooledModel,
        execution: Execution,
        *,
        slots: int,
        capacity: int,
        expected_length: int,
    ) -> None:
        super().__init__(execution, slots=slots, capacity=capacity, expected_length=expected_length)
        self.model = model

    def decode(self, sessions: Sequence[Session], token_ids: Sequence[int]) -> Logits:
        rows = self._ready(sessions, token_ids)
        model = self.model
        model.steps.append(len(rows))
        if model.delay:
            time.sleep(model.delay)
        model.calls.append(("step", len(rows)))
        if model.fail_at == len(model.calls):
            raise BackendRuntimeError("the fake failed, as it was told to")
        logits = []
        for row, token in zip(rows, token_ids, strict=True):
            row.ids.append(token)
            row.advance()
            logits.append(model.rule(row.ids))
        return HostLogits(np.stack(logits))

    def reorder(self, sessions: Sequence[Session], sources: Sequence[Session]) -> None:
        copies = [(row, list(origin.ids)) for row, origin in self._copies(sessions, sources)]
        self.model.copies.append(len(copies))
        for row, ids in copies:
            row.become(ids)

    def close(self) -> None:
        if not self._closed:
            self.model.pools_open -= 1
        super().close()

    def _new_row(self) -> FakeRow:
        model = self.model
        model.sessions_opened += 1
        model.sessions_open += 1
        return FakeRow(model, max_length=self._limit)
