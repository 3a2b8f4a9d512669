"""What macOS tells of a machine, through its commands. Written from documents, and untested.

``sysctl`` names: https://developer.apple.com/documentation/kernel/1387446-sysctlbyname and
https://developer.apple.com/documentation/kernel/determining-instruction-set-characteristics.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from typing import Any, TypeAlias

from phirt.devices.machine import Cpu, PciDevice
from phirt.devices.vendors import cpu_vendor, pci_vendor

__all__ = ["RunCommand", "read_cpu", "read_pci"]

RunCommand: TypeAlias = Callable[[list[str]], str]
"""What a command prints; empty where it failed."""

_TIMEOUT_S = 10.0
_FEATURES = {
    "hw.optional.avx2_0": "avx2",
    "hw.optional.avx512f": "avx512f",
    "hw.optional.arm.FEAT_DotProd": "asimddp",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_BF16": "bf16",
    "hw.optional.arm.FEAT_SME": "sme",
    "hw.optional.arm.FEAT_SME2": "sme2",
}
_NAME = "machdep.cpu.brand_string"
_CORES = "hw.physicalcpu"


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(  # noqa: S603  # commands of this file
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def read_cpu(*, architecture: str, threads: int, run: RunCommand = _run) -> Cpu:
    """The processor.

    Args:
        architecture: As in `Cpu`.
        threads: As in `Cpu`.
        run: Runs a command.
    """
    # Names that this system does not know are complained of on stderr, and left out.
    rows = run(["/usr/sbin/sysctl", _NAME, _CORES, *_FEATURES]).splitlines()
    fields = dict(row.split(": ", 1) for row in rows if ": " in row)
    name = fields.get(_NAME, f"{architecture} processor")
    cores = fields.get(_CORES, "")
    return Cpu(
        name=name,
        vendor=cpu_vendor(name),
        architecture=architecture,
        cores=int(cores) if cores.isdecimal() else None,
        threads=threads,
        features=tuple(sorted(word for key, word in _FEATURES.items() if fields.get(key) == "1")),
    )


def read_pci(cpu: Cpu, run: RunCommand = _run) -> tuple[PciDevice, ...]:
    """The graphics processors."""
    if cpu.vendor == "apple":
        # One chip, which system_profiler would take most of a second to name.
        return (PciDevice(kind="gpu", vendor="apple", name=cpu.name),)
    text = run(["/usr/sbin/system_profiler", "-json", "SPDisplaysDataType"])
    try:
        found = json.loads(text)["SPDisplaysDataType"]
        return tuple(_display(entry) for entry in found)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return ()  # a version of macOS that says it otherwise


def _display(entry: dict[str, Any]) -> PciDevice:
    # "sppci_vendor_amd", or "AMD (0x1002)"
    vendor = str(entry.get("spdisplays_vendor", ""))
    number = re.search(r"0x([0-9a-fA-F]{4})", vendor)
    size = re.fullmatch(r"(\d+) (MB|GB)", str(entry.get("spdisplays_vram", "")))
    return PciDevice(
        kind="gpu",
        vendor=pci_vendor(int(number[1], 16)) if number else cpu_vendor(vendor),
        name=str(entry["sppci_model"]),
        memory_bytes=int(size[1]) << (20 if size[2] == "MB" else 30) if size else None,
    )
