"""What the installed build of onnxruntime-genai and its plugins have code and hardware for."""

from __future__ import annotations

from typing import Any

from phirt.backends.importing import import_runtime
from phirt.backends.onnxruntime_genai.config import PROVIDERS, Provider
from phirt.backends.ort_devices import DIRECTML, WEBGPU, cuda_entries, listed_entries
from phirt.backends.ort_plugins import plugin_entries
from phirt.errors import BackendBrokenError, BackendNotInstalledError
from phirt.protocols import Availability
from phirt.types import Hardware

__all__ = ["list_devices"]

_BACKEND = "onnxruntime-genai"
# Which devices of a plugin that serves several kinds.
_HARDWARE = {"openvino-cpu": "CPU", "gpu": "GPU", "npu": "NPU"}


def list_devices(og: Any) -> list[Availability]:
    """The CPU, and what each installed provider can have; genai itself lists no devices.

    Args:
        og: The module.
    """
    version = f"{getattr(og, '__id__', _BACKEND)} {og.__version__}"
    cpu = Availability("cpu", "found", version, version=version, hardware=Hardware(native="CPU"))
    entries = [cpu]
    for kind, providers in PROVIDERS.items():
        provider = next((p for p in providers if p.is_installed(og)), None)
        if kind != "cpu" and provider is not None:
            entries += _entries(kind, provider, version)
    return entries


def _entries(kind: str, provider: Provider, version: str) -> list[Availability]:
    beside = provider.plugin if provider.has_plugin else provider.wheel
    reason = " and ".join([version, *([beside] if beside else [])])
    if kind == "cuda":
        return cuda_entries(kind, version=version, reason=reason)
    ort = _onnxruntime()
    if ort is not None and provider.plugin is not None and provider.has_plugin:
        return plugin_entries(
            ort,
            provider.plugin,
            _HARDWARE.get(kind),
            kind=kind,
            version=version,
            reason=reason,
            backend=_BACKEND,
        )
    if ort is not None and provider.execution_provider in (DIRECTML, WEBGPU):
        return listed_entries(
            ort, provider.execution_provider, kind, version=version, reason=reason
        )
    reason += "; whether the hardware answers shows at a load"
    return [Availability(kind, "found", reason, version=version)]


def _onnxruntime() -> Any:
    """The library that genai runs on, which knows the devices; None where it has no module."""
    try:
        return import_runtime("onnxruntime", backend=_BACKEND, extra="genai")
    except (BackendNotInstalledError, BackendBrokenError):
        return None
