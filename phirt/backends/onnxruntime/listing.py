"""What a probe says of the execution providers that are installed, device by device."""

from __future__ import annotations

from typing import Any

from phirt.backends.onnxruntime.providers import Provider, installed, registered_devices
from phirt.backends.ort_devices import (
    DIRECTML,
    WEBGPU,
    cuda_entries,
    describe,
    ep_devices,
    listed_entries,
)
from phirt.protocols import Availability
from phirt.types import Hardware

__all__ = ["list_devices"]


def list_devices(ort: Any) -> list[Availability]:
    """Every device of an installed provider, none of them tried.

    No plugin is loaded for it: loading one starts drivers, and shows at a load or a trial
    whether there is a device.

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
        return [_found(row, reason, version, hardware)]
    if row.module is None and row.memory == "cuda":
        return cuda_entries(row.device, version=version, reason=reason)
    if row.module is None and row.name in (DIRECTML, WEBGPU):
        return listed_entries(ort, row.name, row.device, version=version, reason=reason)
    devices = registered_devices(ort, row)
    if devices is None:
        return [_found(row, reason, version, None)]
    if not devices:
        reason += ": it is loaded, and finds no such device"
        return [Availability(row.device, "no device", reason, version=version)]
    return [
        _found(row, reason, version, describe(each, index), None if len(devices) == 1 else index)
        for index, each in enumerate(devices)
    ]


def _found(
    row: Provider, reason: str, version: str, hardware: Hardware | None, index: int | None = None
) -> Availability:
    device = row.device if index is None else f"{row.device}:{index}"
    return Availability(device, "found", f"{reason}: not tried", version=version, hardware=hardware)
