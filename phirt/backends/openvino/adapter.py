"""OpenVINO, driven directly: stateful graphs, one infer request a session."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from phirt.backends.base import BaseModel
from phirt.backends.execution import InTurn
from phirt.backends.importing import unavailable
from phirt.backends.kv_precision import check_kv_precision
from phirt.backends.openvino.cache import cache_key, checked_cache
from phirt.backends.openvino.graph import DecoderGraph
from phirt.backends.openvino.listing import list_devices, phirt_name
from phirt.backends.openvino.reading import read_graph
from phirt.backends.openvino.runtime import EXTRA, NAME, import_openvino, reason_of, translate
from phirt.backends.openvino.session import OpenVinoSession, run_once
from phirt.devices.names import DeviceName
from phirt.errors import (
    BackendBrokenError,
    BackendNotInstalledError,
    DeviceNotAvailableError,
    DevicePlacementError,
)
from phirt.models.folder import ModelFolder, read_folder
from phirt.models.store import Store
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

__all__ = ["OpenVinoBackend", "OpenVinoModel"]

_logger = logging.getLogger(__name__)

_FORMATS = ("openvino", "onnx-genai", "onnx")
# phirt's names of devices, and OpenVINO's.
_KINDS = {"cpu": "CPU", "gpu": "GPU", "npu": "NPU", "openvino-auto": "AUTO"}

_KV_PRECISION = "KV_CACHE_PRECISION"
# Left alone, the CPU plugin computes in bfloat16 where the processor can, keeps keys and values
# in 8 bits, and pins its threads to cores, where they wait for whatever else runs on those.
# docs/backends/openvino.md has what each costs.
_CPU_PROPERTIES = {
    "INFERENCE_PRECISION_HINT": "f32",
    _KV_PRECISION: "f32",
    "ENABLE_CPU_PINNING": False,
}

_KV_TYPES = {"fp32": "f32", "fp16": "f16", "int8": "u8"}


class OpenVinoBackend:
    """Adapter to OpenVINO's ``CompiledModel``."""

    name: ClassVar[str] = NAME
    formats: ClassVar[tuple[str, ...]] = _FORMATS
    kv_precisions: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        dict.fromkeys(_KV_TYPES, ("cpu",))
    )

    def probe(self) -> list[Availability]:
        """Which devices OpenVINO's plugins find here."""
        try:
            ov = import_openvino()
        except (BackendNotInstalledError, BackendBrokenError) as error:
            return unavailable(error, extra=EXTRA)
        try:
            return list_devices(ov, ov.Core())
        # Plugins load drivers, which fail in ways of their own.
        except Exception as error:
            return [Availability("cpu", "broken", f"OpenVINO found: {reason_of(error)}")]

    def accepts(self, artifact: Artifact, device: str) -> Accept | Reject:
        """Accepts folders of OpenVINO IR or ONNX, on the devices that OpenVINO knows."""
        kind = DeviceName.parse(device).kind
        if kind not in _KINDS:
            return Reject(
                f"OpenVINO has no device {device!r}", f"Pass one of: {', '.join(_KINDS)}."
            )
        if artifact.format not in _FORMATS:
            return Reject(
                f"OpenVINO reads folders of {', '.join(_FORMATS)}, not {artifact.format!r}"
            )
        return Accept()

    def load(self, artifact: Artifact, device: str, options: LoadOptions) -> OpenVinoModel:
        """Compile the graph for the device, or take it from the cache in the store.

        ``options.extra`` holds OpenVINO's properties, by OpenVINO's names. ``spinning`` is
        not one: its threads (oneTBB's) spin as they are built to.

        Raises:
            BackendNotInstalledError: OpenVINO is not installed.
            BackendBrokenError: It is installed and does not import.
            DeviceNotAvailableError: OpenVINO does not find the device.
            ModelFormatError: The folder's files are damaged.
            UnsafeModelError: A file reaches outside the folder.
            UnsupportedModelError: The graph is of a kind that phirt cannot drive.
            OutOfMemoryError: The weights do not fit.
            DevicePlacementError: The graph was compiled for another device.
        """
        check_kv_precision(self, device, options)
        ov = import_openvino()
        folder = read_folder(artifact.path, name=artifact.name, formats=self.formats)
        core = ov.Core()
        target = _find_device(core, device)
        return OpenVinoModel(ov, core, folder, device=device, target=target, options=options)


def _find_device(core: Any, device: str) -> str:
    """OpenVINO's name of a device that is here."""
    name = DeviceName.parse(device)
    target = _KINDS.get(name.kind)
    if target == "AUTO" and name.index is None:
        return target
    found = {phirt_name(each): each for each in core.available_devices}
    here = [each for offered, each in found.items() if name.is_one_of([offered])]
    if target is None or not here:
        raise DeviceNotAvailableError(
            f"Device {device!r} is not available to backend {NAME!r}, which finds: "
            f"{', '.join(found)}, and openvino-auto, which chooses among them. Pass one of these."
        )
    # Of a kind that OpenVINO finds one of, it knows no number.
    return target if name.index is None else str(here[0])


class OpenVinoModel(BaseModel):
    """A decoder graph, compiled."""

    def __init__(
        self,
        ov: Any,
        core: Any,
        folder: ModelFolder,
        *,
        device: str,
        target: str,
        options: LoadOptions,
    ) -> None:
        self._ov = ov
        model, self.graph, path = read_graph(core, folder)
        properties = _properties(target, options)
        key = cache_key(path, folder.artifact.weights_id, ov.get_version(), target)
        with _cached(key, properties) as cached:
            self.compiled = _compile(core, model, target, cached, path)
        self._placement = _read_placement(self.compiled, device, target)
        facts = folder.facts
        super().__init__(
            info=ModelInfo(
                vocab_size=facts.vocab_size,
                context_length=facts.context_length,
                eos_token_ids=frozenset(facts.eos_token_ids),
                weights_id=folder.artifact.weights_id,
                rope_boundary=facts.rope_boundary,
                window=facts.window,
            ),
            capabilities=_capabilities(self.graph),
            # OpenVINO would queue calls by itself. Taking turns here, a call that fails is
            # followed by `_recover` before any other.
            execution=InTurn(),
            native=self.compiled,
        )

    def placement(self) -> Placement:
        """The devices that OpenVINO says the compiled model executes on."""
        return self._placement

    def _new_session(self, *, max_length: int, expected_length: int) -> OpenVinoSession:
        try:
            request = self.compiled.create_infer_request()
        except Exception as error:
            raise translate(error, "starting a session") from error
        return OpenVinoSession(
            self,
            self._ov,
            request,
            self.graph,
            recover=self._recover,
            max_length=max_length,
            expected_length=expected_length,
        )

    def _recover(self) -> None:
        """Make the compiled model usable again after a call that failed."""
        # The first may be of the very length that fails; then the second is not.
        for length in (2, 3):
            try:
                run_once(self.compiled.create_infer_request(), self.graph, length)
            except Exception as error:
                _logger.debug("OpenVINO did not recover: %s", reason_of(error))

    def _unload(self) -> None:
        self.compiled = None


def _properties(target: str, options: LoadOptions) -> dict[str, Any]:
    properties: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    on_cpu = dict(_CPU_PROPERTIES)
    if options.kv_precision is not None:
        if _KV_PRECISION in options.extra:
            raise ValueError(
                f"kv_precision={options.kv_precision!r} and options={{{_KV_PRECISION!r}: ...}} say "
                "the same thing twice: leave one out."
            )
        on_cpu[_KV_PRECISION] = _KV_TYPES[options.kv_precision]
    if options.pinning is not None:
        on_cpu["ENABLE_CPU_PINNING"] = options.pinning
    if target == "CPU":
        properties |= on_cpu
    elif target == "AUTO":
        properties["DEVICE_PROPERTIES"] = {"CPU": on_cpu}
    if options.threads is not None:
        properties["INFERENCE_NUM_THREADS"] = options.threads
    return properties | dict(options.extra)


@contextmanager
def _cached(key: str, properties: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The properties, with a folder for compiled models unless the caller named one."""
    if "CACHE_DIR" in properties:
        yield properties
        return
    with checked_cache(Store().root / "openvino" / key) as folder:
        yield properties if folder is None else properties | {"CACHE_DIR": os.fspath(folder)}


def _compile(core: Any, model: Any, target: str, properties: Mapping[str, Any], path: Path) -> Any:
    try:
        return core.compile_model(model, target, dict(properties))
    except Exception as error:
        raise translate(error, f"compiling {path} for {target}") from error


def _read_placement(compiled: Any, device: str, target: str) -> Placement:
    """The devices that OpenVINO names: it compiles all of a graph for each of them.

    Raises:
        DevicePlacementError: One of them is not the device.
    """
    # While it compiles for another one, "AUTO" puts the CPU in parentheses.
    devices = [name.strip("()") for name in compiled.get_property("EXECUTION_DEVICES")]
    kind = target.partition(".")[0]
    if kind == "AUTO":
        actual = "+".join(sorted({phirt_name(name) for name in devices}))
        return Placement(device=actual, provider=", ".join(devices))
    # "GPU" is any of them, "GPU.1" that one; the first may have no number.
    same = {target, target.removesuffix(".0")}
    strays = [name for name in devices if not same & {name, name.partition(".")[0]}]
    if strays or not devices:
        share = len(strays) / len(devices) if devices else 1.0
        raise DevicePlacementError(
            f"Device {device!r} was asked for, which is {target}, but OpenVINO executes "
            f"{share:.0%} of the graph elsewhere; it names {', '.join(devices) or 'no device'}. "
            "Name the device that you want it on."
        )
    return Placement(device=device, provider=", ".join(devices))


def _capabilities(graph: DecoderGraph) -> Capabilities:
    lacks = {
        "batch": Lack("not yet", "phirt gives each sequence an infer request of its own so far"),
        "topk": Lack("not yet", "the logits are in host memory on the CPU"),
    }
    if not graph.cache:
        reason = "the graph's states are not keys and values by position"
        lacks |= {"truncate": Lack("never", reason), "kv": Lack("never", reason)}
    if graph.prunes:
        reason = "the graph computes the logits of the last position only"
        lacks["verify"] = Lack("never", reason)
    plain = bool(graph.cache)
    return Capabilities(
        truncate=plain, kv=plain, verify=not graph.prunes, interrupt=True, lacks=lacks
    )
