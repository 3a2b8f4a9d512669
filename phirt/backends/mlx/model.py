"""A decoder of mlx-lm's layers as a loaded model, on its device and its thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from phirt.backends.base import BaseModel
from phirt.backends.execution import OneThread
from phirt.backends.mlx.cache import CacheFormat
from phirt.backends.mlx.decoder import Decoder
from phirt.backends.mlx.memory import translate
from phirt.backends.mlx.pool import MlxPool
from phirt.backends.mlx.session import MlxSession
from phirt.errors import DevicePlacementError, PhirtError
from phirt.models.decoder_config import DecoderConfig
from phirt.protocols import Capabilities, KVPool, Lack, ModelInfo, Placement

__all__ = ["MlxModel", "MlxTarget"]

_T = TypeVar("_T")


def _capabilities(cache_format: CacheFormat) -> Capabilities:
    lacks = {}
    if cache_format.is_quantized:
        reason = "a step would pad rows of 8 bits to one length, which phirt does for floats only"
        lacks["batch"] = Lack("not yet", reason)
    return Capabilities(
        truncate=True,
        verify=True,
        interrupt=True,
        kv=True,
        batch=not lacks,
        topk=True,
        lacks=lacks,
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
                f"Device {self.name!r} was asked for, which is {self.device}, but MLX computes "
                f"100% of a graph on {device}: a stream runs whole graphs."
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
        cache_format: How its sessions keep keys and values.
    """

    def __init__(
        self,
        target: MlxTarget,
        config: DecoderConfig,
        build: Callable[[], Decoder],
        *,
        weights_id: str,
        eos_token_ids: frozenset[int],
        cache_format: CacheFormat,
    ) -> None:
        self.target = target
        self.cache_format = cache_format
        self.config = config
        # MLX asks this of a thread that ends. Without it, a process that exits while the thread
        # is ending may abort. MLX's CPU build (0.32) keeps one native thread of every stream
        # nevertheless, asleep.
        execution = OneThread("phirt-mlx", at_end=target.mx.clear_streams)
        try:
            self.decoder: Decoder | None = execution.run(_on(target, build))
            self._placement = execution.run(target.placement)
            if not target.is_host:
                # A GPU may be named and still fail at the first kernel.
                execution.run(_on(target, self._try_out))
                self._placement = execution.run(target.placement)
        except BaseException:
            execution.close()
            raise
        super().__init__(
            info=ModelInfo(
                vocab_size=config.vocab_size,
                context_length=config.context_length,
                eos_token_ids=eos_token_ids,
                weights_id=weights_id,
                rope_boundary=config.rope.boundary,
                window=config.window,
            ),
            capabilities=_capabilities(cache_format),
            # An array belongs to the streams of the thread that made it.
            execution=execution,
            native=self.decoder,
        )

    def placement(self) -> Placement:
        """The device that MLX named on the model's thread, with the weights there.

        Off the CPU, it was named again after a first result; MLX tells no array's device.
        """
        return self._placement

    @property
    def loaded_decoder(self) -> Decoder:
        """The decoder, which stays while a session is open."""
        assert self.decoder is not None  # noqa: S101 - see above
        return self.decoder

    def check_tokens(self, token_ids: Sequence[int]) -> None:
        """Refuse ids that the embedding has no row for: MLX would read beyond it."""
        vocab_size = self.info.vocab_size
        if not all(0 <= token < vocab_size for token in token_ids):
            raise ValueError(f"Token ids must be from 0 to {vocab_size - 1:,}.")

    def run(self, call: Callable[[], _T]) -> _T:
        """Run a call on the model's thread and device."""
        return self.execution.run(_on(self.target, call))

    def _new_session(self, *, max_length: int, expected_length: int) -> MlxSession:
        return MlxSession(self, max_length=max_length, expected_length=expected_length)

    def _new_pool(self, *, slots: int, capacity: int, expected_length: int) -> KVPool:
        if not self.capabilities.batch:
            return super()._new_pool(
                slots=slots, capacity=capacity, expected_length=expected_length
            )
        return MlxPool(self, slots=slots, capacity=capacity, expected_length=expected_length)

    def _try_out(self) -> None:
        """Compute one token."""
        try:
            logits = self.loaded_decoder.forward(
                [0],
                self.cache_format.new(self.config.num_layers),
                regime=None,
                every_position=False,
            )
            self.target.mx.eval(logits)
        except PhirtError:
            raise
        except Exception as error:
            raise translate(error, "trying the model out on one token") from error

    def _unload(self) -> None:
        self.decoder = None
        self.target.mx.clear_cache()


def _on(target: MlxTarget, call: Callable[[], _T]) -> Callable[[], _T]:
    def run() -> _T:
        with target.active():
            return call()

    return run
