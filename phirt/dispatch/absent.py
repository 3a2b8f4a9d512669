"""What to say of a backend whose runtime is not installed, and what would bring it."""

from __future__ import annotations

from phirt.devices.machine import BackendRecord, Machine
from phirt.devices.names import DeviceName
from phirt.devices.rows import describe_system
from phirt.devices.serving import Serving, is_known, ways_of
from phirt.types import Availability

__all__ = ["why_missing"]

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
    serving = next((way for way in ways if way.device == wanted and _is_for(way, machine)), None)
    if serving is None:
        return f"it is not installed, and would not serve {wanted!r} by itself", None
    return "its runtime is not installed", serving.fix(machine.distributions)


def _is_for(way: Serving, machine: Machine) -> bool:
    """Whether it may be for one of the machine's devices; the system need not show them."""
    makers = {device.vendor for device in machine.pci if device.kind == way.kind}
    return not way.vendors or not makers or not makers.isdisjoint(way.vendors)
