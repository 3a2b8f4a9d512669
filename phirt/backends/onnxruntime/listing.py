"""What a probe says of the execution providers that are installed, device by device."""

from __future__ import annotations

from typing import Any

from phirt.backends.onnxruntime.providers import Provider, installed
from phirt.backends.ort_devices import (
    DIRECTML,
    WEBGPU,
    cuda_entries,
    describe,
    ep_devices,
    listed_entries,
)
from phirt.backends.ort_plugins import plugin_entries
from phirt.protocols import Availability
from phirt.types import Hardware

__all__ = ["list_devices"]


def list_devices(ort: Any) -> list[Availability]:
    """Every device of an installed provider, none of them tried.

    Plugins are loaded, and CUDA's driver started, only in a `disposable_process`.

    Args:
        ort: The onnxruntime module.
    """
    by_kind: dict[str, list[Availability]] = {}
    for row in installed(ort):
        known = by_kind.get(row.device)
        # Of two providers for a kind, the first that has a device, else the first.
        if known is None or known[0].status in ("no device", "broken"):
            found = _entries(ort, row)
            if known is None or found[0].status == "found":
                by_kind[row.device] = found
    return [entry for entries in by_kind.values() for entry in entries]


def _entries(ort: Any, row: Provider) -> list[Availability]:
    version = f"onnxruntime {ort.__version__}"
    reason = ", ".join(filter(None, (version, row.module, row.name)))
    if row.is_cpu:
        hardware = next(map(describe, ep_devices(ort, row.name)), Hardware(native="CPU"))
        reason += ": not tried"
        return [Availability(row.device, "found", reason, version=version, hardware=hardware)]
    if row.module is None and row.memory == "cuda":
        return cuda_entries(row.device, version=version, reason=reason)
    if row.module is None and row.name in (DIRECTML, WEBGPU):
        return listed_entries(ort, row.name, row.device, version=version, reason=reason)
    if row.module is not None:
        return plugin_entries(
            ort, row.module, row.hardware, kind=row.device, version=version, reason=reason
        )
    return [Availability(row.device, "found", f"{reason}: not tried", version=version)]
