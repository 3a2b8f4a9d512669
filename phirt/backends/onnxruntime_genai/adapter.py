"""onnxruntime-genai, used for its model and its KV cache only.

genai's generator appends tokens and gives logits; its search, penalties and sampling stay
switched off, since phirt's own mean the same on every runtime. On DirectML it appends only
once: every later token is then *chosen* by genai, from logits that leave no choice.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np

from phirt.backends.base import BaseModel
from phirt.backends.distributions import check_single_owner
from phirt.backends.execution import InTurn, Parallel
from phirt.backends.importing import import_runtime, unavailable
from phirt.backends.kv_precision import check_kv_precision
from phirt.backends.native_errors import first_line
from phirt.backends.onnx_nodes import GraphNodes, read_nodes, supported_context
from phirt.backends.onnxruntime_genai.config import (
    PROVIDERS,
    Provider,
    Settings,
    choose_provider,
    last_token,
    open_config,
)
from phirt.backends.onnxruntime_genai.listing import list_devices
from phirt.backends.onnxruntime_genai.session import (
    BUCKET,
    CHUNK,
    GenaiSession,
    Generators,
    translate,
)
from phirt.backends.placement import place_nodes
from phirt.devices.names import DeviceName
from phirt.errors import (
    BackendBrokenError,
    BackendNotInstalledError,
    DeviceNotAvailableError,
    ModelFormatError,
    UnsupportedModelError,
)
from phirt.models.folder import ModelFolder, read_folder
from phirt.models.genai_config import DecoderSpec
from phirt.models.onnx_safety import check_onnx_files
from phirt.models.real_files import real_folder
from phirt.protocols import (
    Accept,
    Availability,
    Capabilities,
    Lack,
    LoadOptions,
    ModelInfo,
    Placement,
    Reject,
)
from phirt.types import Artifact

__all__ = ["OnnxRuntimeGenaiBackend"]

_NAME = "onnxruntime-genai"
_EXTRA = "genai"
_FORMAT = "onnx-genai"
_BAD_GRAPH = re.compile(r"protobuf|invalid (model|graph|argument)|type error", re.IGNORECASE)
_NO_DEVICE = re.compile(
    r"not supported in this build|not been built with|interface not available|devices? matched",
    re.IGNORECASE,
)


def _import() -> Any:
    # genai loads the library inside this package, whichever distribution wrote it last.
    check_single_owner("onnxruntime", backend=_NAME)
    return import_runtime("onnxruntime_genai", backend=_NAME, extra=_EXTRA)


class OnnxRuntimeGenaiBackend:
    """Adapter to onnxruntime-genai."""

    name: ClassVar[str] = _NAME
    formats: ClassVar[tuple[str, ...]] = (_FORMAT,)
    kv_precisions: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType({})

    def probe(self) -> list[Availability]:
        """Which devices the installed build has code for, and plugins have hardware for."""
        try:
            og = _import()
        except (BackendNotInstalledError, BackendBrokenError) as error:
            return unavailable(error, extra=_EXTRA)
        return list_devices(og)

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
        check_kv_precision(self, device, options)
        og = _import()
        folder = read_folder(artifact.path, formats=self.formats)
        spec = folder.decoder
        if spec is None:
            raise UnsupportedModelError(f"{artifact.path} has no genai_config.json.")
        # A graph that is handed over in memory may have no weights behind links.
        real_path = real_folder(artifact.path)
        check_onnx_files(real_path, spec.filename)
        return GenaiModel(
            og,
            folder,
            spec=spec,
            model_path=real_path / spec.filename,
            device=DeviceName.parse(device),
            options=options,
        )


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
        settings = Settings.read(options)
        provider = choose_provider(og, device, settings)
        nodes = read_nodes(model_path)
        with open_config(
            og, spec, model_path, device=device, provider=provider, settings=settings
        ) as config:
            native = _open(og, config, model_path, device)
        append_once = settings.append_once
        if append_once is None:
            append_once = provider.append_once
        if append_once and settings.tokens_per_run is not None:
            raise ValueError("tokens_per_run cannot be had where genai appends tokens only once")
        self._generators = Generators(
            og=og,
            model=native,
            logits_name=spec.logits,
            append_once=append_once,
            tokens_per_run=settings.tokens_per_run or (CHUNK if device.kind == "cpu" else None),
            last_token=last_token(spec),
            least_capacity=nodes.least_capacity,
        )
        info = _info(folder, nodes)
        self._placement, verify_lack = _try_out(self._generators, info, device, provider)
        super().__init__(
            info=info,
            capabilities=_capabilities(verify_lack),
            # One command queue or stream serves all generators of a device other than the CPU.
            execution=Parallel() if device.kind == "cpu" else InTurn(),
            native=native,
        )

    def placement(self) -> Placement:
        """Which execution provider ran how many nodes, by onnxruntime's profile of one run."""
        return self._placement

    def _new_session(self, *, max_length: int, expected_length: int) -> GenaiSession:
        return GenaiSession(
            self, self._generators, max_length=max_length, expected_length=expected_length
        )

    def _unload(self) -> None:
        del self._generators


def _open(og: Any, config: Any, model_path: Path, device: DeviceName) -> Any:
    try:
        return og.Model(config)
    except Exception as error:
        if _NO_DEVICE.search(str(error)):
            raise DeviceNotAvailableError(
                f"Device '{device}' is not available to backend {_NAME!r}: "
                f"{first_line(error).rstrip('. ')}. Install the build or plugin that serves it, "
                'or pass device="cpu".'
            ) from error
        if _BAD_GRAPH.search(str(error)):
            raise ModelFormatError(
                f"onnxruntime-genai cannot read {model_path}: {first_line(error)}"
            ) from error
        raise translate(error, f"loading {model_path} on '{device}'") from error


def _try_out(
    generators: Generators, info: ModelInfo, device: DeviceName, provider: Provider
) -> tuple[Placement, Lack | None]:
    """Run two tokens: what ran where, and why not every position's logits can be had."""
    with tempfile.TemporaryDirectory(prefix="phirt-genai-", ignore_cleanup_errors=True) as scratch:
        try:
            generator = generators.new(min(BUCKET, info.context_length))
            generator.set_runtime_option("enable_profiling", f"{scratch}/run")
            generator.append_tokens(np.zeros(2, np.int32))
        except Exception as error:
            raise translate(error, f"running the model on '{device}'") from error
        kernels = _read_profile(Path(scratch))
    # On the CPU, where there is no other place, a profile that cannot be read is no fault.
    if not kernels and device.kind == "cpu":
        placement = Placement(device=str(device), provider=provider.execution_provider)
    else:
        placement = place_nodes(kernels, device=str(device), provider=provider.execution_provider)
    return placement, _verify_lack(generators, generator)


def _verify_lack(generators: Generators, generator: Any) -> Lack | None:
    if generators.append_once:
        return Lack("never", "on this device genai appends tokens only once")
    try:
        logits = generator.get_output(generators.logits_name)
    except Exception as error:  # bfloat16, which NumPy does not have
        reason = f"its Python binding does not give out the graph's logits: {first_line(error)}"
        return Lack("this version", reason)
    if logits.shape[1] == 1:
        return Lack("never", "the graph computes the logits of the last position only")
    return None


def _info(folder: ModelFolder, nodes: GraphNodes) -> ModelInfo:
    return ModelInfo(
        vocab_size=folder.facts.vocab_size,
        context_length=supported_context(nodes, folder.facts),
        eos_token_ids=folder.facts.eos_token_ids,
        weights_id=folder.artifact.weights_id,
        rope_boundary=nodes.rope_boundary,
        window=nodes.window or folder.facts.window,
    )


def _capabilities(verify_lack: Lack | None) -> Capabilities:
    lacks = {
        "kv": Lack("never", "genai gives out copies of keys and values, and takes none in"),
        "batch": Lack("never", "rows of one generator share their length"),
        "topk": Lack("never", "genai copies all logits to the host"),
    }
    if verify_lack is not None:
        lacks["verify"] = verify_lack
    return Capabilities(truncate=True, verify=verify_lack is None, interrupt=True, lacks=lacks)


def _read_profile(folder: Path) -> list[tuple[str, str]]:
    """Execution provider and operator of each kernel that ran; empty if there is no profile."""
    kernels = []
    for file in folder.iterdir():
        try:
            events = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            return []
        for event in events:
            details = event.get("args", {})
            if event.get("cat") == "Node" and details.get("provider"):
                kernels.append((details["provider"], details.get("op_name", "")))
    return kernels
