"""A backend without a runtime, and records of machines that have it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from phirt.devices.machine import BackendRecord, Cpu, Machine, Memory, PciDevice
from phirt.dispatch.plan import PlannedArtifact
from phirt.protocols import Accept, LoadOptions, Reject
from phirt.types import Artifact, Availability, Hardware
from tests.fakes import FakeModel

GIB = 1 << 30
ONNX = PlannedArtifact(
    format="onnx-genai", precision="int8", state="here", path=Path("somewhere"), kl=0.004
)


class FakeBackend:
    """Offers devices, and loads a model that computes nothing of this machine."""

    name: ClassVar[str] = "fake"
    formats: ClassVar[tuple[str, ...]] = ("onnx-genai", "onnx")

    def __init__(
        self,
        *,
        devices: Sequence[str] = ("cpu",),
        status: str = "found",
        error: Exception | None = None,
        rejects: bool = False,
    ) -> None:
        self.devices = devices
        self.status: Any = status
        self.error = error
        self.rejects = rejects
        self.model = FakeModel()
        self.probes = 0
        self.seen: list[tuple[Artifact, str, LoadOptions]] = []

    def probe(self) -> list[Availability]:
        self.probes += 1
        return [offer(device, status=self.status) for device in self.devices]

    def accepts(self, artifact: Artifact, device: str) -> Accept | Reject:
        if self.rejects:
            return Reject(f"no {artifact.format} on {device} here", "Buy one.")
        return Accept()

    def load(self, artifact: Artifact, device: str, options: LoadOptions) -> FakeModel:
        self.seen.append((artifact, device, options))
        if self.error:
            raise self.error
        self.model.device = device
        return self.model


def offer(device: str, *, status: Any = "found", **hardware: Any) -> Availability:
    """What a probe says of a device."""
    told = Hardware(native=device, **hardware) if hardware else None
    return Availability(device, status, f"{device} is {status}", hardware=told)


def record(name: str, *offers: str | Availability, **fields: Any) -> BackendRecord:
    """A backend that lists some devices."""
    listing = tuple(each if isinstance(each, Availability) else offer(each) for each in offers)
    return BackendRecord(
        **(
            {"backend": name, "outcome": "listed", "version": f"{name} 1", "listing": listing}
            | fields
        )
    )


def machine(*backends: BackendRecord, free: int = 16 * GIB, **fields: Any) -> Machine:
    """A machine with a graphics card, on which backends are as recorded."""
    fields = {"pci": (PciDevice(kind="gpu", vendor="nvidia"),)} | fields
    return Machine(
        phirt="1",
        python="3.13",
        system="linux",
        cpu=Cpu(name="a CPU", architecture="x86_64", threads=8),
        memory=Memory(total=32 * GIB, available=free),
        backends=backends,
        **fields,
    )
