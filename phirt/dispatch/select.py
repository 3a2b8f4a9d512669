"""Carries a plan out: the first of its candidates that proves itself is the one.

A candidate is tried in a process of its own first, where that was not done before; then it is
loaded, which proves where it runs, and its answer is compared with what its weights say. What
fails at any of these is recorded, and the next one's turn comes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TypeAlias

from phirt.devices.hardware import hardware_id
from phirt.devices.machine import Machine, Trial
from phirt.devices.memory import read_memory
from phirt.devices.names import DeviceName
from phirt.dispatch import quarantine
from phirt.dispatch.canary import Place, Verdict, check_loaded, known_verdict
from phirt.dispatch.fit import check_fit
from phirt.dispatch.measurements import artifact_id
from phirt.dispatch.needs import memory_need
from phirt.dispatch.plan import Plan, PlanCandidate, PlannedArtifact, Stage
from phirt.dispatch.planner import listed_as
from phirt.dispatch.proof import check_placement, foreign_errors
from phirt.dispatch.ranking import Tier, tier_of
from phirt.dispatch.refusal import no_candidate, trial_error
from phirt.dispatch.registry import get_backend
from phirt.dispatch.shape import shape_of, weights_bytes
from phirt.errors import (
    BackendError,
    BackendRuntimeError,
    DeviceError,
    OutOfMemoryError,
    UnsupportedModelError,
)
from phirt.models.folder import ModelFolder
from phirt.protocols import LoadedModel, LoadOptions, Reject

__all__ = ["FindFolder", "PlanLoader", "Selection", "TryFirst", "without_wrong"]

_logger = logging.getLogger(__name__)

FindFolder: TypeAlias = Callable[[PlanCandidate], ModelFolder]
"""Finds or makes the model's folder that a candidate needs."""

TryFirst: TypeAlias = Callable[[str, str], Trial]
"""``f(backend, device)``: runs a tiny model there, in a process of its own."""

_FAILURES = (BackendError, DeviceError, UnsupportedModelError)
_PASSED = ("ran", "not run")


@dataclass(frozen=True, slots=True)
class Selection:
    """A loaded model, and how it came to be loaded this way.

    Attributes:
        backend: Name of the backend that loaded it.
        device: Name of the device that it runs on.
        folder: What it was loaded from.
        loaded: The model.
        plan: What was considered, and what became of it.
    """

    backend: str
    device: str
    folder: ModelFolder
    loaded: LoadedModel
    plan: Plan


class PlanLoader:
    """Loads the candidates of a plan.

    Args:
        machine: The record that the plan was made of.
        find_folder: Called with each candidate whose turn comes. Where it raises
            `UnsupportedModelError` or `BackendError`, the next one's turn comes.
        options: Passed on to the backends; what is None there is as it was measured best.
        try_first: Called before a runtime is used that was not tried on the device.
        refusals: Why a backend can have the model in no form, by backend.
    """

    def __init__(
        self,
        machine: Machine,
        find_folder: FindFolder,
        options: LoadOptions,
        *,
        try_first: TryFirst,
        refusals: Mapping[str, Exception] | None = None,
    ) -> None:
        self._machine = machine
        self._find_folder = find_folder
        self._options = options
        self._try_first = try_first
        self._refusals = refusals or {}
        self._errors: dict[PlanCandidate, Exception] = {}
        self._is_in_use = False  # whether something was loaded, so that memory is another

    def load(self, plan: Plan) -> Selection:
        """Load the first candidate that proves itself.

        Args:
            plan: The plan; that of a `Selection` without its chosen candidate
                (`Plan.without`) goes on with the next one.

        Raises:
            DeviceNotAvailableError: The named device is not to be had.
            DevicePlacementError: The only candidate runs elsewhere.
            OutOfMemoryError: It fits nowhere.
            BackendError: The named backend cannot load the model here, or none can.
            UnsupportedModelError: No candidate can run the model.
            ModelError: The model itself is at fault; no other candidate is tried.
        """
        while (candidate := plan.chosen) is not None:
            try:
                note = self._try(candidate, is_named=plan.device != "auto", plan=plan)
                folder, loaded = self._load(candidate, plan)
                try:
                    doubt = self._check_answer(candidate, folder, loaded, plan)
                except BaseException:
                    loaded.close()
                    raise
            except _RejectedError as rejection:
                row = candidate.rejected(rejection.stage, rejection.reason, rejection.fix)
                if rejection.error is not None:
                    self._errors[row] = rejection.error
                _logger.info("Passed over: %s: %s", candidate.described, rejection.reason)
                plan = plan.without(candidate, row)
                if rejection.stage == "device":  # whatever form the model has there
                    plan = plan.without_device(candidate)
                continue
            for each in filter(None, (note, doubt)):
                plan = plan.with_note(each)
            plan = plan.with_artifact(_as_found(candidate.artifact, folder))
            _logger.info("Chosen: %s: %s", candidate.described, candidate.reason)
            return Selection(candidate.backend, candidate.device, folder, loaded, plan)
        raise no_candidate(plan, self._error_of)

    def load_next(self, failed: Selection, reason: str) -> Selection:
        """Load what comes after a selection that failed while it was used.

        Args:
            failed: What was loaded.
            reason: What it failed of, in one sentence.

        Raises:
            PhirtError: As `load`.
        """
        chosen = failed.plan.chosen
        assert chosen is not None  # noqa: S101  # what was selected
        # The failed model still has its memory, and its users may have taken more.
        self._machine = replace(self._machine, memory=read_memory())
        self._is_in_use = True
        return self.load(failed.plan.without(chosen, chosen.rejected("use", reason)))

    def _try(self, candidate: PlanCandidate, *, is_named: bool, plan: Plan) -> str:
        """See to it that the candidate was tried; what else there is to say of that."""
        offer = listed_as(self._machine, candidate.backend, candidate.device)
        is_users = plan.backend != "auto" and (
            is_named or tier_of(offer, self._machine) is Tier.CPU
        )
        record = self._machine.backend(candidate.backend)
        known = None if record is None else record.trial(offer.device)
        if is_users or known is not None:
            # What is known went into the plan.
            return ""
        # Of a kind that is listed without numbers, the very one that was named.
        numbered = DeviceName.parse(candidate.device).index and ":" not in offer.device
        trial = self._try_first(candidate.backend, candidate.device if numbered else offer.device)
        if trial.outcome in _PASSED:
            return "" if trial.outcome == "ran" else f"{candidate.described}: {trial.reason}"
        if is_named and trial.outcome == "wrong numbers":
            return _warn(f"{candidate.described} was named, and is used: {trial.reason}")
        error = trial_error(
            candidate.backend,
            candidate.device,
            outcome=trial.outcome,
            reason=trial.reason,
            fix=trial.fix,
        )
        raise _RejectedError("device", trial.reason, error, fix=trial.fix)

    def _load(self, candidate: PlanCandidate, plan: Plan) -> tuple[ModelFolder, LoadedModel]:
        try:
            backend = get_backend(candidate.backend)
            folder = self._find_folder(candidate)
            with self._foreign_errors(candidate):
                verdict = backend.accepts(folder.artifact, candidate.device)
            if isinstance(verdict, Reject):
                raise _RejectedError("model", verdict.reason.rstrip("."), None, fix=verdict.fix)
            if candidate.memory is None or self._is_in_use:
                self._check_fit(candidate, folder, plan)
            wrong = _known_wrong(_id_of(folder), candidate, plan, self._machine)
            if wrong is not None and plan.device == "auto":
                raise self._wrong_numbers(candidate, wrong, plan)  # before the weights are read
            options = self._options_for(candidate)
            with self._foreign_errors(candidate):
                loaded = backend.load(folder.artifact, candidate.device, options)
                try:
                    check_placement(loaded, backend=candidate.backend, device=candidate.device)
                except BaseException:
                    loaded.close()
                    raise
        except _FAILURES as error:
            raise _RejectedError("load", str(error), error) from error
        return folder, loaded

    def _foreign_errors(self, candidate: PlanCandidate) -> AbstractContextManager[None]:
        return foreign_errors(
            backend=candidate.backend,
            device=candidate.device,
            settings=bool(self._options.extra),
        )

    def _check_fit(self, candidate: PlanCandidate, folder: ModelFolder, plan: Plan) -> None:
        """As the plan did; this was fetched since, or memory was taken."""
        shape = shape_of(folder)
        need = memory_need(
            _as_found(candidate.artifact, folder),
            shape,
            backend=candidate.backend,
            offer=listed_as(self._machine, candidate.backend, candidate.device),
            machine=self._machine,
            context=plan.context,
            threads=self._options.threads,
            kv_precision=plan.kv_precision,
        )
        if need is None:
            return
        try:
            check_fit(
                need,
                shape=shape,
                model=plan.model,
                backend=candidate.backend,
                device=candidate.device,
                precision=folder.artifact.precision,
            )
        except OutOfMemoryError as error:
            raise _RejectedError("memory", str(error), error) from error

    def _options_for(self, candidate: PlanCandidate) -> LoadOptions:
        if candidate.speed is None:
            return self._options
        given, tuned = self._options, candidate.speed.setting
        return replace(
            given,
            threads=tuned.threads if given.threads is None else given.threads,
            spinning=tuned.spinning if given.spinning is None else given.spinning,
            pinning=tuned.pinning if given.pinning is None else given.pinning,
        )

    def _check_answer(
        self, candidate: PlanCandidate, folder: ModelFolder, loaded: LoadedModel, plan: Plan
    ) -> str:
        """Hold the loaded model's numbers against its weights'; what there is to say of them."""
        try:
            with self._foreign_errors(candidate):
                verdict = check_loaded(
                    loaded,
                    folder,
                    _place_of(candidate, plan, self._machine),
                    reference=lambda: self._reference(candidate, folder, plan),
                )
        except _FAILURES as failure:
            raise _RejectedError("answer", str(failure), failure) from failure
        if verdict.status == "passed":
            return ""
        if verdict.status == "unverified":
            is_cpu = _is_cpu(candidate)
            return "" if is_cpu else f"{candidate.described} is unverified: {verdict.reason}"
        if plan.device != "auto":
            return _warn(
                f"{candidate.described} was named, and is used although it computes wrong numbers: "
                f"{verdict.reason}"
            )
        raise self._wrong_numbers(candidate, verdict, plan)

    def _wrong_numbers(
        self, candidate: PlanCandidate, verdict: Verdict, plan: Plan
    ) -> _RejectedError:
        """What a failed comparison comes to where the device was not named."""
        backend, device = candidate.backend, candidate.device
        if not _is_cpu(candidate):
            # On a CPU it says nothing of other models: there it is how coarsely this one's
            # activations are rounded that makes the difference, and not a fault of the device.
            place = _place_of(candidate, plan, self._machine)
            quarantine.add(
                backend=backend,
                device=listed_as(self._machine, backend, device).device,
                version=place.version,
                driver=place.driver,
                reason=verdict.reason,
            )
        row = _rejected(candidate, verdict)
        error = BackendRuntimeError(
            f"Backend {backend!r} computes wrong numbers on device {device!r}: "
            f"{verdict.reason.rstrip('.')}. {row.fix}"
        )
        return _RejectedError("answer", row.reason, error, fix=row.fix)

    def _reference(
        self, candidate: PlanCandidate, folder: ModelFolder, plan: Plan
    ) -> LoadedModel | None:
        """The same folder on the CPU, with the first other backend that takes it."""
        for row in plan.candidates:
            is_other = (row.backend, row.device) != (candidate.backend, candidate.device)
            if row.status == "rejected" or row.device != "cpu" or not is_other:
                continue
            try:
                if self._try_first(row.backend, row.device).outcome not in _PASSED:
                    continue
                backend = get_backend(row.backend)
                with self._foreign_errors(row):
                    if isinstance(backend.accepts(folder.artifact, row.device), Reject):
                        continue
                    return backend.load(folder.artifact, row.device, LoadOptions())
            except _FAILURES as error:
                _logger.info("No reference: %s: %s", row.described, error)
        return None

    def _error_of(self, row: PlanCandidate) -> Exception | None:
        if row in self._errors:
            return self._errors[row]
        if row.stage == "memory":
            return OutOfMemoryError(row.reason)
        if row.stage == "model" and row.artifact is None:
            return self._refusals.get(row.backend)
        if row.stage != "device":
            return None
        offer = listed_as(self._machine, row.backend, row.device)
        record = self._machine.backend(row.backend)
        trial = None if record is None else record.trial(offer.device)
        outcome = "wrong numbers" if trial is None else trial.outcome
        return trial_error(row.backend, row.device, outcome=outcome, reason=row.reason, fix=row.fix)


def without_wrong(plan: Plan, machine: Machine) -> Plan:
    """A plan without what computed wrong numbers in an earlier load, which passes it over, too.

    Args:
        plan: The plan.
        machine: The record that it was made of.
    """
    if plan.device != "auto":
        return plan
    for row in plan.candidates:
        if row.status != "rejected" and row.artifact is not None:
            wrong = _known_wrong(row.artifact.id, row, plan, machine)
            if wrong is not None:
                # As it is in the plan by now, where others that went first may be out.
                now = next(each for each in plan.candidates if _way(each) == _way(row))
                plan = plan.without(now, _rejected(now, wrong))
    return plan


def _way(row: PlanCandidate) -> tuple[str, str, PlannedArtifact | None]:
    return row.backend, row.device, row.artifact


def _known_wrong(
    artifact: str | None, candidate: PlanCandidate, plan: Plan, machine: Machine
) -> Verdict | None:
    """The verdict of an earlier load that found wrong numbers."""
    if artifact is None:
        return None
    known = known_verdict(artifact, _place_of(candidate, plan, machine))
    return known if known is not None and known.status == "failed" else None


def _rejected(candidate: PlanCandidate, verdict: Verdict) -> PlanCandidate:
    cure = "Update its driver or runtime"
    if _is_cpu(candidate):
        cure = "Update its runtime, name another precision"
    fix = f'{cure}, or pass device="{candidate.device}" to use it all the same.'
    return candidate.rejected("answer", f"wrong numbers: {verdict.reason}", fix)


def _place_of(candidate: PlanCandidate, plan: Plan, machine: Machine) -> Place:
    offer = listed_as(machine, candidate.backend, candidate.device)
    record = machine.backend(candidate.backend)
    return Place(
        backend=candidate.backend,
        device=candidate.device,
        version=offer.version or (record.version if record else None),
        driver=offer.hardware.driver if offer.hardware else None,
        hardware=hardware_id(machine),
        kv_precision=plan.kv_precision,
    )


class _RejectedError(Exception):
    """A candidate is out, and the next one's turn comes."""

    def __init__(
        self, stage: Stage, reason: str, error: Exception | None, *, fix: str | None = None
    ) -> None:
        super().__init__(reason)
        self.stage: Stage = stage
        self.reason = reason
        self.error = error
        self.fix = fix


def _is_cpu(candidate: PlanCandidate) -> bool:
    return DeviceName.parse(candidate.device).kind == "cpu"


def _as_found(artifact: PlannedArtifact | None, folder: ModelFolder) -> PlannedArtifact:
    """A planned artifact as it was made or fetched."""
    found = folder.artifact
    if artifact is not None and artifact.state == "here":
        return artifact
    return PlannedArtifact(
        format=found.format,
        precision=found.precision,
        state="here",
        path=found.path,
        bytes=weights_bytes(folder),
        id=_id_of(folder),
    )


def _id_of(folder: ModelFolder) -> str:
    found = folder.artifact
    return artifact_id(found.weights_id, found.format, found.precision)


def _warn(message: str) -> str:
    _logger.warning("%s", message)
    return message
