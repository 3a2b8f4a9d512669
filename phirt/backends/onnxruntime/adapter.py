"""ONNX Runtime, driven directly: phirt owns the KV cache and binds it as input and output.

Two kinds of graphs are driven. In those of onnxruntime-genai's Model Builder, attention
writes new keys and values into the buffer that it reads the old ones from: past and present
are bound to the same memory. In those that Optimum and transformers.js use, a step returns
a new, longer cache, which is the next step's past.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from phirt.backends.base import BaseModel
from phirt.backends.execution import InTurn, Parallel
from phirt.backends.importing import import_runtime, unavailable
from phirt.backends.kv_precision import check_kv_precision
from phirt.backends.kv_ranges import find_ranges, keep_ranges, kept_ranges
from phirt.backends.onnx_nodes import GraphNodes, read_nodes, supported_context
from phirt.backends.onnxruntime.errors import translate_load
from phirt.backends.onnxruntime.float_prefill import FloatPrefill, float_graph
from phirt.backends.onnxruntime.graph import DecoderGraph, cache_inputs, describe_graph
from phirt.backends.onnxruntime.libraries import check_opened, open_libraries
from phirt.backends.onnxruntime.listing import list_devices
from phirt.backends.onnxruntime.memory import FLOAT32, DeviceMemory, HostMemory
from phirt.backends.onnxruntime.options import Settings, session_options
from phirt.backends.onnxruntime.pool import OrtPool
from phirt.backends.onnxruntime.proto import top_model
from phirt.backends.onnxruntime.providers import (
    Provider,
    add_to,
    find_provider,
    installed,
    read_placement,
)
from phirt.backends.onnxruntime.quantized_cache import (
    check_version,
    quantized_graph,
    scales_of,
)
from phirt.backends.onnxruntime.session import GrowingSession, OrtSession, SharedSession
from phirt.devices.names import DeviceName
from phirt.errors import BackendBrokenError, BackendNotInstalledError, UnsupportedModelError
from phirt.models.folder import ModelFolder, read_folder
from phirt.models.onnx_safety import check_onnx_files
from phirt.protocols import (
    Accept,
    Availability,
    Capabilities,
    KVPool,
    Lack,
    LoadOptions,
    ModelInfo,
    Placement,
    Reject,
)
from phirt.types import Artifact, FloatArray

__all__ = ["OnnxRuntimeBackend"]

_NAME = "onnxruntime"
_EXTRA = "cpu"


_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


def _import() -> Any:
    return import_runtime("onnxruntime", backend=_NAME, extra=_EXTRA)


class OnnxRuntimeBackend:
    """Adapter to ONNX Runtime's ``InferenceSession``, on any of its execution providers."""

    name: ClassVar[str] = _NAME
    formats: ClassVar[tuple[str, ...]] = ("onnx-genai", "onnx")
    kv_precisions: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {"fp32": ("cpu",), "int8": ("cpu",)}
    )

    def probe(self) -> list[Availability]:
        """Which devices the installed wheel and plugins serve, none of them tried."""
        try:
            return list_devices(_import())
        except (BackendNotInstalledError, BackendBrokenError) as error:
            return unavailable(error, extra=_EXTRA)

    def accepts(self, artifact: Artifact, device: str) -> Accept | Reject:
        """Accepts ONNX graphs on every device that an installed provider serves."""
        if artifact.format not in self.formats:
            return Reject(
                f"onnxruntime reads ONNX graphs ({' or '.join(self.formats)}), "
                f"not {artifact.format!r}"
            )
        try:
            ort = _import()
        except (BackendNotInstalledError, BackendBrokenError):
            return Accept()  # `load` says what is wrong with the installation
        kind = DeviceName.parse(device).kind
        if next(installed(ort, kind), None) is None:
            served = ", ".join(dict.fromkeys(row.device for row in installed(ort)))
            return Reject(
                f"the execution providers that are installed serve {served}, not {device!r}",
                'Install the wheel or plugin that serves it, or pass device="cpu".',
            )
        return Accept()

    def load(self, artifact: Artifact, device: str, options: LoadOptions) -> OrtModel:
        """Put the weights on the device.

        Raises:
            BackendNotInstalledError: onnxruntime is not installed.
            BackendBrokenError: It is installed and does not import.
            DeviceNotAvailableError: No provider here serves the device.
            ModelFormatError: The folder's files are damaged.
            UnsafeModelError: A file reaches outside the folder.
            UnsupportedModelError: The graph is of a kind that phirt cannot drive.
            OutOfMemoryError: The weights do not fit.
            DevicePlacementError: The graph runs elsewhere than on ``device``.
            ValueError: ``options.extra`` holds a value that phirt does not understand.
        """
        ort = _import()
        settings = Settings.of(options)
        check_kv_precision(self, device, options)
        provider = find_provider(ort, device)
        folder = read_folder(artifact.path, formats=self.formats)
        path = _graph_path(folder)
        check_onnx_files(path.parent, path.name)
        if settings.kv_precision == "int8":
            return _with_quantized_cache(ort, folder, provider, device, settings)
        return OrtModel(ort, folder, provider, device, settings)


def _with_quantized_cache(
    ort: Any, folder: ModelFolder, provider: Provider, device: str, settings: Settings
) -> OrtModel:
    """The model with its KV cache in 8 bits, by scales that are found first, once for a model."""
    path = _graph_path(folder)
    nodes = read_nodes(path)
    if not _shares_buffer(folder) or nodes.least_capacity:
        raise UnsupportedModelError(
            f"{path}: onnxruntime keeps a KV cache of 8 bits for graphs that share one buffer "
            "between past and present and roll nothing on in it. Load it without kv_precision."
        )
    check_version(ort)
    graph, names = path.read_bytes(), cache_inputs(folder)
    ranges = kept_ranges(folder, _info_of(folder, nodes, vocab_size=folder.facts.vocab_size))
    if ranges is None:
        # Whether it can be done is known before anything is run.
        quantized_graph(graph, dict.fromkeys(names, np.ones((1, 1, 1), np.float32)))
        # Products in floats: this is one long prompt, and nothing is decoded.
        plain = replace(settings, float_prefill_from=None, kv_precision=None)
        model = OrtModel(ort, folder, provider, device, plain, graph=float_graph(graph))
        try:
            ranges = find_ranges(model, folder, nodes.rotary_dims)
        finally:
            model.close()
        keep_ranges(folder, ranges)
    scales = scales_of(ranges)
    quantized = quantized_graph(graph, dict(zip(names, scales, strict=True)))
    return OrtModel(ort, folder, provider, device, settings, graph=quantized, kv_scales=scales)


class OrtModel(BaseModel):
    """A decoder graph in an ``InferenceSession``.

    Attributes:
        ort: The onnxruntime module.
        inference: The session.
        graph: Its inputs and outputs.
        memory: Where caches and logits lie.
        tokens_per_run: Most tokens of one run, or None.
        shares_buffer: Whether past and present are one buffer.
        float_prefill: What computes long prompts with float activations, or None.
        least_capacity: Positions that such a buffer must have at least.
    """

    def __init__(
        self,
        ort: Any,
        folder: ModelFolder,
        provider: Provider,
        device: str,
        settings: Settings,
        *,
        graph: bytes | None = None,
        kv_scales: tuple[FloatArray, ...] = (),
    ) -> None:
        path = _graph_path(folder)
        self.ort = ort
        self.tokens_per_run = settings.tokens_per_run
        self._provider = provider
        open_libraries(ort, provider)
        self._open = _Opener(ort, provider, settings, path)
        # onnxruntime lets go of the interpreter's lock while it opens the graph.
        with ThreadPoolExecutor(1, thread_name_prefix="phirt-graph") as reader:
            reading = reader.submit(read_nodes, path)
            self.inference: Any = self._open(graph or os.fspath(path))
            nodes = reading.result()
        check_opened(ort, self.inference, provider, device)
        self._placement = read_placement(self.inference, provider, device)
        self.graph = describe_graph(self.inference, folder, kv_scales)
        _check_kv_precision(self.graph, settings, path)
        self.memory = (
            HostMemory(ort)
            if provider.memory == "cpu"
            else DeviceMemory(ort, self._open, provider.memory, provider.index)
        )
        self.least_capacity = nodes.least_capacity
        self.shares_buffer = provider.shares_buffer and _shares_buffer(folder)
        self._is_genai = folder.decoder is not None
        self.float_prefill = self._float_prefill(settings, graph, path)
        if self.least_capacity and not self.shares_buffer:
            raise UnsupportedModelError(
                f"{path}: the graph rolls its cache on inside one buffer (sliding_window_cache), "
                f"which {provider.name} does not do. Build it with "
                "--extra_options windowed_kv_cache=false."
            )
        super().__init__(
            info=_info_of(folder, nodes, vocab_size=self.graph.vocab_size),
            capabilities=self._capabilities(),
            execution=Parallel() if provider.is_cpu else InTurn(),
            native=self.inference,
        )

    def placement(self) -> Placement:
        """Which execution provider took how many nodes, as onnxruntime recorded it."""
        return self._placement

    def run_options(self) -> Any:
        """New options for runs."""
        options = self.ort.RunOptions()
        options.log_severity_level = 4
        # No run is captured for replay. Without the entry, onnxruntime's wrapper asks for it at
        # every run and catches an exception: 24 us, as long as a step of a tiny model.
        options.add_run_config_entry("gpu_graph_id", "-1")
        return options

    @property
    def can_skip_logits(self) -> bool:
        """Whether a run may leave the LM head out: on phirt's own graphs on the CPU.

        Nobody has tried what kernels of other providers make of a product of no rows, nor what
        comes behind the LM head in other graphs.
        """
        is_own = self.graph.num_logits_to_keep is not None and self._is_genai
        return is_own and self._provider.is_cpu

    @cached_property
    def selection(self) -> Any:
        """The graph that chooses the largest logits, on the model's own provider."""
        return self._open(top_model(self.graph.logits_type.number))

    def _new_session(self, *, max_length: int, expected_length: int) -> OrtSession:
        if not self.shares_buffer:
            return GrowingSession(self, max_length=max_length)
        return SharedSession(self, max_length=max_length, expected_length=expected_length)

    def _new_pool(self, *, slots: int, capacity: int, expected_length: int) -> KVPool:
        if not self.capabilities.batch:
            # A run that fails half way would be tried, and leaves some providers unusable.
            return super()._new_pool(
                slots=slots, capacity=capacity, expected_length=expected_length
            )
        return OrtPool(self, slots=slots, capacity=capacity, expected_length=expected_length)

    def _float_prefill(
        self, settings: Settings, graph: bytes | None, path: Path
    ) -> FloatPrefill | None:
        least = settings.float_prefill_from
        if least is None:
            return None
        if not (self.can_skip_logits and self.shares_buffer):
            raise ValueError(
                "extra['float_prefill_from'] is for graphs of phirt's own on the CPU: this one "
                "has another cache, does not say which logits to compute, or runs elsewhere. Load "
                "without it."
            )
        model = float_graph(graph or path.read_bytes())
        if model is None:  # its activations are not rounded anyway
            return None
        return FloatPrefill(self.ort, self._open(model), self.graph, least=least)

    def _unload(self) -> None:
        self.inference = None
        if self.float_prefill is not None:
            self.float_prefill.close()
        self.__dict__.pop("selection", None)

    def _capabilities(self) -> Capabilities:
        lacks = {}
        if not self.graph.can_verify:
            reason = "the graph computes the logits of the last position only"
            lacks["verify"] = Lack("never", reason)
        if not self.shares_buffer:
            reason = "a cache that every step makes anew has one length for all rows"
            lacks["batch"] = Lack("not yet", reason)
        elif not self.memory.has_addresses:
            reason = (
                f"{self._provider.name} cannot bind one row of a buffer; its WebGPU kernel also "
                "takes all rows to be of one length"
            )
            lacks["batch"] = Lack("not yet", reason)
        if self.memory.on_host:
            lacks["topk"] = Lack("never", "the logits are in host memory already")
        missing = {name: name not in lacks for name in ("verify", "batch", "topk")}
        return Capabilities(truncate=True, interrupt=True, kv=True, lacks=lacks, **missing)


@dataclass(frozen=True, slots=True)
class _Opener:
    """Opens a graph, a file's or a serialized one, on a model's provider.

    It knows nothing of the model: the memory that holds it would keep the model in a cycle, and
    the collector frees sessions of a device in any order.
    """

    ort: Any
    provider: Provider
    settings: Settings
    path: Path

    def __call__(self, model: str | bytes) -> Any:
        options = session_options(self.ort, self.settings)
        if isinstance(model, bytes):
            # A serialized graph has no folder of its own to find weights in.
            options.add_session_config_entry(_WEIGHTS_FOLDER, os.fspath(self.path.parent))
        providers = add_to(self.ort, self.provider, options, self.settings.provider_options)
        try:
            session = self.ort.InferenceSession(
                model, sess_options=options, providers=providers, enable_fallback=0
            )
        except Exception as error:
            raise translate_load(error, self.path) from error
        session.disable_fallback()
        return session


def _info_of(folder: ModelFolder, nodes: GraphNodes, *, vocab_size: int) -> ModelInfo:
    facts = folder.facts
    return ModelInfo(
        vocab_size=vocab_size,
        context_length=supported_context(nodes, facts),
        eos_token_ids=facts.eos_token_ids,
        weights_id=folder.artifact.weights_id,
        rope_boundary=nodes.rope_boundary,
        window=nodes.window or facts.window,
    )


def _check_kv_precision(graph: DecoderGraph, settings: Settings, path: Path) -> None:
    """Refuse a graph whose cache is of another type than was asked for."""
    if settings.kv_precision == "fp32" and graph.cache is not FLOAT32:
        raise UnsupportedModelError(
            f"{path}: the graph keeps its KV cache in {graph.cache.storage.name}, not in float32. "
            "Load it without kv_precision."
        )


def _graph_path(folder: ModelFolder) -> Path:
    assert folder.model_path is not None  # noqa: S101  # both formats have a graph
    return folder.model_path


def _shares_buffer(folder: ModelFolder) -> bool:
    """Whether the graph was made for past and present in one buffer."""
    spec = folder.decoder
    return spec is not None and bool(spec.search.get("past_present_share_buffer", False))
