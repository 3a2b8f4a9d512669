"""The KV cache that phirt gives to transformers: buffers that grow in buckets.

transformers' own dynamic cache copies every key and value of every layer at each step, and
drops what a sliding window has passed, so that it cannot be rolled back. Here a step writes
one row into a buffer, every layer keeps all positions (the attention mask, which transformers
makes from the configuration, hides those beyond a window), and rolling back is setting a
length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any

import numpy as np

from phirt.protocols import KVCache, KVLayer

__all__ = ["InterruptedRun", "LayerShape", "SessionCache"]

_BUCKET = 256  # tokens; buffers are allocated in multiples of it


class InterruptedRun(Exception):  # noqa: N818 - not an error: the caller asked for it
    """A forward pass was ended between two layers."""


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one decoder layer caches, as a forward pass showed it.

    Attributes:
        heads: Key and value heads.
        key_size: Width of a key.
        value_size: Width of a value.
        dtype: The torch dtype of both.
        device: The torch device of both.
    """

    heads: int
    key_size: int
    value_size: int
    dtype: Any
    device: Any

    @classmethod
    def of(cls, layer: Any) -> LayerShape:
        """The shape of a layer of transformers' own cache that has been written to."""
        keys, values = layer.keys, layer.values
        return cls(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, keys.device)


class _LayerBuffer:
    """Keys and values of one layer, with the interface of transformers' cache layers.

    It is registered as a virtual subclass of transformers' ``CacheLayerMixin``, whose module
    cannot be imported here.
    """

    # What transformers' cache and masks ask of a layer.
    is_sliding = False  # The buffer holds every position; the mask applies the window.
    is_compileable = False
    is_croppable = True
    supports_early_init = False
    is_initialized = True

    def __init__(self, torch: Any, shape: LayerShape, interrupted: Event) -> None:
        self._torch = torch
        self._shape = shape
        self._interrupted = interrupted
        self.length = 0
        self._allocate(0)

    @property
    def keys(self) -> Any:
        """The keys of all positions, shape (1, heads, length, key_size)."""
        return self._keys[:, :, : self.length]

    @property
    def values(self) -> Any:
        """The values of all positions, shape (1, heads, length, value_size)."""
        return self._values[:, :, : self.length]

    def update(
        self,
        key_states: Any,
        value_states: Any,
        *_args: object,
        **_kwargs: object,  # what only other kinds of layers need
    ) -> tuple[Any, Any]:
        """Append positions, and return those of the whole sequence."""
        if self._interrupted.is_set():
            raise InterruptedRun
        start, self.length = self.length, self.length + key_states.shape[2]
        self._keys[:, :, start : self.length] = key_states
        self._values[:, :, start : self.length] = value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Positions held."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Positions that the attention sees with ``query_length`` more, and the first of them."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """No limit of its own."""
        return -1

    def resize(self, capacity: int) -> None:
        """Move to a buffer for ``capacity`` positions."""
        keys, values = self.keys, self.values
        self._allocate(capacity)
        self._keys[:, :, : self.length] = keys
        self._values[:, :, : self.length] = values

    def _allocate(self, capacity: int) -> None:
        shape, empty = self._shape, self._torch.empty
        place = {"dtype": shape.dtype, "device": shape.device}
        self._keys = empty((1, shape.heads, capacity, shape.key_size), **place)
        self._values = empty((1, shape.heads, capacity, shape.value_size), **place)


class SessionCache:
    """The cache of one session.

    Args:
        torch: The module.
        transformers: The module.
        shapes: What each layer caches.
        max_length: The most tokens that it will ever hold.

    Attributes:
        native: What a forward pass takes as its ``cache``.
        interrupted: Once set, a forward pass ends at its next layer with `InterruptedRun`.
    """

    def __init__(
        self, torch: Any, transformers: Any, shapes: Sequence[LayerShape], *, max_length: int
    ) -> None:
        self._torch = torch
        self._max_length = max_length
        self._capacity = 0
        self.interrupted = Event()
        transformers.cache_utils.CacheLayerMixin.register(_LayerBuffer)
        self._shapes = tuple(shapes)
        self._layers = [_LayerBuffer(torch, shape, self.interrupted) for shape in shapes]
        self.native = transformers.Cache(layers=list(self._layers))

    def reserve(self, length: int) -> None:
        """Have room for ``length`` tokens."""
        if length <= self._capacity:
            return
        wanted = max(length, min(2 * self._capacity, self._capacity + 8 * _BUCKET))
        capacity = min(-(-wanted // _BUCKET) * _BUCKET, self._max_length)
        for layer in self._layers:
            layer.resize(capacity)
        self._capacity = capacity

    def truncate(self, length: int) -> None:
        """Forget what lies beyond; it is overwritten later."""
        for layer in self._layers:
            layer.length = length

    def export(self) -> list[KVLayer]:
        """A copy on the host, in float32."""
        return [
            KVLayer(0, self._to_host(layer.keys), self._to_host(layer.values))
            for layer in self._layers
        ]

    def take_over(self, cache: KVCache) -> None:
        """Write a cache into the empty buffers.

        Raises:
            ValueError: It has other layers, or does not hold every position.
        """
        self._check(cache)
        self.reserve(cache.length)
        self.truncate(0)
        for layer, held in zip(self._layers, cache.layers, strict=True):
            layer.update(*(self._from_host(part) for part in (held.key, held.value)))

    def _check(self, cache: KVCache) -> None:
        if len(cache.layers) != len(self._layers):
            raise ValueError(
                f"The cache has {len(cache.layers)} layers; this model has {len(self._layers)}."
            )
        for index, (shape, held) in enumerate(zip(self._shapes, cache.layers, strict=True)):
            if held.start:
                raise ValueError(
                    f"Layer {index} of the cache begins at position {held.start}; this backend "
                    "needs every position, from 0. Prefill the tokens instead."
                )
            found = (held.key.shape, held.value.shape)
            wanted = (
                (shape.heads, cache.length, shape.key_size),
                (shape.heads, cache.length, shape.value_size),
            )
            if found != wanted:
                raise ValueError(
                    f"Layer {index} of the cache has the shapes {found}; this model's are {wanted}."
                )

    def _to_host(self, tensor: Any) -> Any:
        copy = self._torch.empty(tensor.shape[1:], dtype=self._torch.float32)
        return copy.copy_(tensor[0]).numpy()

    def _from_host(self, array: Any) -> Any:
        return self._torch.from_numpy(np.ascontiguousarray(array, np.float32))[None]
