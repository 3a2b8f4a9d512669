"""onnxruntime-genai, used for its model and its KV cache only.

genai's generator appends tokens and gives logits; its search, penalties and sampling stay
switched off, since phirt's own mean the same on every runtime. On DirectML it appends only
once: every later token is then *chosen* by genai, from logits that leave no choice.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from phirt.backends.base import BaseModel, BaseSession, HostLogits, import_runtime
from phirt.backends.distributions import check_single_owner
from phirt.backends.execution import InTurn, Parallel
from phirt.backends.onnxruntime_genai_config import (
    PROVIDERS,
    Provider,
    Settings,
    choose_provider,
    last_token,
    open_config,
)
from phirt.backends.onnxruntime_genai_graph import read_graph_facts
from phirt.devices.names import DeviceName
from phirt.errors import (
    BackendBrokenError,
    BackendNotInstalledError,
    BackendRuntimeError,
    DeviceNotAvailableError,
    DevicePlacementError,
    ModelFormatError,
    OutOfMemoryError,
    UnsupportedModelError,
)
from phirt.models.folder import ModelFolder, read_folder
from phirt.models.genai_config import DecoderSpec
from phirt.models.onnx_safety import check_onnx_files
from phirt.protocols import (
    Accept,
    Availability,
    Capabilities,
    Lack,
    LoadOptions,
    Logits,
    ModelInfo,
    Placement,
    Reject,
)
from phirt.types import Artifact, FloatArray

__all__ = ["OnnxRuntimeGenaiBackend"]

_NAME = "onnxruntime-genai"
_EXTRA = "genai"
_FORMAT = "onnx-genai"
_BUCKET = 256  # tokens; the KV cache is allocated in multiples of it
_CHUNK = 256  # tokens; measured: chunks of 128 to 1,500 take the same processor time
_OUT_OF_MEMORY = re.compile(
    r"bad.?alloc|failed to allocate|(not enough|out of) memory|8007000E", re.IGNORECASE
)
_BAD_GRAPH = re.compile(r"protobuf|invalid (model|graph|argument)|type error", re.IGNORECASE)
_NO_DEVICE = re.compile(
    r"not supported in this build|not been built with|interface not available|devices? matched",
    re.IGNORECASE,
)
# Where genai refuses to append to a cache that is not empty (its SupportsContinuousDecoding).
_APPEND_ONCE_DEVICES = ("directml", "npu")


def _import() -> Any:
    # Read once, when onnxruntime initialises; a user's own setting stands.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    # genai loads the library inside this package, whichever distribution wrote it last.
    check_single_owner("onnxruntime", backend=_NAME)
    og = import_runtime("onnxruntime_genai", backend=_NAME, extra=_EXTRA)
    if os.environ["ORT_DISABLE_TELEMETRY"] == "1":
        og.disable_telemetry_events()
    return og


def _translate(error: Exception, doing: str) -> BackendRuntimeError | OutOfMemoryError:
    """Say in phirt's words what the runtime raised; the caller chains the original."""
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
        return OutOfMemoryError(
            f"Out of memory while {doing}: {_first_line(error)}. Ask for fewer tokens, "
            "or load the model in a smaller precision."
        )
    return BackendRuntimeError(f"onnxruntime-genai failed while {doing}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class OnnxRuntimeGenaiBackend:
    """Adapter to onnxruntime-genai."""

    name: ClassVar[str] = _NAME
    formats: ClassVar[tuple[str, ...]] = (_FORMAT,)

    def probe(self) -> list[Availability]:
        """Which devices the installed build has code for, and plugins have hardware for."""
        try:
            og = _import()
        except BackendNotInstalledError as error:
            return [Availability("cpu", "missing", str(error), f'pip install "phirt[{_EXTRA}]"')]
        except BackendBrokenError as error:
            return [Availability("cpu", "broken", str(error), None)]
        return _devices(og)

    def accepts(self, artifact: Artifact, device: str) -> Accept | Reject:
        """Accepts genai folders on the devices that genai has providers for."""
        try:
            kind = DeviceName.parse(device).kind
        except ValueError as error:
            return Reject(str(error))
        if kind not in PROVIDERS:
            return Reject(
                f"onnxruntime-genai has no execution provider for {device!r}",
                f"Pass one of {', '.join(PROVIDERS)}.",
            )
        if artifact.format != _FORMAT:
            return Reject(
                f"onnxruntime-genai reads folders with a genai_config.json, not {artifact.format!r}"
            )
        return Accept()

    def load(self, artifact: Artifact, device: str, options: LoadOptions) -> GenaiModel:
        """Put the weights on the device.

        Raises:
            BackendNotInstalledError: onnxruntime-genai is not installed.
            BackendBrokenError: It is installed and does not import, or a plugin does not load.
            BackendRuntimeError: The device's provider does not start.
            ModelFormatError: The folder's files are damaged.
            UnsafeModelError: A file reaches outside the folder.
            OutOfMemoryError: The weights do not fit.
            DevicePlacementError: The graph runs elsewhere than on ``device``.
            ValueError: ``options.extra`` has a setting that does not exist.
        """
        og = _import()
        folder = read_folder(artifact.path, formats=self.formats)
        spec, model_path = folder.decoder, folder.model_path
        if spec is None or model_path is None:
            raise UnsupportedModelError(f"{artifact.path} has no genai_config.json.")
        check_onnx_files(artifact.path, spec.filename)
        return GenaiModel(
            og,
            folder,
            spec=spec,
            model_path=model_path,
            device=DeviceName.parse(device),
            options=options,
        )


def _devices(og: Any) -> list[Availability]:
    """The CPU, and what the installed build and plugins have code for."""
    named = f"{getattr(og, '__id__', _NAME)} {og.__version__}"
    found = [Availability("cpu", "found", named)]
    for device, providers in PROVIDERS.items():
        provider = next((p for p in providers if p.is_installed(og)), None)
        if device != "cpu" and provider is not None:
            by = f" and {provider.plugin}" if provider.plugin else ""
            reason = f"{named}{by}; whether the hardware answers shows at a load"
            found.append(Availability(device, "found", reason))
    return found


class GenaiModel(BaseModel):
    """An ``og.Model``."""

    def __init__(
        self,
        og: Any,
        folder: ModelFolder,
        *,
        spec: DecoderSpec,
        model_path: Path,
        device: DeviceName,
        options: LoadOptions,
    ) -> None:
        settings = Settings.read(options.extra)
        provider = choose_provider(og, device, settings)
        self.og = og
        self.spec = spec
        self.append_once = (
            device.kind in _APPEND_ONCE_DEVICES
            if settings.append_once is None
            else settings.append_once
        )
        # genai's binding holds the interpreter's lock during a call. On the CPU, where a prefill
        # takes seconds, other threads (and an interruption) get their turn between chunks.
        self.appends_in_chunks = device.kind == "cpu" and not self.append_once
        self.last_token = last_token(spec)
        with open_config(
            og, spec, model_path, device=device, provider=provider, options=options
        ) as config:
            self.native = _open(og, config, model_path, device)
        self._placement, last_only = self._try_out(device, provider)
        super().__init__(
            info=_info(folder, spec, model_path),
            capabilities=_capabilities(
                append_once=self.append_once,
                interrupt=self.appends_in_chunks,
                last_only=last_only,
            ),
            # One command queue or stream serves all generators of a device other than the CPU.
            execution=Parallel() if device.kind == "cpu" else InTurn(),
            native=self.native,
        )

    def placement(self) -> Placement:
        """Which execution provider ran how many nodes, by onnxruntime's profile of one run."""
        return self._placement

    def new_generator(self, max_length: int) -> Any:
        """A generator with a KV cache for ``max_length`` tokens, and every choice neutral."""
        parameters = self.og.GeneratorParams(self.native)
        parameters.set_search_options(
            max_length=max_length,
            min_length=0,
            batch_size=1,
            num_beams=1,
            do_sample=False,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
        )
        return self.og.Generator(self.native, parameters)

    def _try_out(self, device: DeviceName, provider: Provider) -> tuple[Placement, bool]:
        """Run two tokens, and read what ran where and for how many positions."""
        with tempfile.TemporaryDirectory(
            prefix="phirt-genai-", ignore_cleanup_errors=True
        ) as scratch:
            try:
                generator = self.new_generator(min(_BUCKET, self.spec.context_length))
                generator.set_runtime_option("enable_profiling", f"{scratch}/run")
                generator.append_tokens(np.zeros(2, np.int32))
                logits = generator.get_output(self.spec.logits)
            except Exception as error:
                raise _translate(error, f"running the model on '{device}'") from error
            nodes = _count_nodes(Path(scratch))
        if nodes and provider.execution_provider not in nodes:
            raise DevicePlacementError(
                f"Device '{device}' was asked for ({provider.execution_provider}), but every "
                f"node runs on {', '.join(nodes)}."
            )
        placement = Placement(device=str(device), provider=provider.execution_provider, nodes=nodes)
        return placement, logits.shape[1] == 1

    def _new_session(self, *, max_length: int, expected_length: int) -> GenaiSession:
        return GenaiSession(self, max_length=max_length, expected_length=expected_length)

    def _unload(self) -> None:
        self.native = None


def _open(og: Any, config: Any, model_path: Path, device: DeviceName) -> Any:
    try:
        return og.Model(config)
    except Exception as error:
        if _NO_DEVICE.search(str(error)):
            raise DeviceNotAvailableError(
                f"Device '{device}' is not available to backend {_NAME!r}: {_first_line(error)} "
                f'Install the build or plugin that serves it, or pass device="cpu".'
            ) from error
        if _BAD_GRAPH.search(str(error)):
            raise ModelFormatError(
                f"onnxruntime-genai cannot read {model_path}: {_first_line(error)}"
            ) from error
        raise _translate(error, f"loading {model_path} on '{device}'") from error


def _info(folder: ModelFolder, spec: DecoderSpec, model_path: Path) -> ModelInfo:
    graph = read_graph_facts(model_path)
    window = folder.facts.window or spec.window
    context_length = spec.context_length
    if window is not None and not graph.masks_window:
        # Model Builder leaves mistral's window to a rolling cache, which genai does not have
        # on every device and fills wrongly on the CPU. Up to the window there is no difference.
        context_length = min(context_length, window)
    return ModelInfo(
        vocab_size=spec.vocab_size,
        context_length=context_length,
        eos_token_ids=frozenset(folder.facts.eos_token_ids),
        weights_id=folder.artifact.weights_id,
        rope_boundary=folder.facts.rope_boundary or graph.rope_boundary,
        window=window,
    )


def _capabilities(*, append_once: bool, interrupt: bool, last_only: bool) -> Capabilities:
    lacks = {
        "kv": Lack("never", "genai gives out copies of keys and values, and takes none in"),
        "batch": Lack("never", "rows of one generator share their length"),
        "topk": Lack("never", "genai copies all logits to the host"),
    }
    if not interrupt:
        lacks["interrupt"] = Lack(
            "this version", "its Python binding holds the interpreter's lock during every call"
        )
    if last_only:
        lacks["verify"] = Lack("never", "the graph computes the logits of the last position only")
    elif append_once:
        lacks["verify"] = Lack("never", "on this device genai appends tokens only once")
    return Capabilities(
        truncate=True, verify="verify" not in lacks, interrupt=interrupt, lacks=lacks
    )


def _count_nodes(folder: Path) -> dict[str, int]:
    """Nodes per execution provider, of the profile in a folder; empty if there is none."""
    nodes: Counter[str] = Counter()
    for file in folder.iterdir():
        try:
            events = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            return {}
        for event in events:
            provider = event.get("args", {}).get("provider")
            if event.get("cat") == "Node" and provider:
                nodes[provider] += 1
    return dict(nodes)


class GenaiSession(BaseSession):
    """A generator, replaced by a larger one where the sequence outgrows it.

    genai allocates the KV cache when a generator is made, and cannot grow it. So a longer
    sequence takes a new generator of twice the size and one prefill of all its tokens.
    """

    def __init__(self, model: GenaiModel, *, max_length: int, expected_length: int) -> None:
        super().__init__(model, max_length=max_length)
        self._model = model
        self._generator: Any = None
        self._capacity = 0
        self._only = np.zeros((1, model.info.vocab_size), np.float32)
        try:
            self._allocate(min(expected_length, max_length))
        except BaseException:
            self.close()
            raise

    @property
    def can_extend(self) -> bool:
        """Whether `prefill` may be called on a cache that is not empty."""
        return not self._model.append_once or self._length == 0

    def _append(self, token_ids: Sequence[int], *, every_position: bool) -> Logits:
        tokens = np.array(token_ids, np.int32)
        total = self._length + len(tokens)
        wanted = len(tokens) if every_position else 1
        try:
            if self._can_choose(tokens):
                return HostLogits(self._choose(int(tokens[0])))
            if total > self._capacity or not self.can_extend:
                tokens = np.concatenate([self._held(), tokens])
                self._allocate(total)
            return HostLogits(self._feed(tokens, wanted, every_position=every_position))
        except Exception as error:
            raise _translate(error, f"running {len(tokens)} tokens") from error

    def _feed(self, tokens: NDArray[np.int32], wanted: int, *, every_position: bool) -> FloatArray:
        """Append tokens, and give the logits of the last ``wanted`` of them."""
        rows: list[FloatArray] = []
        for chunk in self._chunks(tokens):
            if self._state == "interrupted":
                raise InterruptedError("interrupted between two chunks of a prefill")
            self._generator.append_tokens(chunk)
            if every_position:
                rows.append(self._generator.get_output(self._model.spec.logits)[0])
        if every_position:
            return np.concatenate(rows, dtype=np.float32)[-wanted:]
        return self._last()

    def _chunks(self, tokens: NDArray[np.int32]) -> list[NDArray[np.int32]]:
        """The tokens of each call to genai, during which no other Python thread can run."""
        if not self._model.appends_in_chunks:
            return [tokens]
        empty = self._generator.token_count() == 0
        # LongRoPE: a shorter first call would take the short rotary factors.
        longest = self._base_boundary() + 1 if empty and self._regime == "long" else 0
        first = max(_CHUNK, longest)
        return [
            tokens[:first],
            *(tokens[i : i + _CHUNK] for i in range(first, len(tokens), _CHUNK)),
        ]

    def _base_boundary(self) -> int:
        return self._info.rope_boundary or 0

    def _can_choose(self, tokens: NDArray[np.int32]) -> bool:
        """Whether genai can be made to choose the token, instead of being given it."""
        return (
            self._model.append_once
            and 0 < self._length < self._capacity
            and len(tokens) == 1
            and int(tokens[0]) != self._model.last_token  # genai would not go on behind it
        )

    def _choose(self, token: int) -> FloatArray:
        """Append a token by leaving genai no other choice."""
        self._only[0, token] = 1
        self._generator.set_logits(self._only)
        self._only[0, token] = 0
        self._generator.generate_next_token()
        return self._last()

    def _last(self) -> FloatArray:
        logits: FloatArray = self._generator.get_logits()[0]
        return logits

    def _held(self) -> NDArray[np.int32]:
        """The tokens in the cache."""
        tokens: NDArray[np.int32] = self._generator.get_sequence(0)[: self._length]
        return tokens

    def _allocate(self, length: int) -> None:
        """Replace the generator by an empty one with room for ``length`` tokens."""
        wanted = max(length, min(2 * self._capacity, self._capacity + 8 * _BUCKET))
        capacity = min(-(-wanted // _BUCKET) * _BUCKET, self._max_length)
        self._generator = None  # Both caches together may not fit.
        try:
            self._generator = self._model.new_generator(capacity)
        except Exception as error:
            raise _translate(error, f"allocating a KV cache for {capacity} tokens") from error
        self._capacity = capacity

    def _truncate(self, length: int) -> None:
        try:
            if not self._model.append_once or length == 0:
                self._generator.rewind_to(length)
            elif length < self._length:
                # genai wants the logits of the last token before it chooses the next one, and
                # computes them for a token that it still finds behind the rewound length.
                self._generator.rewind_to(length - 1)
                self._generator.get_logits()
        except Exception as error:
            raise _translate(error, f"going back to {length} tokens") from error

    def _interrupt(self) -> None:
        generator = self._generator
        if generator is not None:
            generator.set_runtime_option("terminate_session", "1")

    def _free(self) -> None:
        self._generator = None
