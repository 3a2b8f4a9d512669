"""Small records of machines, in which a test says only what it is about."""

from __future__ import annotations

from typing import Any

from phirt.devices.device import Device, DeviceBackend
from phirt.devices.machine import BackendRecord, Cpu, Machine, Memory, PciDevice, Trial
from phirt.types import Availability, Hardware

CPU = Cpu(name="Test CPU", vendor="intel", architecture="x86_64", cores=4, threads=8)

NVIDIA = PciDevice(
    kind="gpu", vendor="nvidia", name="GeForce RTX 4090", pci="0000:01:00.0", driver="nvidia 570.1"
)
INTEL = PciDevice(
    kind="gpu", vendor="intel", name="Iris Xe Graphics", pci="0000:00:02.0", driver="i915"
)
NPU = PciDevice(kind="npu", vendor="intel", name="NPU", pci="0000:00:0b.0", driver="intel_vpu")
ASPEED = PciDevice(kind="gpu", vendor="aspeed", name="AST2500", pci="0000:05:00.0")


def make_machine(*backends: BackendRecord, **fields: Any) -> Machine:
    settings: dict[str, Any] = {
        "phirt": "0",
        "python": "3.11.0",
        "system": "linux",
        "cpu": CPU,
        "memory": Memory(total=32_000_000_000, available=16_000_000_000),
        "backends": backends,
    }
    return Machine(**settings | fields)


def listed(backend: str, *offers: Availability, **fields: Any) -> BackendRecord:
    """The record of a backend that lists these devices."""
    settings: dict[str, Any] = {"version": f"{backend} 1.0"}
    return BackendRecord(backend=backend, outcome="listed", listing=offers, **settings | fields)


def offer(device: str, native: str | None = None, **hardware: Any) -> Availability:
    """A device that is seen, and what its runtime tells of it where it has a native name."""
    told = None if native is None else Hardware(native=native, **hardware)
    return Availability(device, "found", f"{device} is seen", hardware=told)


def missing(backend: str, module: str | None = None) -> BackendRecord:
    """The record of a backend whose runtime is not installed."""
    reason = f"Backend {backend!r} needs the package {module or backend!r}."
    found = Availability("cpu", "missing", reason, 'python -m pip install "phirt[x]"')
    return BackendRecord(backend=backend, outcome="listed", listing=(found,))


def ran(device: str) -> Trial:
    return Trial(device=device, outcome="ran", reason="A tiny model ran there.", kl=0.001)


def names(devices: list[Device]) -> list[str]:
    return [device.name for device in devices]


def rows(device: Device) -> list[tuple[str, str, str]]:
    """Backend, device name and status of each row."""
    return [(row.backend, row.device, row.status) for row in device.backends]


def row_of(device: Device, backend: str) -> DeviceBackend:
    (row,) = [row for row in device.backends if row.backend == backend]
    return row
