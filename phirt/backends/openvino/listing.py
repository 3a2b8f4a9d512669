"""What OpenVINO's plugins find on this machine, device by device."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from phirt.devices.identity import format_pci, parse_luid_bytes, parse_uuid
from phirt.devices.vendors import cpu_vendor
from phirt.protocols import Availability
from phirt.types import Hardware

__all__ = ["list_devices", "phirt_name"]

# What a machine may have beside its CPU, by phirt's names: what OpenVINO would need for it.
_ACCELERATORS = {
    "gpu": "an Intel GPU with its OpenCL driver",
    "npu": "an Intel NPU with its Level Zero driver",
}


def phirt_name(device: str) -> str:
    """What phirt calls a device: ``"gpu:0"`` for ``"GPU.0"``."""
    kind, _, index = device.partition(".")
    return kind.lower() + (f":{index}" if index else "")


def list_devices(ov: Any, core: Any) -> list[Availability]:
    """Every device that a plugin finds, and those kinds that none finds.

    Args:
        ov: The openvino module.
        core: A ``Core``, whose plugins load their drivers now.
    """
    # "2026.4.1-22982-e213a147257-releases/2026/4"
    version = f"openvino {ov.get_version().partition('-')[0]}"
    entries = []
    for device in core.available_devices:
        hardware = describe_device(core, device)
        reason = f"{version}: {hardware.name or device}"
        name = phirt_name(device)
        entries.append(Availability(name, "found", reason, version=version, hardware=hardware))
    kinds = {entry.device.partition(":")[0] for entry in entries}
    entries += [
        Availability(kind, "no device", f"{version} does not find {needed}", version=version)
        for kind, needed in _ACCELERATORS.items()
        if kind not in kinds
    ]
    automatic = "OpenVINO chooses among the above"
    return [*entries, Availability("openvino-auto", "found", automatic, version=version)]


def describe_device(core: Any, device: str) -> Hardware:
    """What a plugin tells of its device: each property may be missing, or fail."""

    def read(key: str) -> Any:
        try:
            return core.get_property(device, key)
        # Properties ask drivers, which fail in ways of their own.
        except Exception:
            return None

    name = _text(read("FULL_DEVICE_NAME"))
    kind = device.partition(".")[0]
    if kind == "CPU":
        return Hardware(native=device, name=name, vendor=cpu_vendor(name or ""))
    # Elsewhere Intel's GPU driver leaves there whatever was in memory, which may be alike for two
    # devices; clinfo says "Valid Device LUID: No" of it.
    luid = _text(read("DEVICE_LUID")) if sys.platform == "win32" else None
    memory = read(f"{kind}_DEVICE_TOTAL_MEM_SIZE")
    type_name = str(getattr(read("DEVICE_TYPE"), "name", ""))
    return Hardware(
        native=device,
        name=name,
        vendor=cpu_vendor(name or ""),
        memory_bytes=memory if isinstance(memory, int) and memory > 0 else None,
        driver=_text(read(f"{kind}_DRIVER_VERSION")),
        pci=_pci(read),
        luid=parse_luid_bytes(luid or ""),
        uuid=parse_uuid(_text(read("DEVICE_UUID")) or ""),
        discrete={"DISCRETE": True, "INTEGRATED": False}.get(type_name),
    )


def _pci(read: Callable[[str], Any]) -> str | None:
    info = read("DEVICE_PCI_INFO")
    try:
        return format_pci(info.domain, info.bus, info.device, info.function)
    except (AttributeError, TypeError, ValueError):
        return None


def _text(value: Any) -> str | None:
    """A property as text; an NPU's version is a number."""
    return None if value is None else str(value).strip() or None
