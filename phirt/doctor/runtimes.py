"""What the record of a machine says is broken: runtimes, devices, wrong numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import Distribution

from phirt.devices.machine import BackendRecord, Machine, Trial
from phirt.dispatch.quarantine import in_force
from phirt.doctor.commands import install, reinstall
from phirt.doctor.finding import Finding
from phirt.doctor.libraries import recognise
from phirt.types import Availability

__all__ = ["examine_machine"]

# Whose files to install again where a backend's runtime does not import.
_DISTRIBUTIONS = {
    "onnxruntime": ("onnxruntime",),
    "onnxruntime-genai": ("onnxruntime-genai",),
    "openvino": ("openvino",),
    "mlx": ("mlx", "mlx-cpu", "mlx-metal", "mlx-lm"),
    "transformers": ("torch", "transformers"),
}
# Written to compare with; a machine with nothing else has no runtime.
_REFERENCE = "reference"
_REFRESH = "phirt devices --refresh"


def examine_machine(machine: Machine, installed: Mapping[str, Distribution]) -> Iterator[Finding]:
    """What each backend's runtime does on a machine.

    Args:
        machine: The record; trials that it has are judged, none is made.
        installed: The installed distributions, by canonical name.
    """
    usable = []
    for record in machine.backends:
        findings = [*_examine_backend(record, installed), *_examine_quarantine(machine, record)]
        yield from findings
        listed = [found for found in record.listing if found.status not in ("missing", "broken")]
        if listed and record.backend != _REFERENCE:
            usable.append(record.backend)
        if listed and not findings:
            yield Finding(severity="ok", area="devices", found=_describe(record, listed))
    if not usable:
        yield Finding(
            severity="broken",
            area="devices",
            found="No runtime is installed and works.",
            why="Models run on one. The one for any processor is onnxruntime.",
            command=install("phirt[cpu]"),
        )


def _describe(record: BackendRecord, listed: list[Availability]) -> str:
    tried = {trial.device for trial in record.trials if trial.outcome == "ran"}
    devices = ", ".join(
        found.device + (" (tried)" if found.device in tried else "") for found in listed
    )
    return f"{record.version or record.backend}: {devices}."


def _examine_backend(
    record: BackendRecord, installed: Mapping[str, Distribution]
) -> Iterator[Finding]:
    if record.outcome not in ("listed", "not run"):
        yield _broken(
            f"{record.backend}: {_sentence(record.reason)}",
            record.reason,
            why=record.fix or "",
            command=_reinstall(record.backend, installed) if record.outcome == "raised" else None,
        )
    for found in record.listing:
        if found.status == "broken":
            yield _broken(
                f"{record.backend} on {found.device}: {_sentence(found.reason)}",
                found.reason,
                why=found.fix or "",
                command=_reinstall(record.backend, installed),
            )
    for trial in record.trials:
        if trial.outcome not in ("ran", "not run", "no device"):
            yield _examine_trial(record, trial)


def _examine_trial(record: BackendRecord, trial: Trial) -> Finding:
    return _broken(
        f"{record.backend} on {trial.device}: {_sentence(trial.reason)}",
        trial.reason,
        why=trial.fix or '"auto" does not choose it. Update the driver of the device.',
        command=None,
    )


def _broken(found: str, message: str, *, why: str, command: str | None) -> Finding:
    library = recognise(message)
    if library is not None:
        return Finding(
            severity="broken",
            area="libraries",
            found=found,
            why=f"{library.name} is missing or does not fit. {library.why}",
            command=library.command,
        )
    return Finding(severity="broken", area="devices", found=found, why=why, command=command)


def _examine_quarantine(machine: Machine, record: BackendRecord) -> Iterator[Finding]:
    for found in record.listing:
        entry = in_force(
            machine.quarantine,
            backend=record.backend,
            device=found.device,
            version=record.version,
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


def _reinstall(backend: str, installed: Mapping[str, Distribution]) -> str | None:
    """Installs a backend's runtime once more, in the versions and builds that are there."""
    held = [
        distribution
        for name in _DISTRIBUTIONS.get(backend, ())
        for held, distribution in installed.items()
        if held == name or (backend == "onnxruntime" and held in _builds(name, installed))
    ]
    return reinstall(*(f"{one.name}=={one.version}" for one in held)) if held else None


def _builds(name: str, installed: Mapping[str, Distribution]) -> list[str]:
    """The builds of onnxruntime that stand in its place where it is not installed itself."""
    suffixes = ("gpu", "directml", "webgpu", "openvino", "rocm", "migraphx")
    return [] if name in installed else [f"{name}-{suffix}" for suffix in suffixes]


def _sentence(text: str) -> str:
    return f"{text.strip().rstrip('.')}."
