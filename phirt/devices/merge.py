"""From the record of a machine to its devices: each once, whatever the runtimes call it.

Two names mean one device where a PCI address, a LUID or a UUID is the same; where a runtime
tells none of them, the name, the maker and the order of what is left decide.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from phirt.devices.device import Device, DeviceBackend
from phirt.devices.machine import BackendRecord, Machine, PciDevice
from phirt.devices.names import DeviceName
from phirt.devices.rows import backend_rows, offer_row
from phirt.devices.serving import CHOOSERS, CPU_NAMES, VENDORS, Serving, find_serving
from phirt.types import Availability, Hardware

__all__ = ["devices_of", "to_try"]

Kind: TypeAlias = Literal["gpu", "npu"]

_LABELS = {
    "cuda": "CUDA GPU",
    "tensorrt-rtx": "NVIDIA GPU",
    "directml": "DirectX 12 GPU",
    "webgpu": "GPU of WebGPU",
    "metal": "Apple GPU",
    "coreml": "Core ML",
    "npu": "NPU",
    "gpu": "GPU",
}
_MARKS = re.compile(r"\((?:r|tm|igpu|dgpu|c)\)|\[.*?\]|[^a-z0-9]+", re.IGNORECASE)


def devices_of(machine: Machine) -> list[Device]:
    """The devices of a machine: the processor first, then what is computed by itself.

    Devices that the system sees and no runtime does are among them, with what is missing.

    Args:
        machine: A record, of this machine or of another.
    """
    groups = _Grouping(machine).groups
    found = [device for group in groups if (device := _device(machine, group)) is not None]
    # Stable: within a kind, the system's order stays.
    found.sort(key=lambda device: (device.software, device.kind == "npu"))
    return [_cpu(machine), *found]


def to_try(record: BackendRecord) -> list[str]:
    """The names of a backend's devices that a trial would tell something new of."""
    usable = [found.device for found in record.listing if found.status in ("found", "loads")]
    return [
        name
        for name in dict.fromkeys(usable)
        if record.trial(name) is None
        and DeviceName.parse(name).kind not in CHOOSERS
        # "cuda" is "cuda:0" where both are listed.
        and f"{name}:0" not in usable
    ]


@dataclass(slots=True, eq=False)
class _Group:
    """Names of one physical device."""

    kind: Kind
    pci: PciDevice | None = None
    keys: set[tuple[str, str]] = field(default_factory=set)
    offers: list[tuple[BackendRecord, Availability]] = field(default_factory=list)

    @property
    def hardware(self) -> list[Hardware]:
        return [offer.hardware for _, offer in self.offers if offer.hardware is not None]

    @property
    def software(self) -> bool:
        return any(hardware.software for hardware in self.hardware)

    @property
    def vendor(self) -> str | None:
        vendors = [hardware.vendor for hardware in self.hardware]
        vendors.append(None if self.pci is None else self.pci.vendor)
        return next((vendor for vendor in vendors if vendor), None)

    @property
    def names(self) -> set[str]:
        names = [hardware.name for hardware in self.hardware]
        names.append(None if self.pci is None else self.pci.name)
        return {_comparable(name) for name in names if name}

    def is_called(self, name: DeviceName) -> bool:
        """Whether some backend calls it so."""
        return name.is_one_of([offer.device for _, offer in self.offers])

    def has(self, record: BackendRecord, device: str) -> bool:
        """Whether the backend calls this device so already, with or without its number."""
        wanted = DeviceName.parse(device)
        return any(
            known is record and wanted.is_one_of([offer.device]) for known, offer in self.offers
        )


class _Grouping:
    """Puts every name of a device to the device.

    Attributes:
        groups: One a device, those that the system sees first.
    """

    def __init__(self, machine: Machine) -> None:
        self.groups = [
            _Group(kind=pci.kind, pci=pci, keys={("pci", pci.pci.lower())} if pci.pci else set())
            for pci in machine.pci
        ]
        offers = [
            (record, offer)
            for record in machine.backends
            for offer in record.listing
            if DeviceName.parse(offer.device).kind not in (*CPU_NAMES, *CHOOSERS)
        ]
        # Those that say best who they are leave the fewest places for the others to be guessed at.
        for record, offer in sorted(offers, key=lambda each: _vagueness(each[1].hardware)):
            group = self._by_keys(record, _keys(offer.hardware))
            self._add(group or self._by_likeness(record, offer), record, offer)

    def _add(self, group: _Group | None, record: BackendRecord, offer: Availability) -> None:
        if group is None:
            if offer.status in ("no device", "missing"):
                return  # nobody sees it, so that there is none
            group = _Group(kind=_kind(offer))
            self.groups.append(group)
        group.keys |= _keys(offer.hardware)
        group.offers.append((record, offer))

    def _by_keys(self, record: BackendRecord, keys: set[tuple[str, str]]) -> _Group | None:
        """The group that shares a key; several that do are one device, and become one.

        But what is at two addresses is two devices, whatever drivers say of their UUIDs.
        """
        found = [
            group for group in self.groups if group.keys & keys and not _are_apart(group.keys, keys)
        ]
        if not found:
            return None
        free = [group for group in found if all(known is not record for known, _ in group.offers)]
        group = (free or found)[0]
        for other in found:
            if other is not group and not _are_apart(group.keys, other.keys):
                group.keys |= other.keys
                group.offers += other.offers
                group.pci = group.pci or other.pci
                self.groups.remove(other)
        return group

    def _by_likeness(self, record: BackendRecord, offer: Availability) -> _Group | None:
        """The group of the same name, or of a maker that fits, or of the same device name."""
        hardware, name = offer.hardware, DeviceName.parse(offer.device)
        types = {kind for kind, _ in _keys(hardware)}
        fitting = [
            group
            for group in self.groups
            if group.kind == _kind(offer)
            and group.software == (hardware is not None and hardware.software)
            # A key of the same type was different, or it would have been found by it.
            and not types & {kind for kind, _ in group.keys}
        ]
        if hardware is not None and hardware.name:
            alike = [group for group in fitting if _comparable(hardware.name) in group.names]
            free = [group for group in alike if not group.has(record, offer.device)]
            if alike:
                return _nth(free or alike, 0)
            if hardware.software:
                return None
        vendors = VENDORS.get(name.kind, ())
        if hardware is not None and hardware.vendor:
            vendors = (hardware.vendor,)
        for vendor in vendors or (None,):
            of_vendor = [group for group in fitting if vendor in (None, group.vendor)]
            if types:
                # It has keys, so it is another device than those that have offers with keys.
                of_vendor = [group for group in of_vendor if not group.offers]
                return of_vendor[0] if of_vendor else None
            if of_vendor:
                # Runtimes on one driver count alike, and not always as the system does.
                number = DeviceName(name.kind, name.index or 0)
                named = [group for group in of_vendor if group.is_called(number)]
                return _nth(named, 0) or _nth(of_vendor, number.index or 0)
        return _nth([group for group in fitting if group.is_called(name)], 0)


def _nth(groups: list[_Group], index: int) -> _Group | None:
    return groups[index] if index < len(groups) else None


def _keys(hardware: Hardware | None) -> set[tuple[str, str]]:
    """What identifies a device; zeros are what a driver says that does not know."""
    if hardware is None:
        return set()
    given = {"pci": hardware.pci, "luid": hardware.luid, "uuid": hardware.uuid}
    return {
        (kind, value.lower()) for kind, value in given.items() if value and set(value) - set("0:.-")
    }


def _vagueness(hardware: Hardware | None) -> int:
    """0 with an address, which the system knows too; 1 with another identity; 2 with none."""
    kinds = {kind for kind, _ in _keys(hardware)}
    return 0 if "pci" in kinds else 1 if kinds else 2


def _are_apart(one: set[tuple[str, str]], other: set[tuple[str, str]]) -> bool:
    addresses = [{value for kind, value in keys if kind == "pci"} for keys in (one, other)]
    return all(addresses) and not addresses[0] & addresses[1]


def _kind(offer: Availability) -> Kind:
    return "npu" if DeviceName.parse(offer.device).kind == "npu" else "gpu"


def _comparable(name: str) -> str:
    return _MARKS.sub(" ", name.lower()).strip()


def _cpu(machine: Machine) -> Device:
    rows: list[DeviceBackend] = []
    for record in machine.backends:
        offers = [
            offer_row(machine, record, offer, None)
            for offer in record.listing
            if DeviceName.parse(offer.device).kind in CPU_NAMES and offer.status != "missing"
        ]
        serving = _serving(machine, record, kind="cpu")
        rows += offers or backend_rows(machine, record, serving, kind="cpu")
    return Device(
        device="cpu",
        name=machine.cpu.name,
        kind="cpu",
        memory_bytes=machine.memory.total,
        driver=None,
        backends=tuple(rows),
    )


def _device(machine: Machine, group: _Group) -> Device | None:
    rows = list(_rows(machine, group))
    if not rows:
        return None  # a display controller that nothing computes on
    is_seen = group.pci is not None or group.hardware
    if not is_seen and all(row.status == "no-device" for row in rows):
        return None  # a name that turned out to be nobody's
    preferred = next(
        (row for status in ("ready", "unverified") for row in rows if row.status == status),
        rows[0],
    )
    known = group.hardware
    pci = group.pci
    names = [hardware.name for hardware in known] + [pci.name if pci else None]
    sizes = [hardware.memory_bytes for hardware in known] + [pci.memory_bytes if pci else None]
    drivers = [hardware.driver for hardware in known] + [pci.driver if pci else None]
    label = _LABELS.get(DeviceName.parse(preferred.device).kind, preferred.device)
    return Device(
        device=preferred.device,
        name=next(filter(None, names), label),
        kind=group.kind,
        memory_bytes=next(filter(None, sizes), None),
        driver=next(filter(None, drivers), None),
        backends=tuple(rows),
        software=group.software,
    )


def _rows(machine: Machine, group: _Group) -> Iterator[DeviceBackend]:
    for record in machine.backends:
        serving = _serving(machine, record, kind=group.kind, vendor=group.vendor)
        offers = [offer for known, offer in group.offers if known is record]
        numbered = {DeviceName.parse(offer.device).kind for offer in offers if ":" in offer.device}
        # "cuda" beside "cuda:0" is one name too many.
        rows = [
            offer_row(machine, record, offer, serving)
            for offer in offers
            if ":" in offer.device or offer.device not in numbered
        ]
        if not rows and serving is not None and group.pci is not None:
            rows = backend_rows(machine, record, serving, kind=group.kind)
        yield from rows


def _serving(
    machine: Machine, record: BackendRecord, *, kind: str, vendor: str | None = None
) -> Serving | None:
    return find_serving(
        record.backend,
        kind=kind,
        vendor=vendor,
        system=machine.system,
        architecture=machine.cpu.architecture,
    )
