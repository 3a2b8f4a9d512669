"""What to say of a runtime that is not installed, or not for a device, and what would bring it."""

from __future__ import annotations

from collections.abc import Sequence

from phirt.devices.machine import BackendRecord, Machine
from phirt.devices.names import DeviceName
from phirt.devices.rows import describe_system
from phirt.devices.serving import Serving, is_known, ways_of
from phirt.types import Availability

__all__ = ["how_served", "why_missing"]

# Of other kinds ("coreml", "openvino-auto", a plugin's) nobody has written down who brings them.
_SERVED = ("cuda", "directml", "gpu", "metal", "npu", "webgpu")


def why_missing(
    machine: Machine, record: BackendRecord, offer: Availability, device: DeviceName
) -> tuple[str, str | None]:
    """The reason, and the command that installs what serves the device that was asked for.

    Args:
        machine: The record of the machine.
        record: The backend's.
        offer: What stands in it for the runtime that is missing.
        device: The device that was asked for.
    """
    if not is_known(record.backend):
        return offer.reason, offer.fix  # A plugin knows itself what it needs.
    ways = ways_of(record.backend, system=machine.system, architecture=machine.cpu.architecture)
    if not any(way.kind == "cpu" for way in ways):  # what has none for the CPU, has none at all
        return f"it has no version for {describe_system(machine)}", None
    wanted = device.kind if device.kind in _SERVED else "cpu"
    serving = _way_to(wanted, ways, machine)
    if serving is None:
        return f"it is not installed, and would not serve {wanted!r} by itself", None
    return "its runtime is not installed", serving.fix(machine.distributions)


def how_served(machine: Machine, record: BackendRecord, device: DeviceName) -> str | None:
    """What would let a runtime that is installed serve a device that it does not offer.

    Args:
        machine: The record of the machine.
        record: The backend's.
        device: The device that was asked for.
    """
    ways = ways_of(record.backend, system=machine.system, architecture=machine.cpu.architecture)
    serving = _way_to(device.kind, ways, machine)
    # Where others of the kind are offered, no installation brings one more.
    is_kind_offered = any(DeviceName.parse(o.device).kind == device.kind for o in record.listing)
    if serving is None or serving.kind == "cpu" or is_kind_offered:
        return None
    if serving.is_installed(machine.distributions):
        return serving.driver
    return serving.build or serving.fix(machine.distributions)


def _way_to(kind: str, ways: Sequence[Serving], machine: Machine) -> Serving | None:
    return next((way for way in ways if way.device == kind and _is_for(way, machine)), None)


def _is_for(way: Serving, machine: Machine) -> bool:
    """Whether it may be for one of the machine's devices; the system need not show them."""
    makers = {device.vendor for device in machine.pci if device.kind == way.kind}
    return not way.vendors or not makers or not makers.isdisjoint(way.vendors)
