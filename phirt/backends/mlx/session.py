"""Sessions of a decoder of mlx-lm's layers, and the logits that they give."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from phirt.backends.base import BaseSession
from phirt.backends.mlx.memory import check_host_memory, translate
from phirt.errors import BackendRuntimeError, PhirtError
from phirt.protocols import KVCache, KVLayer, Logits, RopeRegime, TopK
from phirt.types import FloatArray

if TYPE_CHECKING:
    from phirt.backends.mlx.model import MlxModel

__all__ = ["MlxLogits", "MlxSession"]

# Tokens per forward pass. Bounds what a prompt needs beside the cache, as in mlx-lm; the
# scores of attention are the largest part, and this many times the context.
_CHUNK = 1024
# From how many tokens on the layers of a pass are computed one by one, so that it can be
# interrupted between two of them. A shorter pass is a step's work, and would only be slowed.
_INTERRUPTIBLE = 16
_BUCKET = 256  # tokens; mlx-lm's caches grow by it


class MlxLogits:
    """Logits on the device.

    Args:
        model: Whose thread and device they belong to.
        values: Shape (n, vocab), float32, computed.
    """

    __slots__ = ("_model", "_values")

    def __init__(self, model: MlxModel, values: Any) -> None:
        self._model = model
        self._values = values

    def numpy(self) -> FloatArray:
        """A copy on the host, shape (n, vocab)."""
        return self._model.run(lambda: np.array(self._values))

    def top(self, k: int) -> TopK:
        """The k largest logits of each position, chosen on the device."""
        vocab_size = self._values.shape[1]
        if not 1 <= k <= vocab_size:
            raise ValueError(f"k={k} must be from 1 to the vocabulary's size, {vocab_size}")
        ids, values, total = self._model.run(lambda: self._top(k))
        order = np.lexsort((ids, -values), axis=1)
        ids, values = (np.take_along_axis(array, order, axis=1) for array in (ids, values))
        return TopK(ids.astype(np.int64), values, total)

    def _top(self, k: int) -> tuple[Any, FloatArray, FloatArray]:
        mx, logits = self._model.target.mx, self._values
        ids = mx.argpartition(-logits, k - 1, axis=1)[:, :k]
        chosen = mx.take_along_axis(logits, ids, axis=1)
        total = mx.logsumexp(logits, axis=1)
        mx.eval(ids, chosen, total)
        return np.array(ids), np.array(chosen), np.array(total)


class MlxSession(BaseSession):
    """One sequence: a cache of mlx-lm's for every layer, always of the whole sequence.

    Layers with a window keep it too and mask the rest, so that any length can be gone back
    to; mlx-lm's rolling caches cannot once they are full.

    Attributes:
        caches: One of mlx-lm's for every layer.
    """

    def __init__(self, model: MlxModel, *, max_length: int, expected_length: int) -> None:
        super().__init__(model, max_length=max_length)
        self._model = model
        self._interrupted = threading.Event()
        self.caches = model.cache_format.new(model.config.num_layers)
        self._check_memory(min(expected_length, max_length), "starting a session")

    @property
    def regime(self) -> RopeRegime | None:
        """Which of LongRoPE's factors it uses."""
        return self._regime

    def _append(self, token_ids: Sequence[int], *, every_position: bool) -> Logits:
        model, mx = self._model, self._model.target.mx
        model.check_tokens(token_ids)
        rows = []
        try:
            with model.target.active():
                for start in range(0, len(token_ids), _CHUNK):
                    part = token_ids[start : start + _CHUNK]
                    is_last = start + len(part) == len(token_ids)
                    logits = self._forward(part, every_position=every_position)
                    if every_position or is_last:
                        mx.eval(logits)
                        rows.append(logits)
                    # What grew lazily over many steps would be computed, and held, at once.
                    mx.eval([cache.state[:2] for cache in self.caches])
                logits = rows[0] if len(rows) == 1 else mx.concatenate(rows)
                mx.eval(logits)
        except PhirtError:
            raise
        except Exception as error:
            raise translate(error, f"running {len(token_ids)} tokens") from error
        return MlxLogits(model, logits)

    def _forward(self, token_ids: Sequence[int], *, every_position: bool) -> Any:
        count = len(token_ids)
        self._check_memory(count, f"running {count} tokens", logits=count if every_position else 1)
        self._end_if_interrupted()
        return self._model.loaded_decoder.forward(
            token_ids,
            self.caches,
            regime=self._regime,
            every_position=every_position,
            between_layers=self._end_if_interrupted if count >= _INTERRUPTIBLE else None,
        )

    def _end_if_interrupted(self) -> None:
        if self._interrupted.is_set():
            raise BackendRuntimeError("The session was interrupted.")

    def _check_memory(self, count: int, doing: str, *, logits: int = 0) -> None:
        """Refuse what would not fit in the host's memory; see `check_host_memory`."""
        if not self._model.target.is_host or (count == 1 and self._held() % _BUCKET):
            return  # A step within the cache's room needs next to nothing.
        config, total = self._model.config, self._held() + count
        values = 2 * config.num_layers * config.num_kv_heads * config.head_size
        kept = self._model.cache_format.bytes_per_value * values * (count + _BUCKET)
        rows = min(count, _CHUNK)
        scores = config.num_heads * rows * total
        width = 4 * config.hidden_size + 3 * config.intermediate_size
        work = 4 * (scores + rows * width + logits * config.vocab_size)
        check_host_memory(int(kept) + work, doing)

    def _held(self) -> int:
        # Not the session's length, which is that before the call.
        return int(self.caches[0].offset)

    def _truncate(self, length: int) -> None:
        for cache in self.caches:
            cache.trim(cache.offset - length)

    def _export_kv(self) -> Sequence[KVLayer]:
        with self._model.target.active():
            return [
                KVLayer(0, self._to_host(cache.keys), self._to_host(cache.values))
                for cache in self.caches
            ]

    def _to_host(self, array: Any) -> FloatArray:
        values = self._model.cache_format.read(array, self._length)
        return np.array(values.astype(self._model.target.mx.float32))

    def _import_kv(self, cache: KVCache) -> None:
        config, mx = self._model.config, self._model.target.mx
        shape = (config.num_kv_heads, cache.length, config.head_size)
        if len(cache.layers) != config.num_layers:
            raise ValueError(
                f"The cache has {len(cache.layers)} layers, the model {config.num_layers}."
            )
        for layer in cache.layers:
            if layer.start or layer.key.shape != shape or layer.value.shape != shape:
                raise ValueError(
                    f"A layer of the cache holds {layer.key.shape} from position {layer.start} "
                    f"on; this session needs {shape} from 0. Prefill the tokens instead."
                )
        self._check_memory(cache.length, f"taking over {cache.length} tokens")
        dtype, form = self._model.loaded_decoder.dtype, self._model.cache_format
        try:
            with self._model.target.active():
                for own, layer in zip(self.caches, cache.layers, strict=True):
                    own.keys = form.stored(mx.array(layer.key).astype(dtype))
                    own.values = form.stored(mx.array(layer.value).astype(dtype))
                    own.offset = cache.length
                mx.eval([own.state[:2] for own in self.caches])
        except Exception as error:
            raise translate(error, f"taking over {cache.length} tokens") from error

    def _interrupt(self) -> None:
        self._interrupted.set()

    def _free(self) -> None:
        self.caches = []
        self._model.target.mx.clear_cache()
