"""Which backend loads a model, and on which device.

A named backend or device is used or an error says why not; only ``"auto"`` chooses.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from phirt.dispatch.candidates import Candidate, Candidates
from phirt.errors import (
    BackendError,
    DeviceError,
    DeviceNotAvailableError,
    UnsupportedModelError,
)
from phirt.models.folder import ModelFolder
from phirt.protocols import LoadedModel, LoadOptions, Reject

__all__ = ["FindFolder", "Selection", "load_first"]

_logger = logging.getLogger(__name__)

FindFolder = Callable[[Candidate], ModelFolder]
"""Finds or makes the model's folder in a layout that the candidate's backend reads."""


@dataclass(frozen=True, slots=True)
class Selection:
    """A loaded model, and how it came to be loaded this way.

    Attributes:
        backend: Name of the backend that loaded it.
        device: Name of the device that it runs on.
        folder: What it was loaded from.
        loaded: The model.
        reasons: One sentence for each candidate that was passed over.
    """

    backend: str
    device: str
    folder: ModelFolder
    loaded: LoadedModel
    reasons: tuple[str, ...]


def load_first(candidates: Candidates, find_folder: FindFolder, options: LoadOptions) -> Selection:
    """Load a model on the first candidate that takes it.

    Args:
        candidates: Backends and devices to try.
        find_folder: Called with each candidate whose turn comes. Where it raises
            `UnsupportedModelError`, the next one is tried.
        options: Passed on to the backend.

    Raises:
        DeviceNotAvailableError: The named device is not to be had.
        BackendError: The named backend cannot load the model here, or none can.
        UnsupportedModelError: No candidate can run the model.
        ModelError: The model itself is at fault; no other candidate is tried.
    """
    failures: list[_Failure] = []
    for candidate in candidates:
        name = candidate.backend.name
        try:
            folder = find_folder(candidate)
            verdict = candidate.backend.accepts(folder.artifact, candidate.device)
            if isinstance(verdict, Reject):
                failures.append(_Failure(candidate, _sentence(candidate, verdict), None))
                continue
            loaded = candidate.backend.load(folder.artifact, candidate.device, options)
        except (BackendError, DeviceError, UnsupportedModelError) as error:
            failures.append(_Failure(candidate, f"{name} on {candidate.device}: {error}", error))
            continue
        reasons = tuple(failure.reason for failure in failures)
        for reason in reasons:
            _logger.info("Passed over: %s", reason)
        return Selection(name, candidate.device, folder, loaded, reasons)
    raise _nothing_fits(candidates, failures)


@dataclass(frozen=True, slots=True)
class _Failure:
    candidate: Candidate
    reason: str
    error: Exception | None


def _sentence(candidate: Candidate, verdict: Reject) -> str:
    fix = f" {verdict.fix}" if verdict.fix else ""
    reason = verdict.reason.rstrip(".")  # It may be an error's message, which ends in one.
    return f"{candidate.backend.name} on {candidate.device}: {reason}.{fix}"


def _nothing_fits(candidates: Candidates, failures: list[_Failure]) -> Exception:
    errors = [failure.error for failure in failures if failure.error is not None]
    if len(errors) == len(failures) and len({str(error) for error in errors}) == 1:
        return errors[0]  # One candidate, or one fault that all of them found.
    reasons = " ".join(failure.reason for failure in failures)
    if any(isinstance(error, BackendError | DeviceError) for error in errors):
        return BackendError(f"No backend could load the model. {reasons}")
    if candidates.device.kind not in ("auto", "cpu") and not errors:
        return DeviceNotAvailableError(
            f"Device '{candidates.device}' is not available to {candidates.described}: {reasons}"
        )
    return UnsupportedModelError(f"No backend can run the model. {reasons}")
