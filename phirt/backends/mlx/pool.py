"""Sequences that MLX decodes together: one pass over the weights for one token of each.

Every row keeps caches of its own. A step pads their keys and values to the longest row, which
reads them once more than a shared buffer would, and leaves each row what it is alone: it can be
prefilled, truncated, exported or closed between two steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from phirt.backends.mlx.memory import check_host_memory, translate
from phirt.backends.mlx.session import MlxLogits, MlxSession
from phirt.backends.pool import PoolRow, SeparatePool
from phirt.errors import PhirtError
from phirt.protocols import Logits, Session

if TYPE_CHECKING:
    from phirt.backends.mlx.model import MlxModel

__all__ = ["MlxPool"]


class MlxPool(SeparatePool["_Row"]):
    """Rows of one model (a `phirt.protocols.KVPool`); caches grow when they are written to.

    Args:
        model: The model.
        slots: Rows.
        capacity: Most tokens that one row will ever hold.
        expected_length: Tokens that a row is made for at first.
    """

    def __init__(self, model: MlxModel, *, slots: int, capacity: int, expected_length: int) -> None:
        super().__init__(
            model.execution, slots=slots, capacity=capacity, expected_length=expected_length
        )
        self._model = model

    def decode(self, sessions: Sequence[Session], token_ids: Sequence[int]) -> Logits:
        """Append one token to each of several sessions; one row of logits for each.

        Raises:
            ValueError: A session is empty, is named twice or is not of this pool, or a token
                is not of the vocabulary. Nothing has changed.
            ContextLengthError: A row is full. Nothing has changed.
        """
        rows = self._ready(sessions, token_ids)
        self._model.check_tokens(token_ids)
        try:
            logits = self._model.run(lambda: self._step(rows, token_ids))
        except BaseException:
            for row in rows:
                row.fail()
            raise
        for row in rows:
            row.advance()
        return MlxLogits(self._model, logits)

    def reorder(self, sessions: Sequence[Session], sources: Sequence[Session]) -> None:
        """Make each session a copy of its source, all at once; nothing is moved."""
        copies = self._copies(sessions, sources)

        def copy() -> None:
            # All are taken before the first is written: a source may be overwritten too.
            taken = [(row, origin.share(), origin.length) for row, origin in copies]
            for row, layers, length in taken:
                row.become(layers, length)

        self._model.run(copy)

    def _step(self, rows: Sequence[_Row], token_ids: Sequence[int]) -> Any:
        target, config = self._model.target, self._model.config
        longest = max(row.length for row in rows) + 1
        if target.is_host:
            # A layer's padded keys and values, and the masks.
            padded = 2 * config.num_kv_heads * config.head_size * longest
            size = 4 * len(rows) * (padded + longest + config.vocab_size)
            check_host_memory(size, f"decoding {len(rows)} rows")
        try:
            logits = self._model.loaded_decoder.step(
                token_ids, [row.caches for row in rows], regime=rows[0].regime
            )
            target.mx.eval(logits, [cache.state[:2] for row in rows for cache in row.caches])
        except PhirtError:
            raise
        except Exception as error:
            raise translate(error, f"decoding {len(rows)} rows") from error
        return logits

    def _new_row(self) -> _Row:
        return _Row(self._model, max_length=self._limit, expected_length=self._capacity)


class _Row(PoolRow, MlxSession):
    """A session that takes part in the steps of its pool."""

    def share(self) -> list[tuple[Any, Any]]:
        """Keys and values of every layer, which nothing that happens to this row changes."""
        # MLX writes into the array that it is given; a slice is an array of its own, and
        # shares the memory until one of them is written to.
        return [(cache.keys[:], cache.values[:]) for cache in self.caches]

    def become(self, layers: Sequence[tuple[Any, Any]], length: int) -> None:
        """Hold these keys and values."""
        for cache, (keys, values) in zip(self.caches, layers, strict=True):
            cache.keys, cache.values, cache.offset = keys, values, length
        self._length = length
