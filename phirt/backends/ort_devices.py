"""The devices that onnxruntime tells of, for every adapter that runs on it.

``get_ep_devices`` pairs the execution providers that are inside onnxruntime (CPU, DirectML,
WebGPU) and the plugins that are registered with the devices that the system has. The keys of a
device's metadata are those of onnxruntime's sources, ``core/platform/*/device_discovery.cc``:
``pci_bus_id`` and ``Discrete`` on Linux; ``LUID``, ``Description``, ``DxgiAdapterNumber``,
``DxgiVideoMemory`` and ``Discrete`` on Windows; none on macOS. CUDA's provider comes with a wheel
and is in no list: NVIDIA's driver is asked instead.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from phirt.backends.probing import may_start_drivers
from phirt.devices.cuda import cuda_devices, open_driver
from phirt.devices.identity import parse_luid_number, parse_pci
from phirt.devices.vendors import cpu_vendor, pci_vendor
from phirt.errors import BackendBrokenError, DeviceNotAvailableError
from phirt.types import Availability, Hardware

__all__ = ["DIRECTML", "WEBGPU", "cuda_entries", "describe", "ep_devices", "listed_entries"]

DIRECTML = "DmlExecutionProvider"
WEBGPU = "WebGpuExecutionProvider"

# Where a Vulkan loader is told of drivers, which may be in software, and which onnxruntime's list
# of the system's devices knows nothing of.
_VULKAN_VARIABLES = ("VK_DRIVER_FILES", "VK_ICD_FILENAMES", "VK_ADD_DRIVER_FILES")


def ep_devices(ort: Any, provider: str) -> list[Any]:
    """The ``OrtEpDevice``s of a provider; none where onnxruntime cannot tell."""
    try:
        return [found for found in ort.get_ep_devices() if found.ep_name == provider]
    # An older onnxruntime has no list, and reading the system's devices may fail.
    except Exception:
        return []


def describe(found: Any, index: int = 0) -> Hardware:
    """The hardware of an ``OrtEpDevice``.

    Args:
        found: The device.
        index: Its number, for its name.
    """
    provider = found.ep_name.removesuffix("ExecutionProvider")
    is_cpu = found.device.type.name == "CPU"
    native = provider if is_cpu else f"{provider} {index}"
    try:
        return _read_metadata(found, native, is_cpu=is_cpu)
    # Texts of drivers, which need not be UTF-8: a device without a name is still a device.
    except Exception:
        return Hardware(native=native)


def _read_metadata(found: Any, native: str, *, is_cpu: bool) -> Hardware:
    hardware = found.device
    metadata = {key.lower(): value for key, value in dict(hardware.metadata).items()}
    discrete = {"0": False, "1": True}.get(metadata.get("discrete", ""))
    return Hardware(
        native=native,
        name=" ".join(metadata.get("description", "").split()) or None,
        vendor=pci_vendor(hardware.vendor_id) or cpu_vendor(hardware.vendor),
        memory_bytes=None if is_cpu else _memory(metadata),
        driver=dict(found.ep_metadata).get("os_driver_version"),
        pci=parse_pci(metadata.get("pci_bus_id")),
        luid=parse_luid_number(metadata.get("luid")),
        discrete=discrete,
        software=metadata.get("is_virtual") == "1",
    )


def cuda_entries(kind: str, *, version: str, reason: str) -> list[Availability]:
    """What a CUDA provider can have: the devices of NVIDIA's driver, where it may be started.

    Args:
        kind: What phirt calls the device, without a number.
        version: Of the runtime.
        reason: What is installed for it.
    """
    try:
        library = open_driver()
        if not may_start_drivers():
            return [Availability(kind, "found", f"{reason}: not tried", version=version)]
        found = cuda_devices(library)
    except DeviceNotAvailableError as error:
        return [Availability(kind, "no device", f"{reason}: {error}", version=version)]
    except BackendBrokenError as error:
        return [Availability(kind, "broken", f"{reason}: {error}", version=version)]
    return _numbered(kind, found, version=version, reason=reason)


def listed_entries(
    ort: Any, provider: str, kind: str, *, version: str, reason: str
) -> list[Availability]:
    """What a provider inside onnxruntime can have: the devices that onnxruntime lists for it.

    Args:
        ort: The onnxruntime module.
        provider: The provider.
        kind: What phirt calls the device, without a number.
        version: Of the runtime.
        reason: What is installed for it.
    """
    found = ep_devices(ort, provider)
    if provider == WEBGPU and not found and any(map(os.environ.get, _VULKAN_VARIABLES)):
        hardware = Hardware(native="WebGpu", software=True)
        reason += "; a driver that the environment names may serve it"
        return [Availability(kind, "found", reason, version=version, hardware=hardware)]
    if not found:
        reason += ": onnxruntime sees no GPU here"
        return [Availability(kind, "no device", reason, version=version)]
    if provider == DIRECTML:
        numbers = [_adapter(each, position) for position, each in enumerate(found)]
        devices = [describe(each, number) for each, number in zip(found, numbers, strict=True)]
        return _numbered(kind, devices, numbers=numbers, version=version, reason=reason)
    # WebGPU takes the device that the system prefers, whatever number it is given.
    return _numbered(kind, [describe(found[0])], version=version, reason=reason)


def _numbered(
    kind: str,
    devices: list[Hardware],
    *,
    numbers: list[int] | None = None,
    version: str,
    reason: str,
) -> list[Availability]:
    """Entries of one kind: ``"cuda"`` where number 0 is the only one, else ``"cuda:1"`` …."""
    indices = list(range(len(devices))) if numbers is None else numbers
    is_plain = indices == [0]
    return [
        Availability(
            kind if is_plain else f"{kind}:{index}",
            "found",
            f"{reason}: not tried",
            version=version,
            hardware=hardware,
        )
        for index, hardware in sorted(zip(indices, devices, strict=True), key=lambda pair: pair[0])
    ]


def _adapter(found: Any, position: int) -> int:
    """The number that DirectML has for a device: ``device_id``, as DXGI counts adapters."""
    number = str(dict(found.ep_options).get("device_id", ""))
    return int(number) if number.isdecimal() else position


def _memory(metadata: Mapping[str, str]) -> int | None:
    """``"8006 MB"``, in bytes; 0 is what an integrated GPU has of its own, and no answer."""
    match = re.fullmatch(r"(\d+) MB", metadata.get("dxgivideomemory", ""))
    return (int(match[1]) << 20 or None) if match else None
