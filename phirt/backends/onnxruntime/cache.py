"""The KV cache: rows of one shared buffer per layer, or tensors that each step makes anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phirt.backends.onnxruntime.errors import translate
from phirt.backends.onnxruntime.graph import DecoderGraph
from phirt.backends.onnxruntime.memory import Memory
from phirt.types import FloatArray

__all__ = ["GrowingCache", "SharedCache"]

_BUCKET = 256  # tokens; shared buffers are allocated in multiples of it


class SharedCache:
    """Rows of one buffer per layer's keys and values, bound as past and as present at once.

    Attention writes new keys and values into the buffer that it reads the old ones from:
    nothing is copied from step to step, and rolling back is setting a length.

    Args:
        graph: The decoder.
        memory: Where the buffers lie.
        rows: Sequences.
        limit: Most tokens that a row may ever hold.
        least: Positions that the graph wants in a buffer however few are used.
    """

    def __init__(
        self, graph: DecoderGraph, memory: Memory, *, rows: int, limit: int, least: int = 0
    ) -> None:
        self._graph = graph
        self._memory = memory
        self._rows = rows
        self._limit = max(limit, least)
        self._least = least
        self._values: list[Any] = []
        # On the host, the arrays that the tensors are made on; elsewhere none.
        self._arrays: list[NDArray[Any]] = []
        self.capacity = 0
        self.version = 0
        """Counts allocations: what was bound under another version is gone."""

    def reserve(self, length: int, held: Sequence[int]) -> None:
        """Give every row room for ``length`` tokens, and some more.

        Args:
            length: Tokens.
            held: How many tokens each row holds now; they are kept.

        Raises:
            OutOfMemoryError: The buffers cannot be allocated; the old ones stay.
        """
        if length <= self.capacity:
            return
        wanted = max(length, self._least, min(2 * self.capacity, self.capacity + 8 * _BUCKET))
        capacity = min(-(-wanted // _BUCKET) * _BUCKET, self._limit)
        shape = (self._rows, self._graph.kv_heads, capacity, self._graph.head_size)
        try:
            self._move_to(shape, held)
        except Exception as error:
            raise translate(error, f"allocating a KV cache for {capacity} tokens") from error
        self.capacity = capacity
        self.version += 1

    def _move_to(self, shape: tuple[int, ...], held: Sequence[int]) -> None:
        """Replace the buffers by larger ones, which take over what each row holds."""
        length = max(held, default=0)
        element, memory, count = self._graph.cache, self._memory, len(self._graph.past)
        if memory.on_host:
            arrays = [memory.zeros(shape, element) for _ in range(count)]
            values = [memory.place(array, element) for array in arrays]
            # All is allocated, and nothing of it taken yet. An old buffer goes as soon as it is
            # copied, so that there are never two of more than one.
            for index in range(count if length else 0):
                # Row by row: to write where a row is empty would take memory for it.
                for row, kept in enumerate(held):
                    arrays[index][row, :, :kept] = self._arrays[index][row, :, :kept]
                self._arrays[index], self._values[index] = arrays[index], values[index]
            self._arrays, self._values = arrays, values
            return
        values = []
        for index in range(count):
            array = memory.zeros(shape, element)
            if length:
                array[:, :, :length] = self._stored(index)[:, :, :length]
            values.append(memory.place(array, element))
        self._values = values

    def bind(self, binding: Any, first: int, count: int) -> None:
        """Bind rows ``first`` to ``first + count - 1`` as past and present.

        Part of the rows needs memory that has addresses.
        """
        names = zip(self._graph.past, self._graph.present, self._values, strict=True)
        element, memory = self._graph.cache, self._memory
        # A binding keeps a tensor's memory for as long as the tensor is bound. An address it does
        # not keep, so that buffers that were replaced are gone before all bindings know.
        if (first, count) == (0, self._rows) and not memory.on_host:
            for past, present, value in names:
                binding.bind_ortvalue_input(past, value)
                binding.bind_ortvalue_output(present, value)
            return
        kind = element.number if element.is_bfloat16 else element.storage.type
        for past, present, value in names:
            shape = [count, *value.shape()[1:]]
            row_bytes = int(np.prod(shape[1:])) * element.storage.itemsize
            address = value.data_ptr() + first * row_bytes
            place = (memory.device_type, memory.device_id, kind, shape, address)
            binding.bind_input(past, *place)
            binding.bind_output(present, *place)

    def read(self, row: int, length: int) -> list[FloatArray]:
        """Copies of a row's keys and values, each (kv_heads, length, head_size)."""
        return [
            np.array(self._graph.from_cache(index, self._stored(index)[row, :, :length]))
            for index in range(len(self._values))
        ]

    def write(self, row: int, layers: Sequence[FloatArray]) -> None:
        """Set the first positions of a row to keys and values as `read` gives them."""
        for index, layer in enumerate(layers):
            stored = self._stored(index)
            stored[row, :, : layer.shape[1]] = self._graph.to_cache(index, layer)
            self._restore(index, stored)

    def copy_rows(self, targets: Sequence[int], sources: Sequence[int], length: int) -> None:
        """Copy the first ``length`` positions of rows onto others, all at once."""
        for index in range(len(self._values)):
            stored = self._stored(index)
            stored[list(targets), :, :length] = stored[list(sources), :, :length]
            self._restore(index, stored)

    def release(self) -> None:
        """Let go of the buffers."""
        self._values, self._arrays, self.capacity = [], [], 0

    def _stored(self, index: int) -> NDArray[Any]:
        if self._memory.on_host:
            return self._arrays[index]
        return self._memory.read(self._values[index], self._graph.cache)

    def _restore(self, index: int, stored: NDArray[Any]) -> None:
        if not self._memory.on_host:
            self._values[index] = self._memory.place(stored, self._graph.cache)
            self.version += 1


class GrowingCache:
    """Keys and values of one sequence, which each step makes anew, longer by its tokens.

    What was present in one step is past in the next, without a copy: the tensors stay where
    the provider put them. Rolling back is a copy of what is left.
    """

    def __init__(self, graph: DecoderGraph, memory: Memory) -> None:
        self._graph = graph
        self._memory = memory
        shape = (1, graph.kv_heads, 0, graph.head_size)
        # Of no elements, it lies on the host wherever the rest does.
        self._empty = memory.host.place(np.empty(shape, graph.cache.storage), graph.cache)
        self._values = [self._empty] * len(graph.past)

    def bind(self, binding: Any) -> None:
        """Bind the tensors as past, and ask for new ones as present."""
        memory = self._memory
        for past, present, value in zip(
            self._graph.past, self._graph.present, self._values, strict=True
        ):
            binding.bind_ortvalue_input(past, value)
            binding.bind_output(present, memory.device_type, memory.device_id)

    def take(self, values: Sequence[Any]) -> None:
        """Keep a step's present as the next step's past."""
        self._values = list(values)

    def read(self) -> list[FloatArray]:
        """Copies of the keys and values, each (kv_heads, length, head_size)."""
        element = self._graph.cache
        return [element.to_float32(self._memory.read(value, element)[0]) for value in self._values]

    def write(self, layers: Sequence[FloatArray]) -> None:
        """Set the keys and values, as `read` gives them."""
        element = self._graph.cache
        self._values = [
            self._memory.place(
                np.ascontiguousarray(element.from_float32(np.array(layer))[None]), element
            )
            for layer in layers
        ]

    def truncate(self, length: int) -> None:
        """Forget every position from ``length`` on."""
        if length == 0:
            self._values = [self._empty] * len(self._values)
            return
        element = self._graph.cache
        self._values = [
            self._memory.place(
                np.ascontiguousarray(self._memory.read(value, element)[:, :, :length]), element
            )
            for value in self._values
        ]

    def release(self) -> None:
        """Let go of the tensors."""
        self._values = []
