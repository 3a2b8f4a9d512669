"""A physical device, and what each backend can do with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["Device", "DeviceBackend", "Status"]

Status: TypeAlias = Literal["ready", "missing", "broken", "no-device", "unverified"]
"""What a backend can do with a device.

``ready``: a tiny model ran there and gave the right numbers; ``missing``: what serves the
device is not installed; ``broken``: it is installed, and fails; ``no-device``: it is installed
and works, and does not see the device; ``unverified``: it sees the device, and nothing was run.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceBackend:
    """One backend on one device.

    Attributes:
        backend: Name of the backend.
        device: What phirt calls the device with this backend: pass it as ``device=``.
        native: The runtime's own name for it, or None.
        version: Of the runtime, or None.
        status: What it can do.
        reason: Why, in one sentence.
        fix: What the user can do about it, or None.
    """

    backend: str
    device: str
    native: str | None
    version: str | None
    status: Status
    reason: str
    fix: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A physical device.

    Attributes:
        device: What phirt calls it: the name with the backend that is preferred for it.
        name: What its maker calls it.
        kind: ``"cpu"``, ``"gpu"`` or ``"npu"``.
        memory_bytes: Its memory, or None where nobody tells.
        driver: Version of its driver, or None.
        backends: What each backend can do with it, in order of preference.
        software: Whether it is computed on the CPU (SwiftShader, WARP).
    """

    device: str
    name: str
    kind: Literal["cpu", "gpu", "npu"]
    memory_bytes: int | None
    driver: str | None
    backends: tuple[DeviceBackend, ...]
    software: bool = False
