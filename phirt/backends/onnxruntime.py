"""ONNX Runtime, driven directly: phirt owns the KV cache and binds it as input and output.

The graph is a decoder in the convention of onnxruntime-genai's Model Builder, whose
GroupQueryAttention writes new keys and values into the buffer it reads the old ones
from. Past and present are therefore bound to the *same* memory: nothing is copied from
step to step, and rolling back is setting a length.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from phirt.backends.base import BaseModel, BaseSession, HostLogits, import_runtime
from phirt.backends.execution import Parallel
from phirt.backends.onnxruntime_graph import (
    KEEP_INPUT,
    cache_names,
    check_graph,
    check_supported,
    dtype_of,
)
from phirt.errors import (
    BackendBrokenError,
    BackendNotInstalledError,
    BackendRuntimeError,
    DevicePlacementError,
    ModelFormatError,
    OutOfMemoryError,
)
from phirt.models.folder import ModelFolder, read_folder
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

__all__ = ["OnnxRuntimeBackend"]

_NAME = "onnxruntime"
_EXTRA = "cpu"
_PROVIDERS = {"cpu": "CPUExecutionProvider"}
_FORMAT = "onnx-genai"
_BUCKET = 256  # tokens; the KV cache is allocated in multiples of it
# How long an idle worker spins before it sleeps, in microseconds. Measured on 2 cores
# (docs/performance.md): alone it decodes as fast as with onnxruntime's own, far longer
# spinning, and beside one busy process 1.5 times as fast.
_SPIN_US = "10"
_OUT_OF_MEMORY = re.compile(r"bad.?alloc|failed to allocate|not enough memory", re.IGNORECASE)


def _import() -> Any:
    # Read once, when the library initialises; a user's own setting stands.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    return import_runtime("onnxruntime", backend=_NAME, extra=_EXTRA)


def _translate(error: Exception, doing: str) -> BackendRuntimeError | OutOfMemoryError:
    """Say in phirt's words what the runtime raised; the caller chains the original."""
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
        return OutOfMemoryError(
            f"Out of memory while {doing}: {_first_line(error)}. Ask for fewer tokens, "
            "or load the model in a smaller precision."
        )
    return BackendRuntimeError(f"onnxruntime failed while {doing}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class OnnxRuntimeBackend:
    """Adapter to ONNX Runtime's ``InferenceSession``, on the CPU."""

    name: ClassVar[str] = _NAME
    formats: ClassVar[tuple[str, ...]] = (_FORMAT,)

    def probe(self) -> list[Availability]:
        """Whether onnxruntime imports, and offers the CPU."""
        try:
            ort = _import()
        except BackendNotInstalledError as error:
            return [Availability("cpu", "missing", str(error), f'pip install "phirt[{_EXTRA}]"')]
        except BackendBrokenError as error:
            return [Availability("cpu", "broken", str(error), None)]
        return [Availability("cpu", "found", f"onnxruntime {ort.__version__}")]

    def accepts(self, artifact: Artifact, device: str) -> Accept | Reject:
        """Accepts genai folders on the CPU."""
        if device not in _PROVIDERS:
            return Reject(
                f"phirt drives onnxruntime on the CPU only, not on {device!r}",
                'Pass device="cpu".',
            )
        if artifact.format != _FORMAT:
            return Reject(
                f"onnxruntime reads folders with a genai_config.json, not {artifact.format!r}"
            )
        return Accept()

    def load(self, artifact: Artifact, device: str, options: LoadOptions) -> OrtModel:
        """Put the weights on the device.

        Raises:
            BackendNotInstalledError: onnxruntime is not installed.
            BackendBrokenError: It is installed and does not import.
            ModelFormatError: The folder's files are damaged.
            UnsafeModelError: A file reaches outside the folder.
            UnsupportedModelError: The graph is of a kind that phirt cannot drive.
            OutOfMemoryError: The weights do not fit.
            DevicePlacementError: The graph runs elsewhere than on ``device``.
        """
        ort = _import()
        folder = read_folder(artifact.path)
        check_supported(folder)
        check_onnx_files(folder.artifact.path, folder.decoder.filename)
        return OrtModel(ort, folder, device, options)


class OrtModel(BaseModel):
    """A decoder graph in an ``InferenceSession``."""

    def __init__(self, ort: Any, folder: ModelFolder, device: str, options: LoadOptions) -> None:
        spec = folder.decoder
        self.ort = ort
        self.spec = spec
        self.inference = _open(ort, folder, device, options)
        self._placement = _read_placement(self.inference, device)
        self.past_names, self.present_names = cache_names(spec)
        inputs = {i.name: i for i in self.inference.get_inputs()}
        outputs = {o.name: o for o in self.inference.get_outputs()}
        check_graph(inputs, outputs, folder)
        self.kv_dtype = dtype_of(inputs[self.past_names[0]], folder)
        self.logits_dtype = dtype_of(outputs[spec.logits], folder)
        self.takes_positions = spec.position_ids is not None and spec.position_ids in inputs
        overridable = {i.name for i in self.inference.get_overridable_initializers()}
        # A graph that declares one position computes the LM head for the last one only.
        self.prunes_logits = outputs[spec.logits].shape[1] == 1
        self.can_keep_logits = KEEP_INPUT in overridable | inputs.keys()
        super().__init__(
            info=ModelInfo(
                vocab_size=spec.vocab_size,
                context_length=spec.context_length,
                eos_token_ids=frozenset(spec.eos_token_ids),
                weights_id=folder.artifact.weights_id,
            ),
            capabilities=_capabilities(verify=self.can_keep_logits or not self.prunes_logits),
            execution=Parallel(),
            native=self.inference,
        )

    def placement(self) -> Placement:
        """Which execution provider took how many nodes, as onnxruntime recorded it."""
        return self._placement

    def _new_session(self, *, max_length: int, expected_length: int) -> OrtSession:
        return OrtSession(self, max_length=max_length, expected_length=expected_length)

    def _unload(self) -> None:
        self.inference = None


def _capabilities(*, verify: bool) -> Capabilities:
    lacks = {
        "kv": Lack("not yet", "the buffers are host memory, and phirt does not copy them yet"),
        "batch": Lack("not yet", "phirt binds one row per buffer so far"),
        "topk": Lack("not yet", "the logits are in host memory on the CPU"),
    }
    if not verify:
        lacks["verify"] = Lack("never", "the graph computes the logits of the last position only")
    return Capabilities(truncate=True, verify=verify, interrupt=True, lacks=lacks)


def _open(ort: Any, folder: ModelFolder, device: str, options: LoadOptions) -> Any:
    settings = ort.SessionOptions()
    # Errors reach the caller as exceptions; a library does not write to stderr as well.
    settings.log_severity_level = 4
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if options.threads is not None:
        settings.intra_op_num_threads = options.threads
    if options.spinning is None:
        settings.add_session_config_entry("session.intra_op.spin_duration_us", _SPIN_US)
    else:
        settings.add_session_config_entry(
            "session.intra_op.allow_spinning", "1" if options.spinning else "0"
        )
    for key, value in options.extra.items():
        settings.add_session_config_entry(key, str(value))
    path = folder.model_path
    try:
        return ort.InferenceSession(
            os.fspath(path), sess_options=settings, providers=[_PROVIDERS[device]]
        )
    except Exception as error:
        if re.search(r"InvalidProtobuf|InvalidGraph|InvalidArgument", type(error).__name__):
            raise ModelFormatError(
                f"onnxruntime cannot read {path}: {_first_line(error)}"
            ) from error
        raise _translate(error, f"loading {path}") from error


def _read_placement(inference: Any, device: str) -> Placement:
    nodes: dict[str, int] = {}
    for assignment in inference.get_provider_graph_assignment_info():
        name = assignment.ep_name
        nodes[name] = nodes.get(name, 0) + len(assignment.get_nodes())
    provider = _PROVIDERS[device]
    if nodes and provider not in nodes:
        raise DevicePlacementError(
            f"Device {device!r} was asked for, but every node runs on {', '.join(nodes)}."
        )
    return Placement(device=device, provider=provider, nodes=nodes)


class OrtSession(BaseSession):
    """One sequence: KV buffers bound once, and a few small inputs rebound at each step."""

    def __init__(self, model: OrtModel, *, max_length: int, expected_length: int) -> None:
        super().__init__(model, max_length=max_length)
        self._model = model
        self._inference = model.inference
        self._binding = self._inference.io_binding()
        self._run_options = model.ort.RunOptions()
        self._run_options.log_severity_level = 4
        self._cache: list[NDArray[Any]] = []
        self._capacity = 0
        self._grow(min(expected_length, max_length))
        spec = model.spec
        self._token = np.zeros((1, 1), np.int64)
        self._token_value = model.ort.OrtValue.ortvalue_from_numpy(self._token)
        self._logits = np.zeros((1, 1, spec.vocab_size), model.logits_dtype)
        self._logits_value = model.ort.OrtValue.ortvalue_from_numpy(self._logits)
        self._keep = np.ones(1, np.int64)
        self._keep_value = model.ort.OrtValue.ortvalue_from_numpy(self._keep)
        # What the binding holds now, so that a step rebinds only what changes.
        self._bound_token = False
        self._bound_logits = False
        self._bound_keep = 0

    def _append(self, token_ids: Sequence[int], *, every_position: bool) -> Logits:
        count = len(token_ids)
        if self._length + count > self._capacity:
            self._grow(self._length + count)
        self._bind_inputs(token_ids)
        in_place = self._bind_logits(count, every_position=every_position)
        try:
            # The wrapper around this method validates inputs that were bound by name.
            self._inference.run_with_iobinding(self._binding, self._run_options)
        except Exception as error:
            raise _translate(error, f"running {count} tokens") from error
        if in_place:
            return HostLogits(self._logits[0].astype(np.float32, copy=False))
        return HostLogits(self._fetch_logits(every_position=every_position))

    def _bind_inputs(self, token_ids: Sequence[int]) -> None:
        spec, binding = self._model.spec, self._binding
        count, total = len(token_ids), self._length + len(token_ids)
        if count == 1:
            self._token[0, 0] = token_ids[0]
            if not self._bound_token:
                binding.bind_ortvalue_input(spec.input_ids, self._token_value)
        else:
            binding.bind_cpu_input(spec.input_ids, np.array(token_ids, np.int64)[None])
        self._bound_token = count == 1
        binding.bind_cpu_input(spec.attention_mask, self._mask[:, :total])
        if self._model.takes_positions:
            positions = np.arange(self._length, total, dtype=np.int64)[None]
            binding.bind_cpu_input(spec.position_ids, positions)

    def _bind_logits(self, count: int, *, every_position: bool) -> bool:
        """Bind the output, and say whether it is the session's own one-row buffer."""
        model, binding = self._model, self._binding
        keep = count if every_position else 1
        if model.can_keep_logits and keep != self._bound_keep:
            # An input with a default is bound as a value: binding it by its array looks
            # for it among the required inputs only.
            self._keep[0] = keep
            binding.bind_ortvalue_input(KEEP_INPUT, self._keep_value)
            self._bound_keep = keep
        one_row = count == 1 or (not every_position and model.prunes_logits)
        if not one_row:
            # onnxruntime allocates it, since its shape is the graph's to know.
            binding.bind_output(model.spec.logits, "cpu")
        elif not self._bound_logits:
            binding.bind_ortvalue_output(model.spec.logits, self._logits_value)
        self._bound_logits = one_row
        return one_row

    def _fetch_logits(self, *, every_position: bool) -> FloatArray:
        # Outputs are listed in the order in which they were first bound: the cache when
        # the session was made, the logits after it.
        logits: NDArray[Any] = self._binding.get_outputs()[-1].numpy()[0]
        rows = logits if every_position else logits[-1:]
        return np.ascontiguousarray(rows, dtype=np.float32)

    def _grow(self, length: int) -> None:
        """Give the cache room for ``length`` tokens, and some more."""
        spec, ort = self._model.spec, self._model.ort
        wanted = max(length, min(2 * self._capacity, self._capacity + 8 * _BUCKET))
        capacity = min(-(-wanted // _BUCKET) * _BUCKET, self._max_length)
        shape = (1, spec.num_kv_heads, capacity, spec.head_size)
        names = list(zip(self._model.past_names, self._model.present_names, strict=True))
        try:
            # Fresh zeros are not touched by the system until they are written.
            cache = [np.zeros(shape, self._model.kv_dtype) for _ in names]
            for old, new in zip(self._cache, cache, strict=False):
                new[:, :, : self._length] = old[:, :, : self._length]
            mask = np.ones((1, capacity), np.int64)
        except MemoryError as error:
            raise _translate(error, f"allocating a KV cache for {capacity} tokens") from error
        for (past, present), buffer in zip(names, cache, strict=True):
            value = ort.OrtValue.ortvalue_from_numpy(buffer)
            self._binding.bind_ortvalue_input(past, value)
            self._binding.bind_ortvalue_output(present, value)
        self._cache, self._mask, self._capacity = cache, mask, capacity

    def _truncate(self, length: int) -> None:
        """Nothing to do: what lies beyond the length is never read, and is overwritten."""

    def _interrupt(self) -> None:
        self._run_options.terminate = True

    def _free(self) -> None:
        self._cache = []
        self._binding = self._inference = None
