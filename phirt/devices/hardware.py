"""What the system, and no runtime, tells of this machine."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from phirt.devices.machine import Cpu, Machine, PciDevice
from phirt.devices.record_json import to_json

__all__ = ["System", "hardware_id", "read_environment", "read_system"]

# Variables that change which devices the runtimes and their drivers see, and what they load.
_VARIABLES = (
    "CUDA_DEVICE_ORDER",
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "HSA_OVERRIDE_GFX_VERSION",
    "ONEAPI_DEVICE_SELECTOR",
    "ZE_AFFINITY_MASK",
    "ZE_FLAT_DEVICE_HIERARCHY",
    "OCL_ICD_VENDORS",
    "OCL_ICD_FILENAMES",
    "VK_DRIVER_FILES",
    "VK_ADD_DRIVER_FILES",
    "VK_ICD_FILENAMES",
    "MESA_VK_DEVICE_SELECT",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "DYLD_LIBRARY_PATH",
)
_SYSTEMS = {"win32": "windows", "darwin": "macos"}
_ARCHITECTURES = {"amd64": "x86_64", "x64": "x86_64", "aarch64": "arm64"}


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """What the system tells; the fields are those of `Machine`."""

    system: str
    release: str
    cpu: Cpu
    pci: tuple[PciDevice, ...]
    drivers: Mapping[str, str]


def read_system() -> System:
    """Ask the system. It costs milliseconds and opens no device."""
    machine = platform.machine().lower()
    architecture = _ARCHITECTURES.get(machine, machine)
    if sys.platform == "win32":
        cpu, pci, drivers = _ask_windows(architecture)
    elif sys.platform == "darwin":
        cpu, pci, drivers = _ask_macos(architecture)
    else:
        cpu, pci, drivers = _ask_linux(architecture)
    return System(
        system=_SYSTEMS.get(sys.platform, "linux"),
        release=platform.release(),
        cpu=cpu,
        pci=pci,
        drivers=drivers,
    )


def read_environment() -> dict[str, str]:
    """The variables that are set and that change what runtimes see."""
    return {name: os.environ[name] for name in _VARIABLES if name in os.environ}


def hardware_id(machine: Machine) -> str:
    """Identifies what a speed was measured on: processor, memory, devices and their drivers.

    Returns:
        16 hexadecimal digits.
    """
    parts = {
        "cpu": to_json(machine.cpu),
        # What a kernel keeps for itself differs from boot to boot.
        "memory_gib": round(machine.memory.total / 2**30),
        "pci": [to_json(device) for device in machine.pci],
        "drivers": dict(machine.drivers),
    }
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _ask_linux(architecture: str) -> tuple[Cpu, tuple[PciDevice, ...], Mapping[str, str]]:
    from phirt.devices import linux

    if hasattr(os, "sched_getaffinity"):
        allowed = os.sched_getaffinity(0)
    else:  # a Unix that is not Linux
        allowed = set(range(os.cpu_count() or 1))
    cpu = linux.read_cpu(architecture=architecture, allowed=allowed)
    return cpu, linux.read_pci(), linux.read_drivers()


def _ask_windows(architecture: str) -> tuple[Cpu, tuple[PciDevice, ...], Mapping[str, str]]:
    import psutil

    from phirt.devices import windows

    cores = psutil.cpu_count(logical=False)
    threads = os.cpu_count() or 1
    cpu = windows.read_cpu(architecture=architecture, cores=cores, threads=threads)
    return cpu, windows.read_pci(), windows.read_drivers()


def _ask_macos(architecture: str) -> tuple[Cpu, tuple[PciDevice, ...], Mapping[str, str]]:
    from phirt.devices import macos

    cpu = macos.read_cpu(architecture=architecture, threads=os.cpu_count() or 1)
    # Its drivers come with the system, whose release says their version.
    return cpu, macos.read_pci(cpu), {}
