"""The record of a machine: all that the choice of a backend and a device reads.

`phirt devices --raw` prints it, and everything that decides (`phirt.devices.merge`,
`phirt.dispatch.plan`) is a function of it: a record of another machine gives the decision
that is made there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from phirt.types import Availability

__all__ = [
    "SCHEMA",
    "BackendRecord",
    "Cpu",
    "Machine",
    "Memory",
    "PciDevice",
    "Quarantine",
    "Trial",
    "TrialOutcome",
]

SCHEMA = 1
"""Version of the record's JSON."""

ListingOutcome: TypeAlias = Literal["listed", "raised", "crashed", "timed out", "not run"]
TrialOutcome: TypeAlias = Literal[
    "ran",
    "raised",
    "no device",
    "elsewhere",
    "wrong numbers",
    "crashed",
    "timed out",
    "not run",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    """The processor.

    Attributes:
        name: ``"AMD EPYC 9B14"``.
        vendor: ``"amd"``, ``"intel"``, ``"apple"``, ``"qualcomm"`` … or None.
        architecture: ``"x86_64"`` or ``"arm64"``, whatever the system calls it.
        cores: Physical cores that this process may use, or None.
        threads: Logical processors that this process may use.
        features: Instruction sets that matter here (``"avx2"``, ``"avx512f"``, ``"amx_int8"`` …),
            sorted, where the system tells.
    """

    name: str
    vendor: str | None = None
    architecture: str
    cores: int | None = None
    threads: int
    features: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """The host's memory, in bytes.

    Attributes:
        total: What the machine has.
        available: What may be taken without swapping, now.
        limit: What this process may have in all (control group, address space), or None.
        limit_left: What of the limit is left, or None without one.
    """

    total: int
    available: int
    limit: int | None = None
    limit_left: int | None = None

    @property
    def free(self) -> int:
        """What this process can have: the smaller of what is available and what is left to it."""
        return self.available if self.limit_left is None else min(self.available, self.limit_left)


@dataclass(frozen=True, slots=True, kw_only=True)
class PciDevice:
    """A graphics or compute device that the system sees, whether or not a runtime does.

    Attributes:
        kind: ``"gpu"`` or ``"npu"``.
        vendor: As in `Hardware`.
        name: What the system calls it, or None.
        pci: Its address, ``"0000:01:00.0"``, where the system tells.
        driver: The driver that is bound to it (with its version, where known), or None.
        memory_bytes: Its own memory, where the system tells.
    """

    kind: Literal["gpu", "npu"]
    vendor: str | None = None
    name: str | None = None
    pci: str | None = None
    driver: str | None = None
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What became of running a tiny model on a device, in a process of its own.

    Attributes:
        device: The device's name, as the backend lists it.
        outcome: ``ran`` and gave the right numbers; ``raised``, ``no device`` where the error
            says that the runtime does not find it; ran ``elsewhere``; gave
            ``wrong numbers``; ``crashed`` or ``timed out``, process and all; ``not run`` where
            no process could be started, or the backend cannot have the model.
        reason: What was seen, in one sentence.
        fix: What the user can do about it, or None.
        kl: Mean KL divergence from the expected answer, in nats, where numbers came.
        seconds: How long it took.
    """

    device: str
    outcome: TrialOutcome
    reason: str
    fix: str | None = None
    kl: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendRecord:
    """What one backend's runtime lists, and what came of trying it.

    Attributes:
        backend: Name of the backend.
        outcome: Of asking it in a process of its own.
        reason: What was seen where it did not list, or why it was asked in the application's own
            process.
        fix: What the user can do about that, or None.
        version: Of the runtime, or None where it does not import.
        listing: What its probe said, device by device.
        trials: What came of running a tiny model, for the devices that were tried.
        seconds: How long the listing took.
    """

    backend: str
    outcome: ListingOutcome
    reason: str = ""
    fix: str | None = None
    version: str | None = None
    listing: tuple[Availability, ...] = ()
    trials: tuple[Trial, ...] = ()
    seconds: float = 0.0

    @property
    def is_fatal(self) -> bool:
        """Whether asking it ended the process that asked, or left it hanging."""
        return self.outcome in ("crashed", "timed out")

    def trial(self, device: str) -> Trial | None:
        """The trial of that device, or None where it was not tried."""
        return next((trial for trial in self.trials if trial.device == device), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantine:
    """A device that computed wrong numbers, and is not chosen by "auto" any more.

    It ends when the version of the runtime or of the driver changes.

    Attributes:
        backend: Name of the backend.
        device: The device's name, as the backend lists it.
        version: Version of the runtime.
        driver: Version of the device's driver, or None.
        reason: What was seen, in one sentence.
        when: When, in UTC, ``"2026-11-22T03:00:00Z"``.
    """

    backend: str
    device: str
    version: str | None
    driver: str | None
    reason: str
    when: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine, as far as choosing a backend and a device goes.

    Attributes:
        schema: `SCHEMA` of whoever wrote it.
        phirt: Version of phirt.
        python: Version of Python.
        system: ``"linux"``, ``"windows"`` or ``"macos"``.
        release: The system's release.
        cpu: The processor.
        memory: The host's memory.
        pci: Graphics and compute devices that the system sees.
        drivers: Versions of drivers, by name, where the system tells.
        environment: Variables that change what runtimes see (``CUDA_VISIBLE_DEVICES`` …).
        distributions: Versions of the installed packages that have to do with a runtime.
        backends: One record a backend, in order of preference.
        quarantine: Devices that computed wrong numbers.
    """

    schema: int = SCHEMA
    phirt: str
    python: str
    system: str
    release: str = ""
    cpu: Cpu
    memory: Memory
    pci: tuple[PciDevice, ...] = ()
    drivers: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    distributions: Mapping[str, str] = field(default_factory=dict)
    backends: tuple[BackendRecord, ...] = ()
    quarantine: tuple[Quarantine, ...] = ()

    def backend(self, name: str) -> BackendRecord | None:
        """The record of that backend, or None."""
        return next((record for record in self.backends if record.backend == name), None)
