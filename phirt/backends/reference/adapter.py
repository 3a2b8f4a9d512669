"""The reference: every dense decoder in NumPy, float32, with every capability.

It needs no runtime, answers the same on every machine, and is slow: it is for tests,
doctests and examples, and for judging other backends. The formulas are in
`phirt.backends.reference.decoder`; this file makes a backend of them.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar

import numpy as np

from phirt.backends.base import BaseModel, BaseSession, HostLogits
from phirt.backends.execution import Parallel
from phirt.backends.kv_precision import check_kv_precision
from phirt.backends.pool import PoolRow, SeparatePool
from phirt.backends.reference.decoder import Cache, Decoder, Weights
from phirt.backends.reference.weights import read_weights
from phirt.devices.names import DeviceName
from phirt.errors import (
    BackendRuntimeError,
    DeviceNotAvailableError,
    ModelError,
    ModelFormatError,
    OutOfMemoryError,
    UnsupportedModelError,
)
from phirt.models.decoder_config import DecoderConfig
from phirt.models.folder import read_folder
from phirt.models.huggingface_config import read_decoder_config
from phirt.protocols import (
    Accept,
    Availability,
    Capabilities,
    KVCache,
    KVLayer,
    LoadOptions,
    Logits,
    ModelInfo,
    Placement,
    Reject,
    Session,
)
from phirt.types import Artifact, FloatArray, Hardware

__all__ = ["ReferenceBackend"]

_NAME = "reference"
_FORMAT = "safetensors"
_CHUNK = 256  # tokens per forward pass; bounds the attention scores to _CHUNK x context


class ReferenceBackend:
    """Adapter to the decoder in NumPy, on the CPU."""

    name: ClassVar[str] = _NAME
    formats: ClassVar[tuple[str, ...]] = (_FORMAT,)
    kv_precisions: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType({})

    def probe(self) -> list[Availability]:
        """NumPy is a dependency of phirt's own, so it is always there."""
        version = f"numpy {np.__version__}"
        hardware = Hardware(native="NumPy")
        return [Availability("cpu", "ran", version, version=version, hardware=hardware)]

    def accepts(self, artifact: Artifact, device: str) -> Accept | Reject:
        """Accepts safetensors folders of the dense architectures on the CPU."""
        if not DeviceName.parse(device).is_one_of(["cpu"]):
            return Reject(f"the reference runs on the CPU, not on {device!r}", 'Pass device="cpu".')
        if artifact.format != _FORMAT:
            return Reject(
                f"the reference reads safetensors folders, not {artifact.format!r}",
                "Give it the checkpoint that the model was made from.",
            )
        try:
            read_decoder_config(artifact.path / "config.json")
        except ModelFormatError:
            pass  # The model is at fault, and not the backend: loading says so.
        except ModelError as error:
            return Reject(str(error))
        return Accept()

    def load(self, artifact: Artifact, device: str, options: LoadOptions) -> ReferenceModel:
        """Read the weights into memory, as float32.

        NumPy takes its number of threads from the environment when it is imported, so
        ``options.threads`` and ``options.spinning`` have nothing to act on.

        Raises:
            ValueError: ``options.extra`` is not empty: there is nothing to set.
            ModelFormatError: The folder's files are damaged.
            UnsafeModelError: A file reaches outside the folder.
            DeviceNotAvailableError: ``device`` is not ``"cpu"``.
            UnsupportedModelError: The decoder is none that phirt knows.
            OutOfMemoryError: The weights do not fit.
        """
        check_kv_precision(self, device, options)
        if options.extra:
            raise ValueError(f"The reference has no settings, and was given {dict(options.extra)}.")
        if not DeviceName.parse(device).is_one_of(["cpu"]):
            raise DeviceNotAvailableError(
                f'The reference runs on the CPU, not on {device!r}. Pass device="cpu".'
            )
        verdict = self.accepts(artifact, device)
        if isinstance(verdict, Reject):
            raise UnsupportedModelError(f"{artifact.path}: {verdict.reason.rstrip('.')}.")
        folder = read_folder(artifact.path, name=artifact.name, formats=self.formats)
        config = read_decoder_config(artifact.path / "config.json")
        weights = read_weights(artifact.path, config)
        return ReferenceModel(config, weights, folder.artifact.weights_id)


class ReferenceModel(BaseModel):
    """A `Decoder` as a `phirt.protocols.LoadedModel`."""

    def __init__(self, config: DecoderConfig, weights: Weights, weights_id: str) -> None:
        self.decoder: Decoder | None = Decoder(config, weights)
        self.config = config
        super().__init__(
            info=ModelInfo(
                vocab_size=config.vocab_size,
                context_length=config.context_length,
                eos_token_ids=frozenset(config.eos_token_ids),
                weights_id=weights_id,
                rope_boundary=config.rope.boundary,
                window=config.window,
            ),
            capabilities=Capabilities(
                truncate=True, verify=True, interrupt=True, kv=True, batch=True, topk=True
            ),
            execution=Parallel(),
        )

    def placement(self) -> Placement:
        """The CPU: NumPy knows no other place."""
        return Placement(device="cpu", provider="NumPy")

    def _new_session(self, *, max_length: int, expected_length: int) -> ReferenceSession:
        return ReferenceSession(self, max_length=max_length, expected_length=expected_length)

    def _new_pool(self, *, slots: int, capacity: int, expected_length: int) -> ReferencePool:
        return ReferencePool(self, slots=slots, capacity=capacity, expected_length=expected_length)

    def _unload(self) -> None:
        self.decoder = None


class ReferenceSession(BaseSession):
    """One sequence and its `Cache`."""

    def __init__(self, model: ReferenceModel, *, max_length: int, expected_length: int) -> None:
        super().__init__(model, max_length=max_length)
        assert model.decoder is not None  # noqa: S101 - the weights stay while a session is open
        self._decoder: Decoder | None = model.decoder
        self._config = model.config
        self._interrupted = threading.Event()
        self._cache: Cache | None = None
        self.reserve(min(expected_length, max_length))

    @property
    def capacity(self) -> int:
        """Tokens that there is room for."""
        return self._cache.capacity if self._cache else 0

    def reserve(self, length: int) -> None:
        """Make room for ``length`` tokens."""
        try:
            if self._cache is None:
                self._cache = Cache(self._config, self._regime, length)
            self._cache.reserve(length)
        except MemoryError as error:
            raise OutOfMemoryError(
                f"Out of memory while allocating a KV cache for {length} tokens. Ask for fewer."
            ) from error

    def become(self, layers: Sequence[KVLayer], length: int) -> None:
        """Hold these keys and values instead of what was held."""
        self.reserve(length)
        assert self._cache is not None  # noqa: S101 - reserve made it
        for index, layer in enumerate(layers):
            self._cache.append(index, 0, layer.key, layer.value)
        self._length = length

    def _append(self, token_ids: Sequence[int], *, every_position: bool) -> Logits:
        vocab = self._info.vocab_size
        if not all(0 <= token < vocab for token in token_ids):
            raise ValueError(f"Token ids must be from 0 to {vocab - 1}, not {list(token_ids)}.")
        decoder, cache = self._decoder, self._cache
        assert decoder is not None  # noqa: S101 - the session is open
        assert cache is not None  # noqa: S101 - likewise
        self.reserve(self._length + len(token_ids))
        hidden: list[FloatArray] = []
        # What is not finite reaches the caller as it is; the loop refuses it.
        with np.errstate(over="ignore", invalid="ignore"):
            for first in range(0, len(token_ids), _CHUNK):
                part = token_ids[first : first + _CHUNK]
                hidden.append(
                    decoder.forward(
                        part, cache, self._length + first, before_layer=self._end_if_interrupted
                    )
                )
            rows = np.concatenate(hidden) if every_position else hidden[-1][-1:]
            return HostLogits(decoder.logits(rows))

    def _end_if_interrupted(self) -> None:
        if self._interrupted.is_set():
            raise BackendRuntimeError("The call was interrupted.")

    def _interrupt(self) -> None:
        self._interrupted.set()

    def _truncate(self, length: int) -> None:
        """Nothing to do: what lies beyond the length is never read, and is overwritten."""

    def _export_kv(self) -> Sequence[KVLayer]:
        return self._cache.copy(self._length) if self._cache else []

    def _import_kv(self, cache: KVCache) -> None:
        config = self._config
        shape = (config.num_kv_heads, cache.length, config.head_size)
        fits = [
            layer.start == 0 and layer.key.shape == layer.value.shape == shape
            for layer in cache.layers
        ]
        if len(fits) != config.num_layers or not all(fits):
            raise ValueError(
                f"The cache does not fit: the reference needs {config.num_layers} layers of shape "
                f"{shape} from position 0 on."
            )
        self.become(cache.layers, cache.length)

    def _free(self) -> None:
        self._cache = self._decoder = None


class ReferencePool(SeparatePool["_Row"]):
    """Sessions that are decoded together, one after the other: rows cannot disturb each other."""

    def __init__(
        self, model: ReferenceModel, *, slots: int, capacity: int, expected_length: int
    ) -> None:
        super().__init__(
            model.execution, slots=slots, capacity=capacity, expected_length=expected_length
        )
        self._model = model

    def decode(self, sessions: Sequence[Session], token_ids: Sequence[int]) -> Logits:
        """Append one token to each of several sessions; one row of logits for each."""
        rows = self._ready(sessions, token_ids)
        logits = [row.decode(token) for row, token in zip(rows, token_ids, strict=True)]
        return HostLogits(np.concatenate([one.numpy() for one in logits]))

    def reorder(self, sessions: Sequence[Session], sources: Sequence[Session]) -> None:
        """Make each session a copy of its source, all at once."""
        # All copies are taken before the first is written: a source may be overwritten too.
        copies = [
            (row, source.export_kv().layers, source.length)
            for row, source in self._copies(sessions, sources)
        ]
        for row, layers, length in copies:
            row.become(layers, length)

    def grow(self, capacity: int) -> None:
        """Give every row room for ``capacity`` tokens."""
        super().grow(capacity)
        for row in self._held():
            row.reserve(capacity)

    def _new_row(self) -> _Row:
        return _Row(self._model, max_length=self._limit, expected_length=self._capacity)


class _Row(PoolRow, ReferenceSession):
    """A session that takes part in the steps of its pool."""
