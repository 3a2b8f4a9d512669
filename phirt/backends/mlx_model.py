"""A decoder of mlx-lm's layers as a loaded model, and its sessions."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import numpy as np

from phirt.backends.base import BaseModel, BaseSession
from phirt.backends.execution import OneThread
from phirt.backends.mlx_memory import check_host_memory, translate
from phirt.backends.mlx_modules import Decoder, import_model_module
from phirt.errors import BackendRuntimeError, DevicePlacementError, PhirtError
from phirt.models.decoder_config import DecoderConfig
from phirt.protocols import (
    Capabilities,
    KVCache,
    KVLayer,
    Lack,
    Logits,
    ModelInfo,
    Placement,
    TopK,
)
from phirt.types import FloatArray

__all__ = ["MlxModel", "MlxTarget"]

_T = TypeVar("_T")

# Tokens per forward pass. Bounds what a prompt needs beside the cache, as in mlx-lm; the
# scores of attention are the largest part, and this many times the context.
_CHUNK = 1024
# From how many tokens on the layers of a pass are computed one by one, so that it can be
# interrupted between two of them. A shorter pass is a step's work, and would only be slowed.
_INTERRUPTIBLE = 16
_BUCKET = 256  # tokens; mlx-lm's caches grow by it

_CAPABILITIES = Capabilities(
    truncate=True,
    verify=True,
    interrupt=True,
    kv=True,
    topk=True,
    lacks={"batch": Lack("not yet", "phirt gives MLX one sequence at a time so far")},
)


class MlxTarget:
    """A device of MLX's.

    Args:
        mx: The module ``mlx.core``.
        name: The device in phirt's words.
        device: The device in MLX's.
    """

    def __init__(self, mx: Any, name: str, device: Any) -> None:
        self.mx = mx
        self.name = name
        self.device = device

    @property
    def is_host(self) -> bool:
        """Whether it is the CPU."""
        return bool(self.device.type == self.mx.cpu)

    def active(self) -> AbstractContextManager[Any]:
        """While it lasts, operations that name no device run on this one.

        MLX's default device is one for the whole process, so it is left alone where it is
        the right one already.
        """
        if self.mx.default_device() == self.device:
            return nullcontext()
        context: AbstractContextManager[Any] = self.mx.stream(self.device)
        return context

    def placement(self) -> Placement:
        """Where an operation goes now, by MLX's own account.

        Raises:
            DevicePlacementError: It is another device.
        """
        with self.active():
            device = self.mx.default_stream(self.mx.default_device()).device
        if device != self.device:
            raise DevicePlacementError(
                f"Device {self.name!r} was asked for, but MLX computes on {device}."
            )
        return Placement(device=self.name, provider=str(device))


class MlxModel(BaseModel):
    """A decoder on one device, and the thread that everything of it runs on.

    Args:
        target: The device.
        config: Shape and constants.
        build: Makes the decoder; called on the model's thread.
        weights_id: Identifies the weights.
        eos_token_ids: Stop ids that the folder names.
    """

    def __init__(
        self,
        target: MlxTarget,
        config: DecoderConfig,
        build: Callable[[], Decoder],
        *,
        weights_id: str,
        eos_token_ids: frozenset[int],
    ) -> None:
        self.target = target
        self.config = config
        execution = OneThread("phirt-mlx")
        try:
            self.decoder: Decoder | None = execution.run(_on(target, build))
            self._placement = execution.run(target.placement)
        except BaseException:
            execution.close()
            raise
        # A boundary at the end of the context is none: nothing crosses it.
        boundary = config.rope.boundary
        crossed = boundary is not None and boundary < config.context_length
        super().__init__(
            info=ModelInfo(
                vocab_size=config.vocab_size,
                context_length=config.context_length,
                eos_token_ids=eos_token_ids,
                weights_id=weights_id,
                rope_boundary=boundary if crossed else None,
                window=config.window,
            ),
            capabilities=_CAPABILITIES,
            # An array belongs to the streams of the thread that made it.
            execution=execution,
            native=self.decoder,
        )

    def placement(self) -> Placement:
        """The device that MLX named on the model's thread, after the weights were there."""
        return self._placement

    def run(self, call: Callable[[], _T]) -> _T:
        """Run a call on the model's thread and device."""
        return self.execution.run(_on(self.target, call))

    def _new_session(self, *, max_length: int, expected_length: int) -> MlxSession:
        return MlxSession(self, max_length=max_length, expected_length=expected_length)

    def _unload(self) -> None:
        self.decoder = None
        self.target.mx.clear_cache()
        # Each has a thread of its own, which would outlive the model's.
        self.target.mx.clear_streams()


def _on(target: MlxTarget, call: Callable[[], _T]) -> Callable[[], _T]:
    def run() -> _T:
        with target.active():
            return call()

    return run


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
    """

    def __init__(self, model: MlxModel, *, max_length: int, expected_length: int) -> None:
        super().__init__(model, max_length=max_length)
        self._model = model
        self._interrupted = threading.Event()
        caches = import_model_module("cache")
        self._caches = [caches.KVCache() for _ in range(model.config.num_layers)]
        self._check_memory(min(expected_length, max_length), "starting a session")

    def _append(self, token_ids: Sequence[int], *, every_position: bool) -> Logits:
        model, mx = self._model, self._model.target.mx
        vocab_size = self._info.vocab_size
        if not all(0 <= token < vocab_size for token in token_ids):
            # MLX would read beyond the embedding.
            raise ValueError(f"Token ids must be from 0 to {vocab_size - 1:,}.")
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
                    mx.eval([cache.state[:2] for cache in self._caches])
                logits = rows[0] if len(rows) == 1 else mx.concatenate(rows)
                mx.eval(logits)
        except PhirtError:
            raise
        except Exception as error:
            raise translate(error, f"running {len(token_ids)} tokens") from error
        return MlxLogits(model, logits)

    def _forward(self, token_ids: Sequence[int], *, every_position: bool) -> Any:
        decoder = self._model.decoder
        assert decoder is not None  # noqa: S101 - the weights stay while a session is open
        count = len(token_ids)
        self._check_memory(count, f"running {count} tokens", logits=count if every_position else 1)
        self._end_if_interrupted()
        return decoder.forward(
            token_ids,
            self._caches,
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
        kept = 2 * config.num_layers * config.num_kv_heads * config.head_size * (count + _BUCKET)
        rows = min(count, _CHUNK)
        scores = config.num_heads * rows * total
        width = 4 * config.hidden_size + 3 * config.intermediate_size
        check_host_memory(4 * (kept + scores + rows * width + logits * config.vocab_size), doing)

    def _held(self) -> int:
        # Not the session's length, which is that before the call.
        return int(self._caches[0].offset)

    def _truncate(self, length: int) -> None:
        for cache in self._caches:
            cache.trim(cache.offset - length)

    def _export_kv(self) -> Sequence[KVLayer]:
        with self._model.target.active():
            return [
                KVLayer(0, self._to_host(cache.keys), self._to_host(cache.values))
                for cache in self._caches
            ]

    def _to_host(self, array: Any) -> FloatArray:
        values = array[0, :, : self._length].astype(self._model.target.mx.float32)
        return np.array(values)

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
        decoder = self._model.decoder
        assert decoder is not None  # noqa: S101 - as in _forward
        try:
            with self._model.target.active():
                for own, layer in zip(self._caches, cache.layers, strict=True):
                    own.keys = mx.array(layer.key)[None].astype(decoder.dtype)
                    own.values = mx.array(layer.value)[None].astype(decoder.dtype)
                    own.offset = cache.length
                mx.eval([own.state[:2] for own in self._caches])
        except Exception as error:
            raise translate(error, f"taking over {cache.length} tokens") from error

    def _interrupt(self) -> None:
        self._interrupted.set()

    def _free(self) -> None:
        self._caches = []
        self._model.target.mx.clear_cache()
