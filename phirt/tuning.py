"""Measuring how fast a model is here with every backend and device: `tune`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from phirt.devices.hardware import hardware_id
from phirt.devices.machine import Machine
from phirt.devices.names import DeviceName
from phirt.dispatch.measure import Effort, Task, measure_apart
from phirt.dispatch.measurements import Measurement, Measurements
from phirt.dispatch.plan import Plan, PlanCandidate
from phirt.dispatch.planner import listed_as
from phirt.dispatch.registry import formats_of, get_backend
from phirt.dispatch.survey import Survey
from phirt.errors import PhirtError, UnsupportedModelError
from phirt.models.folder import ModelFolder
from phirt.planning import Prepared, plan_on
from phirt.protocols import Reject
from phirt.remote import Announce
from phirt.types import Optimize, ProgressCallback

__all__ = [
    "OnCandidate",
    "Tuning",
    "TuningFailure",
    "folder_for",
    "time_candidates",
    "tune",
    "working_of",
]

_logger = logging.getLogger(__name__)

# Of a trial. Whoever named a device that computes wrong numbers may use it, and have it timed.
_USABLE = ("ran", "not run", "wrong numbers")

OnCandidate: TypeAlias = Callable[[PlanCandidate, int, int], None]
"""Called with a candidate before it is timed, its number from 1, and how many there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningFailure:
    """What could not be timed.

    Attributes:
        backend: Name of the backend.
        device: Device name.
        reason: Why not, in one sentence.
        precision: How the weights are stored that could not; None for whichever.
    """

    backend: str
    device: str
    reason: str
    precision: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """What was measured, and what follows.

    Attributes:
        measurements: One for each candidate and setting.
        failures: Candidates that could not be timed.
        plan: The plan that is made with the measurements.
    """

    measurements: tuple[Measurement, ...]
    failures: tuple[TuningFailure, ...]
    plan: Plan


def tune(
    model: str | Path | None = None,
    *,
    device: str = "auto",
    backend: str = "auto",
    precision: str = "auto",
    optimize: Optimize = "latency",
    quick: bool = False,
    offline: bool = False,
    progress: ProgressCallback | None = None,
    announce: Announce | None = None,
    on_candidate: OnCandidate | None = None,
) -> Tuning:
    """Time prefill and decode of a model with every backend and device that could run it.

    What is measured is kept, by model, hardware and versions, and `phirt.plan` and
    `phirt.load` rank by it from then on. What a backend needs is converted first. A form that
    would have to be downloaded is timed only where there is no other.

    Nothing else should run meanwhile: times of a busy machine say little.

    Args:
        model: As for `phirt.load`.
        device: As for `phirt.load`; ``"auto"`` times all.
        backend: As for `phirt.load`; ``"auto"`` times all.
        precision: As for `phirt.load`.
        optimize: What the plan is for that is returned.
        quick: Time two lengths with default settings, rather than several lengths, numbers of
            threads and ways of waiting.
        offline: As for `phirt.load`.
        progress: As for `phirt.load`.
        announce: As for `phirt.load`.
        on_candidate: Told which candidate is about to be timed.

    Raises:
        ModelError: There is no such model, or nothing here can run it.
        BackendError: There is no such backend.
        TypeError: An argument is of a wrong type.
        ValueError: A name is malformed, or a setting out of range.
    """

    def planned() -> Prepared:
        return plan_on(
            None,
            model,
            device=device,
            backend=backend,
            precision=precision,
            context=None,
            optimize=optimize,
            offline=offline,
            progress=progress,
        )

    prepared = planned()
    candidates = _worth_timing(prepared.plan)
    if not candidates:
        reasons = dict.fromkeys(
            f"{row.described}: {row.reason}"
            for row in prepared.plan.candidates
            if row.stage != "request"
        )
        raise UnsupportedModelError(f"Nothing here can run the model. {'; '.join(reasons)}.")
    measurements, failures = _time_all(
        prepared,
        candidates,
        effort=Effort.quick() if quick else Effort.thorough(),
        announce=announce,
        on_candidate=on_candidate,
    )
    return Tuning(measurements=tuple(measurements), failures=tuple(failures), plan=planned().plan)


def time_candidates(prepared: Prepared, *, announce: Announce | None = None) -> bool:
    """Time the candidates of a plan that have no speed yet, and keep what comes of it.

    Args:
        prepared: The plan.
        announce: As for `phirt.load`.

    Returns:
        Whether anything was measured.
    """
    unknown = [row for row in _worth_timing(prepared.plan) if row.speed is None]
    measurements, _ = _time_all(
        prepared, unknown, effort=Effort.thorough(), announce=announce, on_candidate=None
    )
    return bool(measurements)


def _time_all(
    prepared: Prepared,
    candidates: Sequence[PlanCandidate],
    *,
    effort: Effort,
    announce: Announce | None,
    on_candidate: OnCandidate | None,
) -> tuple[list[Measurement], list[TuningFailure]]:
    measurements: list[Measurement] = []
    candidates, failures = working_of(prepared.machine, candidates)
    for number, candidate in enumerate(candidates, start=1):
        if on_candidate is not None:
            on_candidate(candidate, number, len(candidates))
        _logger.info("Timing %s (%d of %d)", candidate.described, number, len(candidates))
        try:
            found = measure_apart(_task(prepared, candidate, effort, announce))
        except PhirtError as error:
            _logger.info("Not timed: %s: %s", candidate.described, error)
            failures.append(_failure(candidate, str(error), precision=_precision(candidate)))
            continue
        # Kept one by one: what was measured before an interruption is not lost.
        Measurements().save(found)
        measurements += found
    return measurements, failures


def working_of(
    machine: Machine, candidates: Sequence[PlanCandidate]
) -> tuple[list[PlanCandidate], list[TuningFailure]]:
    """The candidates whose device runs the trial model, and of each other device why not.

    Args:
        machine: The record that the plan was made of.
        candidates: Some of it.
    """
    working: list[PlanCandidate] = []
    failures: dict[tuple[str, str], TuningFailure | None] = {}
    for row in candidates:
        place = (row.backend, row.device)
        if place not in failures:
            trial = Survey().trial(row.backend, _device_of(row, machine))
            is_usable = trial.outcome in _USABLE
            failures[place] = None if is_usable else _failure(row, trial.reason)
        if failures[place] is None:
            working.append(row)
    return working, [failure for failure in failures.values() if failure is not None]


def _failure(row: PlanCandidate, reason: str, precision: str | None = None) -> TuningFailure:
    return TuningFailure(backend=row.backend, device=row.device, reason=reason, precision=precision)


def _precision(row: PlanCandidate) -> str | None:
    return None if row.artifact is None else row.artifact.precision


def _device_of(row: PlanCandidate, machine: Machine) -> str:
    """The device as it is listed, unless that lacks the number that was asked for."""
    offer = listed_as(machine, row.backend, row.device)
    is_numbered = DeviceName.parse(row.device).index and ":" not in offer.device
    return row.device if is_numbered else offer.device


def _worth_timing(plan: Plan) -> list[PlanCandidate]:
    usable = [row for row in plan.candidates if row.status != "rejected"]
    here = [row for row in usable if row.artifact and row.artifact.state != "to fetch"]
    return here or usable[:1]


def folder_for(
    prepared: Prepared, candidate: PlanCandidate, *, announce: Announce | None
) -> ModelFolder:
    """The folder that a candidate loads, which is made or fetched where it is not here.

    Args:
        prepared: The plan.
        candidate: One of its usable candidates.
        announce: As for `phirt.load`.

    Raises:
        PhirtError: It cannot be made or fetched.
    """
    assert candidate.artifact is not None  # noqa: S101  # as that of all that are usable
    return prepared.forms.obtain(
        candidate.artifact,
        formats=formats_of(candidate.backend),
        device=DeviceName.parse(candidate.device).kind,
        announce=announce,
    )


def _task(
    prepared: Prepared, candidate: PlanCandidate, effort: Effort, announce: Announce | None
) -> Task:
    """What is to be timed; a form of the model that is not here is made or fetched."""
    machine = prepared.machine
    record = machine.backend(candidate.backend)
    offer = listed_as(machine, candidate.backend, candidate.device)
    artifact = folder_for(prepared, candidate, announce=announce).artifact
    # In this process: it may know what a plan could not, of a form that was not here.
    verdict = get_backend(candidate.backend).accepts(artifact, candidate.device)
    if isinstance(verdict, Reject):
        raise UnsupportedModelError(f"{verdict.reason.rstrip('.')}.")
    return Task(
        name=artifact.name,
        path=str(artifact.path),
        format=artifact.format,
        architecture=artifact.architecture,
        precision=artifact.precision,
        weights_id=artifact.weights_id,
        backend=candidate.backend,
        device=_device_of(candidate, machine),
        version=offer.version or (record.version if record else None),
        hardware=hardware_id(machine),
        cores=machine.cpu.cores,
        threads=machine.cpu.threads,
        effort=effort,
    )
