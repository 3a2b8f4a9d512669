"""What Linux tells of a machine, in files.

Formats: https://docs.kernel.org/PCI/sysfs-pci.html and proc(5). Every function takes the root
of the file system, so that the files of another machine can be read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path

from phirt.devices.machine import Cpu, PciDevice
from phirt.devices.vendors import cpu_vendor, pci_vendor

__all__ = ["read_cpu", "read_drivers", "read_pci"]

_ROOT = Path("/")

# Instruction sets that kernels for matrices and quantized weights are written for.
_FEATURES = {
    "avx", "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx10",
    "amx_tile", "amx_int8", "amx_bf16", "amx_fp16", "f16c", "fma", "sse4_2",
    "asimd", "asimddp", "asimdhp", "bf16", "i8mm", "sve", "sve2", "svei8mm", "sme", "sme2",
}  # fmt: skip

# Where distributions keep the names of PCI devices.
_NAMES = ("usr/share/hwdata/pci.ids", "usr/share/misc/pci.ids")
# Modules of graphics and neural processors that carry a version of their own.
_MODULES = ("nvidia", "amdgpu", "i915", "xe", "intel_vpu", "amdxdna")


def read_cpu(*, architecture: str, allowed: Collection[int], root: Path = _ROOT) -> Cpu:
    """The processor, from ``/proc/cpuinfo``.

    Args:
        architecture: As in `Cpu`.
        allowed: Numbers of the logical processors that this process may use.
        root: Root of the file system.
    """
    fields: dict[str, str] = {}
    for line in _text(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = f"{fields.get('flags', '')} {fields.get('Features', '')}".split()
    name = fields.get("model name") or fields.get("Hardware") or f"{architecture} processor"
    return Cpu(
        name=" ".join(name.split()),
        vendor=cpu_vendor(fields.get("vendor_id") or fields.get("CPU implementer", ""), name),
        architecture=architecture,
        cores=_cores(allowed, root),
        threads=len(allowed),
        features=tuple(sorted(_FEATURES.intersection(flags))),
    )


def read_pci(root: Path = _ROOT) -> tuple[PciDevice, ...]:
    """Display controllers and processing accelerators, from ``/sys/bus/pci``, by address."""
    folder = root / "sys/bus/pci/devices"
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return ()  # no PCI here, or a container that hides it
    return tuple(device for entry in entries if (device := _read_device(entry, root)))


def read_drivers(root: Path = _ROOT) -> dict[str, str]:
    """Versions of kernel modules, and which OpenCL and Vulkan drivers are installed."""
    drivers = {}
    for name in _MODULES:
        if version := _module_version(name, root):
            drivers[name] = version
    # Of these, the names are what is known without loading them.
    for name, folders, suffix in (
        ("opencl", ("etc/OpenCL/vendors",), ".icd"),
        ("vulkan", ("usr/share/vulkan/icd.d", "etc/vulkan/icd.d"), ".json"),
    ):
        found = {file.stem for folder in folders for file in (root / folder).glob(f"*{suffix}")}
        if found:
            drivers[name] = ", ".join(sorted(found))
    return drivers


def _read_device(entry: Path, root: Path) -> PciDevice | None:
    number = _hexadecimal(entry / "class")
    vendor_id = _hexadecimal(entry / "vendor")
    if number is None or vendor_id is None:
        return None
    vendor = pci_vendor(vendor_id)
    base_class = number >> 16
    if base_class == 0x03:  # display controller
        kind = "gpu"
    elif base_class == 0x12:  # processing accelerator, as AMD's Instinct GPUs call themselves too
        kind = "gpu" if vendor == "amd" else "npu"
    else:
        return None
    driver = _driver(entry, root)
    memory = _text(entry / "mem_info_vram_total").strip()  # amdgpu's
    return PciDevice(
        kind="gpu" if kind == "gpu" else "npu",
        vendor=vendor,
        name=_nvidia_name(entry.name, root) or _name(vendor_id, entry, root),
        pci=entry.name.lower(),
        driver=driver,
        memory_bytes=int(memory) if memory.isdecimal() else None,
    )


def _driver(entry: Path, root: Path) -> str | None:
    link = entry / "driver"
    if not link.exists():
        return None
    name = link.resolve().name
    version = _module_version(name, root)
    return f"{name} {version}" if version else name


def _module_version(name: str, root: Path) -> str:
    version = _text(root / "sys/module" / name / "version").strip()
    if not version and name == "nvidia":
        # "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03  Tue Jun  6 …"
        text = _text(root / "proc/driver/nvidia/version")
        found = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
        version = found[1] if found else ""
    return version


def _nvidia_name(address: str, root: Path) -> str | None:
    text = _text(root / "proc/driver/nvidia/gpus" / address / "information")
    found = re.search(r"^Model:\s*(.+?)\s*$", text, re.MULTILINE)
    return found[1] if found else None


def _name(vendor: int, entry: Path, root: Path) -> str | None:
    """The device's name in the list of all PCI devices, where the system has one."""
    device = _hexadecimal(entry / "device")
    for file in _NAMES:
        try:
            data = (root / file).read_bytes()
        except OSError:
            continue
        # "8086  Intel Corporation", and below it, "\t46a6  Alder Lake-P GT2 [Iris Xe Graphics]"
        start = data.find(f"\n{vendor:04x}  ".encode())
        stop = re.compile(rb"\n[0-9a-fA-F]").search(data, start + 1) if start >= 0 else None
        block = data[start : stop.start() if stop else None] if start >= 0 else b""
        found = re.search(rb"\n\t%04x  ([^\n]+)" % (device or 0), block)
        if found:
            return found[1].decode("utf-8", errors="replace").strip()
    return None


def _cores(allowed: Collection[int], root: Path) -> int | None:
    """Physical cores among logical processors: those that share one list their siblings alike."""
    folder = root / "sys/devices/system/cpu"
    siblings = {_text(folder / f"cpu{number}/topology/core_cpus_list") for number in allowed}
    return len(siblings) if siblings and "" not in siblings else None


def _hexadecimal(path: Path) -> int | None:
    try:
        return int(_text(path), 16)
    except ValueError:
        return None


def _text(path: Path) -> str:
    """A file's text; empty where there is none or it may not be read."""
    return "".join(_lines(path))


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            yield from file
    except OSError:
        return
