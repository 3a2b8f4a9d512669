"""Which devices torch finds on this machine, and what it tells of them.

Importing torch takes seconds, so nothing here imports it unless an accelerator may be found:
what torch was built for is read from the text of its ``version.py``.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

from phirt.backends.importing import import_runtime
from phirt.backends.transformers.devices import BACKEND, EXTRA, find_versions, offered_names
from phirt.devices.identity import format_pci, parse_uuid
from phirt.devices.names import DeviceName
from phirt.devices.vendors import cpu_vendor
from phirt.protocols import Availability
from phirt.types import Hardware

__all__ = ["list_devices"]

# What torch may be built for: phirt's kind of device, and the driver's library on Linux and on
# Windows, without which no device of that kind is here.
_BUILDS = {
    "cuda": ("cuda", "libcuda.so.1", "nvcuda.dll"),
    "hip": ("cuda", "libamdhip64.so", "amdhip64.dll"),
    "xpu": ("gpu", "libze_loader.so.1", "ze_loader.dll"),
}


def list_devices() -> list[Availability]:
    """The CPU, and what torch finds of each kind of device that it was built for.

    Raises:
        BackendNotInstalledError: transformers or torch is not installed.
        BackendBrokenError: transformers is too old, or torch does not import.
    """
    version = find_versions()
    missing = {build: _missing_library(build) for build in _builds()}
    names = ["cpu"]
    torch = None
    if "torch" in sys.modules or sys.platform == "darwin" or None in missing.values():
        torch = import_runtime("torch", backend=BACKEND, extra=EXTRA)
        names = offered_names(torch)
    entries = [
        Availability(
            name,
            "found",
            version,
            version=version,
            hardware=_describe(torch, DeviceName.parse(name)),
        )
        for name in names
    ]
    kinds = {name.partition(":")[0] for name in names}
    for build, library in missing.items():
        if (kind := _BUILDS[build][0]) not in kinds:
            why = f"the driver's library {library} is not here" if library else "torch finds none"
            reason = f"{version} is built for {build}; {why}"
            entries.append(Availability(kind, "no device", reason, version=version))
    return entries


def _builds() -> list[str]:
    """What the installed torch was built for."""
    if (torch := sys.modules.get("torch")) is not None:
        return [build for build in _BUILDS if getattr(torch.version, build, None) is not None]
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return []
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return list(_BUILDS)  # Not how torch is laid out today.
    named = set(re.findall(r"^(\w+)\s*(?::[^=]*)?=\s*['\"]", text, re.MULTILINE))
    return [build for build in _BUILDS if build in named]


def _missing_library(build: str) -> str | None:
    """The driver's library, where it is not here."""
    name = _BUILDS[build][2 if sys.platform == "win32" else 1]
    try:
        ctypes.CDLL(name)
    except OSError:
        return name
    return None


def _describe(torch: Any, device: DeviceName) -> Hardware:
    """The hardware, from torch's properties, which differ by version and kind of device."""
    index = device.index or 0
    try:
        match device.kind:
            case "cuda":
                return _describe_cuda(torch, index)
            case "gpu":
                return _describe_xpu(torch, index)
            case "metal":
                return _describe_mps(torch)
    # They ask drivers, and a device whose properties fail is still a device.
    except Exception:
        return Hardware(native=f"{device.kind}:{index}")
    return Hardware(native="cpu")


def _describe_cuda(torch: Any, index: int) -> Hardware:
    properties = torch.cuda.get_device_properties(index)
    is_amd = getattr(torch.version, "hip", None) is not None
    integrated = getattr(properties, "is_integrated", None)
    return Hardware(
        native=f"cuda:{index}",
        name=properties.name,
        vendor="amd" if is_amd else "nvidia",
        memory_bytes=properties.total_memory,
        pci=_pci(properties),
        # HIP writes the digits of a serial number where a UUID's bytes belong.
        uuid=None if is_amd else parse_uuid(getattr(properties, "uuid", "")),
        discrete=None if integrated is None else not integrated,
    )


def _describe_xpu(torch: Any, index: int) -> Hardware:
    properties = torch.xpu.get_device_properties(index)
    integrated = getattr(properties, "is_integrated_gpu", None)
    return Hardware(
        native=f"xpu:{index}",
        name=properties.name,
        vendor=cpu_vendor(properties.name),
        memory_bytes=properties.total_memory,
        driver=properties.driver_version,
        uuid=parse_uuid(getattr(properties, "uuid", "")),
        discrete=None if integrated is None else not integrated,
    )


def _describe_mps(torch: Any) -> Hardware:
    # Metal's memory is the host's; so much of it torch may take.
    name = torch.backends.mps.get_name()
    return Hardware(
        native="mps",
        name=name,
        vendor=cpu_vendor(name),
        memory_bytes=torch.mps.recommended_max_memory(),
        discrete=cpu_vendor(name) != "apple",
    )


def _pci(properties: Any) -> str | None:
    try:
        return format_pci(properties.pci_domain_id, properties.pci_bus_id, properties.pci_device_id)
    except AttributeError:
        return None
