"""What a backend can do with a device, from what was recorded of the two."""

from __future__ import annotations

from typing import Literal, TypeAlias

from phirt.devices.device import DeviceBackend, Status
from phirt.devices.machine import BackendRecord, Machine, Quarantine
from phirt.devices.serving import Serving, is_known
from phirt.types import Availability

__all__ = ["backend_rows", "describe_system", "offer_row"]

_Judgement: TypeAlias = tuple[Status, str, str | None]

_SYSTEMS = {"linux": "Linux", "windows": "Windows", "macos": "macOS"}
_RELEASE = (
    "Update its driver or the runtime: with another version it is tried again. "
    "`phirt devices --refresh` releases it as it is."
)
_OF_LISTING: dict[str, Status] = {
    "missing": "missing",
    "broken": "broken",
    "no device": "no-device",
}
_OF_TRIAL: dict[str, Status] = {
    "ran": "ready",
    "no device": "no-device",
    "not run": "unverified",
}


def offer_row(
    machine: Machine, record: BackendRecord, offer: Availability, serving: Serving | None
) -> DeviceBackend:
    """The row of a device that the backend lists.

    Args:
        machine: The record of the machine.
        record: That of the backend.
        offer: What it lists.
        serving: Its way to the device, or None where phirt knows none.
    """
    status, reason, fix = _judge(machine, record, offer)
    if status == "no-device" and fix is None and serving is not None:
        fix = serving.driver  # The system does see it.
    return DeviceBackend(
        backend=record.backend,
        device=offer.device,
        native=None if offer.hardware is None else offer.hardware.native,
        version=offer.version or record.version,
        status=status,
        reason=reason,
        fix=fix,
    )


def backend_rows(
    machine: Machine,
    record: BackendRecord,
    serving: Serving | None,
    *,
    kind: Literal["cpu", "gpu", "npu"],
) -> list[DeviceBackend]:
    """The row of a device that the backend does not list; none where it never could.

    Args:
        machine: The record of the machine.
        record: That of the backend.
        serving: Its way to the device, or None where phirt knows none.
        kind: Kind of the device.
    """
    fault = _fault(record)
    if fault is not None:
        status, reason, fix = fault
        if status == "missing" and serving is not None:
            reason, fix = "Its runtime is not installed.", serving.fix(machine.distributions)
        elif status == "missing" and is_known(record.backend):
            here = describe_system(machine)
            reason, fix = f"It has no version for {here}.", None
    elif serving is None or kind == "cpu":
        return []  # It works, and is not for this device.
    elif serving.is_installed(machine.distributions):
        status, fix = "no-device", serving.driver
        reason = f"{record.version or 'Its runtime'} is installed, and does not find the device."
    else:
        status, fix = "missing", serving.build or serving.fix(machine.distributions)
        reason = f"{record.version or 'The runtime that'} is installed, and does not serve it."
    return [
        DeviceBackend(
            backend=record.backend,
            device="cpu" if serving is None else serving.device,
            native=None,
            version=record.version,
            status=status,
            reason=reason,
            fix=fix,
        )
    ]


def describe_system(machine: Machine) -> str:
    """The system and its processor, as in ``"Windows on arm64"``."""
    return f"{_SYSTEMS.get(machine.system, machine.system)} on {machine.cpu.architecture}"


def _fault(record: BackendRecord) -> _Judgement | None:
    """Why the backend serves no device at all, or None where it serves some."""
    if record.outcome == "not run":
        return "unverified", record.reason, record.fix
    if record.outcome != "listed":
        return "broken", record.reason, record.fix
    if any(offer.status not in ("missing", "broken") for offer in record.listing):
        return None
    faults = sorted(record.listing, key=lambda offer: offer.status)  # "broken" before "missing"
    for offer in faults:
        return _OF_LISTING[offer.status], offer.reason, offer.fix
    return "no-device", "It lists no device.", None


def _judge(machine: Machine, record: BackendRecord, offer: Availability) -> _Judgement:
    if offer.status in ("missing", "broken", "no device"):
        return _OF_LISTING[offer.status], offer.reason, offer.fix
    entry = _quarantine(machine, record, offer)
    if entry is not None:
        driver = f" with driver {entry.driver}" if entry.driver else ""
        reason = f"Quarantined since {entry.when}{driver}: {entry.reason}"
        return "broken", reason, _RELEASE
    trial = record.trial(offer.device)
    if trial is None:
        # What an adapter says of what it found is a list of names and versions.
        found = offer.reason.rstrip(".").removesuffix(": not tried")
        if offer.status == "ran":
            return "ready", f"It ran something there: {found}.", offer.fix
        return "unverified", f"It sees the device, and nothing was run there: {found}.", offer.fix
    return _OF_TRIAL.get(trial.outcome, "broken"), trial.reason, trial.fix


def _quarantine(machine: Machine, record: BackendRecord, offer: Availability) -> Quarantine | None:
    """The entry that holds: another runtime or driver may be right."""
    driver = None if offer.hardware is None else offer.hardware.driver
    here = (record.backend, offer.device, offer.version or record.version, driver)
    for entry in machine.quarantine:
        if (entry.backend, entry.device, entry.version, entry.driver) == here:
            return entry
    return None
