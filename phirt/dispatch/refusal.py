"""The errors that say why nothing can run a model, from a plan that chose nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from phirt.devices.machine import TrialOutcome
from phirt.devices.names import DeviceName
from phirt.dispatch.plan import Plan, PlanCandidate
from phirt.errors import (
    BackendBrokenError,
    BackendError,
    BackendNotInstalledError,
    BackendRuntimeError,
    DeviceError,
    DeviceNotAvailableError,
    DevicePlacementError,
    OutOfMemoryError,
    PhirtError,
    UnsupportedModelError,
)

__all__ = ["ErrorOf", "no_candidate", "not_offered", "not_working", "trial_error"]

ErrorOf: TypeAlias = Callable[[PlanCandidate], Exception | None]
"""The error that a rejected candidate was rejected for, where there was one."""

_TRIED = ("device", "model", "memory", "load", "answer", "use")


def no_candidate(plan: Plan, error_of: ErrorOf) -> Exception:
    """The error for a plan without a usable candidate.

    Args:
        plan: The plan.
        error_of: The error behind a rejection.
    """
    # What was not asked for, or is not installed, is no reason beside those that came close.
    asked = [row for row in plan.candidates if row.stage != "request"]
    rows = [row for row in asked if row.stage in _TRIED] or asked
    errors = [error for row in rows if (error := error_of(row)) is not None]
    if errors and len(errors) == len(rows) and len({str(error) for error in errors}) == 1:
        return errors[0]  # One candidate, or one fault that all of them found.
    reasons = " ".join(dict.fromkeys(map(_sentence, rows)))
    # A backend that has no form of the model has no say in whether there is room for it.
    close = [error for row in rows if row.stage != "model" and (error := error_of(row)) is not None]
    if close and all(isinstance(error, OutOfMemoryError) for error in close):
        return OutOfMemoryError(f"No backend has room for the model. {_closest(rows) or reasons}")
    if any(isinstance(error, BackendError | DeviceError) for error in errors):
        return BackendError(f"No backend could load the model. {reasons}")
    if DeviceName.parse(plan.device).kind not in ("auto", "cpu") and not errors:
        described = "any backend" if plan.backend == "auto" else f"backend {plan.backend!r}"
        return DeviceNotAvailableError(
            f"Device {plan.device!r} is not available to {described}: {reasons}"
        )
    return UnsupportedModelError(f"No backend can run the model. {reasons}")


def not_offered(
    rows: Sequence[PlanCandidate], *, device: DeviceName, backend: str, is_missing: bool
) -> PhirtError:
    """The error where no runtime is there that could serve the device.

    Args:
        rows: Those of a plan that say of each runtime why it does not.
        device: The device that was asked for.
        backend: The backend that was asked for.
        is_missing: Whether none is installed; else one is, and has no such device.
    """
    is_auto, is_any = backend == "auto", device.kind == "auto"
    who = "any backend" if is_auto else f"backend {backend!r}"
    reasons = _by_reason(rows, is_auto=is_auto)
    if not is_missing:
        fix = next((row.fix for row in rows if row.fix), None)
        what = "No device" if is_any else f"Device '{device}'"
        return DeviceNotAvailableError(
            f"{what} is {'' if is_any else 'not '}available to {who}: {reasons}.{_then_auto(fix)}"
        )
    use = f"use device '{device}'" if not is_any else "run a model"
    lack = f"No runtime to {use} is installed" if is_auto else f"Backend {backend!r} cannot {use}"
    commands = " or: ".join(dict.fromkeys(row.fix for row in rows if row.fix))
    if not commands:
        return BackendNotInstalledError(f"{lack}: {reasons}.")
    if is_auto:
        return BackendNotInstalledError(f"{lack}. Install one with: {commands}")
    return BackendNotInstalledError(f"{lack}: {reasons}. Install it with: {commands}")


def not_working(rows: Sequence[PlanCandidate]) -> PhirtError:
    """The error where a runtime is installed that does not work, and no other does.

    Args:
        rows: Those of a plan that say of each runtime why it does not.
    """
    return BackendBrokenError(" ".join(dict.fromkeys(map(_sentence, rows))))


def trial_error(
    backend: str, device: str, *, outcome: TrialOutcome, reason: str, fix: str | None
) -> PhirtError:
    """The error for a backend that failed its trial on a device."""
    told = f"{reason.rstrip('.')}.{f' {fix}' if fix else ''}"
    message = f"Device {device!r} is not available to backend {backend!r}: {told}"
    if outcome == "elsewhere":
        return DevicePlacementError(message)
    if outcome in ("raised", "no device"):
        return DeviceNotAvailableError(message)
    return BackendRuntimeError(message)


def _sentence(row: PlanCandidate) -> str:
    fix = f" {row.fix}" if row.fix else ""
    return f"{row.described}: {row.reason.rstrip('.')}.{fix}"  # It may be an error's message.


def _closest(rows: Sequence[PlanCandidate]) -> str:
    """What is said of the one that lacks least, where that is known of all of them."""
    lacking = [
        (need.total - need.free, row)
        for row in rows
        if (need := row.memory) is not None and need.free is not None and row.stage == "memory"
    ]
    if not lacking or len(lacking) < sum(row.stage != "model" for row in rows):
        return ""
    _, row = min(lacking, key=lambda each: each[0])
    return f"That which lacks least: {row.reason} `phirt plan` lists the others."


def _by_reason(rows: Sequence[PlanCandidate], *, is_auto: bool) -> str:
    """Each reason once, with the backends that it is of."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        found.setdefault(row.reason.rstrip("."), {})[row.backend] = None
    if not found:
        return "it lists none"
    return "; ".join(
        f"{', '.join(backends)}: {reason}" if is_auto else reason
        for reason, backends in found.items()
    )


def _then_auto(fix: str | None) -> str:
    """What to do: what mends it, which may be a command or a sentence, or another device."""
    other = 'pass another device, or device="auto".'
    if fix is None or fix.startswith("Pass "):
        return f" {fix or other[0].upper() + other[1:]}"
    if fix.startswith("python "):
        return f" To have it, run: {fix}; or {other}"
    return f" {fix.rstrip('.')}, or {other}"
