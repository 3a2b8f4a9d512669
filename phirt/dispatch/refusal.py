"""The error that says why nothing can run the model, from a plan that chose nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from phirt.devices.machine import TrialOutcome
from phirt.devices.names import DeviceName
from phirt.dispatch.plan import Plan, PlanCandidate
from phirt.errors import (
    BackendError,
    BackendRuntimeError,
    DeviceError,
    DeviceNotAvailableError,
    DevicePlacementError,
    OutOfMemoryError,
    PhirtError,
    UnsupportedModelError,
)

__all__ = ["ErrorOf", "no_candidate", "trial_error"]

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
        return OutOfMemoryError(f"No backend has room for the model. {reasons}")
    if any(isinstance(error, BackendError | DeviceError) for error in errors):
        return BackendError(f"No backend could load the model. {reasons}")
    if DeviceName.parse(plan.device).kind not in ("auto", "cpu") and not errors:
        described = "any backend" if plan.backend == "auto" else f"backend {plan.backend!r}"
        return DeviceNotAvailableError(
            f"Device {plan.device!r} is not available to {described}: {reasons}"
        )
    return UnsupportedModelError(f"No backend can run the model. {reasons}")


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
