"""What Windows tells of a machine, in its registry. Written from documents, and untested.

The classes of devices:
https://learn.microsoft.com/windows-hardware/drivers/install/system-defined-device-setup-classes-available-to-vendors
The values of a graphics driver:
https://learn.microsoft.com/windows-hardware/drivers/display/registering-hardware-information
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, TypeAlias

from phirt.devices.machine import Cpu, PciDevice
from phirt.devices.vendors import cpu_vendor, pci_vendor

__all__ = ["ReadKeys", "read_cpu", "read_drivers", "read_pci"]

Values: TypeAlias = Mapping[str, object]

ReadKeys: TypeAlias = Callable[[str], list[Values]]
"""The values of a key's subkeys, one mapping each, by the path below HKEY_LOCAL_MACHINE."""

_PROCESSORS = r"HARDWARE\DESCRIPTION\System\CentralProcessor"
_CLASSES = r"SYSTEM\CurrentControlSet\Control\Class"
_KINDS: tuple[tuple[Literal["gpu", "npu"], str], ...] = (
    ("gpu", "{4d36e968-e325-11ce-bfc1-08002be10318}"),  # Display
    ("npu", "{f01a9d53-3ff6-48d2-9f97-c8a7004be10c}"),  # ComputeAccelerator
)


def _winreg_keys(path: str) -> list[Values]:
    return list(_subkeys(path))


if sys.platform == "win32":
    import winreg

    def _subkeys(path: str) -> Iterator[Values]:
        try:
            parent = winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, path)
        except OSError:
            return
        with parent:
            for index in range(winreg.QueryInfoKey(parent)[0]):
                try:
                    with winreg.OpenKey(parent, winreg.EnumKey(parent, index)) as key:
                        count = winreg.QueryInfoKey(key)[1]
                        rows = (winreg.EnumValue(key, number) for number in range(count))
                        yield {name: value for name, value, _ in rows}
                except OSError:
                    continue  # "Properties" is for the system alone

else:

    def _subkeys(path: str) -> Iterator[Values]:  # noqa: ARG001  # there is no registry
        yield from ()


def read_cpu(
    *, architecture: str, cores: int | None, threads: int, read_keys: ReadKeys = _winreg_keys
) -> Cpu:
    """The processor.

    Args:
        architecture: As in `Cpu`.
        cores: As in `Cpu`.
        threads: As in `Cpu`.
        read_keys: Reads the registry.
    """
    values: Values = next(iter(read_keys(_PROCESSORS)), {})
    name = str(values.get("ProcessorNameString", f"{architecture} processor"))
    return Cpu(
        name=" ".join(name.split()),
        vendor=cpu_vendor(str(values.get("VendorIdentifier", "")), name),
        architecture=architecture,
        cores=cores,
        threads=threads,
    )


def read_pci(read_keys: ReadKeys = _winreg_keys) -> tuple[PciDevice, ...]:
    """Display adapters and compute accelerators that a driver is installed for."""
    return tuple(
        PciDevice(
            kind=kind,
            vendor=_vendor(values),
            name=str(values["DriverDesc"]),
            driver=_driver(values),
            memory_bytes=_memory(values),
        )
        for kind, guid in _KINDS
        for values in read_keys(rf"{_CLASSES}\{guid}")
        if "DriverDesc" in values
    )


def read_drivers(read_keys: ReadKeys = _winreg_keys) -> dict[str, str]:
    """Versions of their drivers, by the devices' names."""
    return {
        device.name: device.driver
        for device in read_pci(read_keys)
        if device.name and device.driver
    }


def _vendor(values: Values) -> str | None:
    # "PCI\VEN_10DE&DEV_2684&SUBSYS_…"; a Snapdragon's GPU is no PCI device: "ACPI\QCOM0C36".
    identifier = str(values.get("MatchingDeviceId", ""))
    found = re.search(r"VEN_([0-9A-F]{4})&", identifier, re.IGNORECASE)
    if found:
        return pci_vendor(int(found[1], 16))
    return "qualcomm" if "qcom" in identifier.lower() else None


def _driver(values: Values) -> str | None:
    version = values.get("DriverVersion")
    return version if isinstance(version, str) and version else None


def _memory(values: Values) -> int | None:
    size = values.get("HardwareInformation.qwMemorySize")
    return size if isinstance(size, int) and size > 0 else None
