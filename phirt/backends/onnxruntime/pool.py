"""A pool: rows of one shared buffer, decoded together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from phirt.backends.base import HostLogits
from phirt.backends.onnxruntime.cache import SharedCache
from phirt.backends.onnxruntime.errors import translate
from phirt.backends.onnxruntime.logits import DeviceLogits
from phirt.backends.onnxruntime.session import SharedSession
from phirt.backends.pool import BasePool, PoolRow
from phirt.protocols import Logits, Session
from phirt.types import IntArray

if TYPE_CHECKING:
    from phirt.backends.onnxruntime.adapter import OrtModel

__all__ = ["OrtPool"]


class OrtPool(BasePool["_Row"]):
    """Rows of different lengths: the attention mask's sums tell attention where each ends.

    A run takes rows that lie side by side. Rows that are held and take no part in a step
    split it into several runs, since attention writes to every row that it is given; free
    rows are filled from the first on, so that they seldom do.

    Args:
        model: The loaded model, whose graph shares its buffers.
        slots: Rows.
        capacity: Most tokens that a row may hold.
        expected_length: Tokens to make room for now.
    """

    def __init__(self, model: OrtModel, *, slots: int, capacity: int, expected_length: int) -> None:
        super().__init__(limit=capacity)
        self._model = model
        self._cache = SharedCache(
            model.graph,
            model.memory,
            rows=slots,
            limit=capacity,
            least=model.least_capacity,
        )
        self._rows: list[_Row | None] = [None] * slots
        self._binding = model.inference.io_binding()
        self._run_options = model.run_options()
        self._bound = (0, 0, 0)
        graph = model.graph
        self._tokens = np.zeros((slots, 1), np.int64)
        self._positions = np.zeros((slots, 1), np.int64)
        self._keep_value = model.ort.OrtValue.ortvalue_from_numpy(np.ones(1, np.int64))
        self._logits = np.zeros((slots, 1, graph.vocab_size), graph.logits_type.storage)
        self.reserve(min(expected_length, capacity))

    @property
    def slots(self) -> int:
        """Rows."""
        return len(self._rows)

    @property
    def capacity(self) -> int:
        """Tokens that each row has room for."""
        return self._cache.capacity

    def acquire(self) -> Session:
        """A session on the first free row; closing it frees the row."""
        self._check_open()
        if None not in self._rows:
            raise ValueError(f"All {self.slots} rows of the pool are taken; close a session.")
        index = self._rows.index(None)
        row = _Row(self, self._model, self._cache, max_length=self._limit, row=index)
        self._rows[index] = row
        return row

    def decode(self, sessions: Sequence[Session], token_ids: Sequence[int]) -> Logits:
        """Append one token to each of several sessions; one row of logits for each."""
        rows = self._ready(sessions, token_ids)
        logits = self._model.execution.run(self._decode, rows, token_ids)
        for row in rows:
            row.advance()
        return logits

    def reorder(self, sessions: Sequence[Session], sources: Sequence[Session]) -> None:
        """Make each session a copy of its source, all at once."""
        moves = [
            (target, origin, origin.length)
            for target, origin in self._copies(sessions, sources)
            if target is not origin
        ]
        if moves:
            self._model.execution.run(
                self._cache.copy_rows,
                [target.row for target, _, _ in moves],
                [origin.row for _, origin, _ in moves],
                max(length for _, _, length in moves),
            )
        for target, _, length in moves:
            target.become(length)

    def grow(self, capacity: int) -> None:
        """Give every row room for ``capacity`` tokens; never shrinks."""
        self._check_capacity(capacity)
        self._model.execution.run(self.reserve, capacity)

    def close(self) -> None:
        """Close every session and free the buffers. Idempotent."""
        self._closed = True
        for row in self._rows:
            if row is not None:
                row.close()
        self._cache.release()
        self._binding = None

    def reserve(self, length: int) -> None:
        """Give every row room for ``length`` tokens, in the runtime's turn."""
        self._cache.reserve(length, [0 if row is None else row.length for row in self._rows])

    def release(self, index: int) -> None:
        """Take back a row whose session is closed."""
        self._rows[index] = None

    def _decode(self, rows: Sequence[_Row], token_ids: Sequence[int]) -> Logits:
        self.reserve(max(row.length for row in rows) + 1)
        for row, token in zip(rows, token_ids, strict=True):
            self._tokens[row.row, 0] = token
            self._positions[row.row, 0] = row.length
        runs = _side_by_side(sorted(row.row for row in rows))
        try:
            parts = [self._run(first, count) for first, count in runs]
        except Exception as error:
            for row in rows:
                row.fail()
            raise translate(error, f"decoding {len(rows)} sequences") from error
        if not self._model.memory.on_host:
            return self._from_device(rows, runs, parts)
        stored = self._logits[[row.row for row in rows], 0]
        return HostLogits(self._model.graph.logits_type.to_float32(stored))

    def _run(self, first: int, count: int) -> DeviceLogits | None:
        """Run rows side by side; logits on the host lie in the pool's buffer afterwards."""
        graph, binding, memory = self._model.graph, self._binding, self._model.memory
        end = first + count
        if self._bound != (first, count, self._cache.version):
            self._cache.bind(binding, first, count)
            if graph.num_logits_to_keep is not None:
                binding.bind_ortvalue_input(graph.num_logits_to_keep, self._keep_value)
            if memory.on_host:
                value = memory.place(self._logits[first:end], graph.logits_type)
                binding.bind_ortvalue_output(graph.logits, value)
            self._bound = (first, count, self._cache.version)
        if not memory.on_host:
            binding.bind_output(graph.logits, memory.device_type, memory.device_id)
        positions = self._positions[first:end]
        binding.bind_cpu_input(graph.input_ids, self._tokens[first:end])
        if graph.position_ids is not None:
            binding.bind_cpu_input(graph.position_ids, positions)
        if graph.attention_mask is not None:
            steps: IntArray = np.arange(positions.max() + 1, dtype=np.int64)
            binding.bind_cpu_input(graph.attention_mask, (steps <= positions).astype(np.int64))
        self._model.inference.run_with_iobinding(binding, self._run_options)
        if memory.on_host:
            return None
        return DeviceLogits(self._model, binding.get_outputs()[-1], every_position=False)

    def _from_device(
        self,
        rows: Sequence[_Row],
        runs: Sequence[tuple[int, int]],
        parts: Sequence[DeviceLogits | None],
    ) -> Logits:
        order = [row.row for row in rows]
        if len(parts) == 1 and parts[0] is not None and order == sorted(order):
            return parts[0]
        values = np.concatenate([part.numpy() for part in parts if part is not None])
        places = [index for first, count in runs for index in range(first, first + count)]
        return HostLogits(values[[places.index(index) for index in order]])

    def _held(self) -> list[_Row]:
        return [row for row in self._rows if row is not None]


class _Row(PoolRow, SharedSession):
    """A session on a row of a pool."""

    def __init__(
        self, pool: OrtPool, model: OrtModel, cache: SharedCache, *, max_length: int, row: int
    ) -> None:
        self._pool = pool
        super().__init__(model, max_length=max_length, cache=cache, row=row)

    def become(self, length: int) -> None:
        """Its row now holds another sequence, of that length."""
        self._length = length

    def _reserve(self, length: int) -> None:
        self._pool.reserve(length)

    def _free(self) -> None:
        self._pool.release(self._row)
        self._let_go()


def _side_by_side(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending rows as runs of neighbours: first row and count of each."""
    runs: list[tuple[int, int]] = []
    for row in rows:
        if runs and row == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((row, 1))
    return runs
