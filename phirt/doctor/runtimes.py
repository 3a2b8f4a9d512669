"""What the record of a machine says is broken: runtimes, devices, wrong numbers."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import Distribution

from phirt.backends.distributions import listed_files
from phirt.devices.device import Device, DeviceBackend
from phirt.devices.machine import BackendRecord, Machine, Trial
from phirt.devices.merge import devices_of
from phirt.dispatch.quarantine import in_force
from phirt.doctor.commands import install, reinstall
from phirt.doctor.finding import Finding
from phirt.doctor.libraries import recognise

__all__ = ["examine_machine"]

# What to install again where a backend's runtime does not work and does not say which part.
_PACKAGES = {
    "onnxruntime": ("onnxruntime",),
    "onnxruntime-genai": ("onnxruntime_genai",),
    "openvino": ("openvino",),
    "mlx": ("mlx_lm",),
    "transformers": ("transformers",),
}
# As the adapter for transformers words it.
_TOO_OLD = re.compile(r"needs (?P<name>\S+) \S+ or later; installed is")
# Written to compare with; a machine with nothing else has no runtime.
_REFERENCE = "reference"
_PIP = "python -m pip install "
_REFRESH = "phirt devices --refresh"


def examine_machine(
    machine: Machine, installed: Mapping[str, Distribution], *, told: Sequence[Finding] = ()
) -> Iterator[Finding]:
    """What each backend's runtime does on a machine.

    Args:
        machine: The record; trials that it has are judged, none is made.
        installed: The installed distributions, by canonical name.
        told: What was found of packages and versions: one fault is told once.
    """
    devices = devices_of(machine)
    usable = False
    for record in machine.backends:
        findings = [*_examine_backend(record, installed), *_examine_quarantine(machine, record)]
        yield from (each for each in findings if not _is_told(each, told))
        served = _describe_served(record, devices)
        if served:
            yield Finding(severity="ok", area="devices", found=served)
        usable = usable or (bool(served) and record.backend != _REFERENCE)
    yield from _examine_unused(devices)
    if not usable:
        yield Finding(
            severity="broken",
            area="devices",
            found="No runtime is installed and works.",
            why="Models run on one. The one for any processor is onnxruntime.",
            command=install("phirt[cpu]"),
        )


def _describe_served(record: BackendRecord, devices: Sequence[Device]) -> str:
    """The devices that a backend serves, as far as is known; empty where it serves none."""
    rows = [row for each in devices for row in each.backends if row.backend == record.backend]
    ready = [row.device for row in rows if row.status == "ready"]
    listed = [f"{row.device} (not tried)" for row in rows if row.status == "unverified"]
    version = record.version or record.backend
    name = version if record.backend in version else f"{record.backend} ({version})"
    return f"{name}: {', '.join([*ready, *listed])}." if ready or listed else ""


def _examine_unused(devices: Sequence[Device]) -> Iterator[Finding]:
    """Devices that nothing serves that is installed, though something could."""
    for device in devices:
        rows = device.backends if device.kind != "cpu" else ()
        missing = [row for row in rows if row.status == "missing" and row.fix]
        if missing and {row.status for row in rows} <= {"missing", "no-device"}:
            others = " or ".join(dict.fromkeys(row.backend for row in missing))
            yield Finding(
                severity="note",
                area="devices",
                found=f"{device.name} ({device.device}) is not used.",
                why=f"What serves it is not installed: {others}.",
                command=_command_of(missing[0]),
            )


def _command_of(row: DeviceBackend) -> str | None:
    """What a row advises, where that is a command and no sentence."""
    words = shlex.split(row.fix) if row.fix and row.fix.startswith(_PIP) else []
    return install(*words[len(_PIP.split()) :]) if words else None


def _is_told(finding: Finding, told: Sequence[Finding]) -> bool:
    """Whether the reason of a runtime is one that its packages or versions have given, too."""
    old = _TOO_OLD.search(finding.found)
    for each in told:
        if each.area == "packages" and each.found.rstrip(".") in finding.found:
            return True
        if each.area == "versions" and old and f"installed is {old['name']} " in each.found:
            return True
    return False


def _examine_backend(
    record: BackendRecord, installed: Mapping[str, Distribution]
) -> Iterator[Finding]:
    if record.outcome not in ("listed", "not run"):
        yield _broken(
            record,
            f"{record.backend}: {_sentence(record.reason)}",
            record.reason,
            why=record.fix or "",
            command=(
                _reinstall(record.backend, installed, record.reason)
                if record.outcome == "raised"
                else None
            ),
        )
    for found in record.listing:
        if found.status == "broken":
            # What it advises is the command, which is given by itself.
            reason = found.reason.partition(" Reinstall it with: ")[0]
            yield _broken(
                record,
                _sentence(reason),
                found.reason,
                why=found.fix or "",
                command=_reinstall(record.backend, installed, found.reason),
            )
    for trial in record.trials:
        if trial.outcome not in ("ran", "not run", "no device"):
            yield _examine_trial(record, trial)


def _examine_trial(record: BackendRecord, trial: Trial) -> Finding:
    return _broken(
        record,
        f"{record.backend} on {trial.device}: {_sentence(trial.reason)}",
        trial.reason,
        why=trial.fix or '"auto" does not choose it. Update the driver of the device.',
        command=None,
    )


def _broken(
    record: BackendRecord, found: str, message: str, *, why: str, command: str | None
) -> Finding:
    library = recognise(message)
    if library is not None:
        # CUDA comes with each runtime in another way, and the table has onnxruntime's.
        suits = "onnxruntime" not in str(library.command) or "onnxruntime" in record.backend
        return Finding(
            severity="broken",
            area="libraries",
            found=found,
            why=f"{library.name} is missing or does not fit. {library.why}",
            command=library.command if suits else None,
        )
    return Finding(severity="broken", area="devices", found=found, why=why, command=command)


def _examine_quarantine(machine: Machine, record: BackendRecord) -> Iterator[Finding]:
    for found in record.listing:
        entry = in_force(
            machine.quarantine,
            backend=record.backend,
            device=found.device,
            version=found.version or record.version,
            driver=found.hardware.driver if found.hardware else None,
        )
        if entry is not None:
            yield Finding(
                severity="broken",
                area="devices",
                found=(
                    f"{entry.backend} on {entry.device} is in quarantine since {entry.when}: "
                    f"{_sentence(entry.reason)}"
                ),
                why=(
                    '"auto" does not choose it. Another version of the runtime or the driver ends '
                    "that; so does asking the device again."
                ),
                command=_REFRESH,
            )


def _reinstall(backend: str, installed: Mapping[str, Distribution], reason: str) -> str | None:
    """Installs a backend's runtime once more, in the versions and builds that are there."""
    # As `phirt.backends.importing` words it.
    named = re.search(r"'(\w+)[\w.]*' is installed, but importing it failed", reason)
    packages = [named[1]] if named else _PACKAGES.get(backend, ())
    held = [
        distribution
        for _, distribution in sorted(installed.items())
        if any(f"{package}/__init__.py" in listed_files(distribution) for package in packages)
    ]
    # A version's local part (+cpu) is of the place that it was built at, and on no index.
    pinned = (f"{one.name}=={one.version.partition('+')[0]}" for one in held)
    return reinstall(*pinned) if held else None


def _sentence(text: str) -> str:
    return f"{text.strip().rstrip('.')}."
