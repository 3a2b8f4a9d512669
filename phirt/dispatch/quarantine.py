"""Devices that computed wrong numbers, and are not chosen by "auto" until something changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from phirt.devices.machine import Quarantine
from phirt.dispatch.machine_dir import machine_dir, read_record, update_record
from phirt.errors import ModelFormatError
from phirt.models.safe_json import JsonFields

__all__ = ["add", "entries", "in_force", "release"]

_MOST = 100


def add(
    *, backend: str, device: str, version: str | None, driver: str | None, reason: str
) -> Quarantine:
    """Quarantine a device for a backend, in place of what is recorded of the two.

    Args:
        backend: Name of the backend.
        device: The device's name, as the backend lists it.
        version: Version of the runtime.
        driver: Version of the device's driver, or None.
        reason: What was seen, in one sentence.
    """
    entry = Quarantine(
        backend=backend,
        device=device,
        version=version,
        driver=driver,
        reason=reason,
        when=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )
    _change(lambda found: [*(e for e in found if _pair(e) != _pair(entry)), entry])
    return entry


def entries() -> tuple[Quarantine, ...]:
    """All that is recorded, oldest first; whether an entry still holds, `in_force` says."""
    return tuple(_parse(read_record(_path()), _path()))


def in_force(
    found: Iterable[Quarantine],
    *,
    backend: str,
    device: str,
    version: str | None,
    driver: str | None,
) -> Quarantine | None:
    """The entry that keeps a backend from a device, or None.

    An entry ends when the runtime or the driver has another version: the new one may be right.

    Args:
        found: Entries, of this machine or of a record.
        backend: Name of the backend.
        device: The device's name, as the backend lists it.
        version: Version of the runtime now.
        driver: Version of the driver now.
    """
    wanted = (backend, device, version, driver)
    return next((e for e in found if (e.backend, e.device, e.version, e.driver) == wanted), None)


def release(backend: str | None = None, device: str | None = None) -> tuple[Quarantine, ...]:
    """Forget what is recorded.

    Args:
        backend: Of this backend only.
        device: Of this device only.

    Returns:
        What was forgotten.
    """

    def is_meant(entry: Quarantine) -> bool:
        return backend in (None, entry.backend) and device in (None, entry.device)

    released = tuple(entry for entry in entries() if is_meant(entry))
    if released:
        _change(lambda found: [entry for entry in found if not is_meant(entry)])
    return released


def _path() -> Path:
    return machine_dir() / "quarantine.json"


def _pair(entry: Quarantine) -> tuple[str, str]:
    return entry.backend, entry.device


def _change(change: Callable[[list[Quarantine]], list[Quarantine]]) -> None:
    path = _path()

    def rewrite(document: Mapping[str, Any] | None) -> dict[str, Any]:
        changed = change(_parse(document, path))[-_MOST:]
        return {"entries": [asdict(entry) for entry in changed]}

    update_record(path, rewrite)


def _parse(document: Mapping[str, Any] | None, path: Path) -> list[Quarantine]:
    """The entries of a document; what is damaged is left out."""
    listed = document.get("entries") if document else None
    found = []
    for item in listed if isinstance(listed, list) else []:
        fields = JsonFields(item if isinstance(item, dict) else {}, source=str(path))
        try:
            found.append(
                Quarantine(
                    backend=fields.string("backend", max_length=200),
                    device=fields.string("device", max_length=200),
                    version=fields.optional_string("version", max_length=200),
                    driver=fields.optional_string("driver", max_length=200),
                    reason=fields.string("reason"),
                    when=fields.string("when", max_length=40),
                )
            )
        except ModelFormatError:
            continue
    return found
