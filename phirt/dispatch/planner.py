"""From the record of a machine and the forms of a model to a plan, by data alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from phirt.devices.machine import BackendRecord, Machine
from phirt.devices.names import DeviceName
from phirt.dispatch.absent import how_served, why_missing
from phirt.dispatch.fit import check_fit
from phirt.dispatch.measurements import (
    Measurement,
    fastest,
    predict_prefill,
    predict_seconds,
)
from phirt.dispatch.needs import memory_need
from phirt.dispatch.plan import (
    MemoryNeed,
    Plan,
    PlanCandidate,
    PlannedArtifact,
    PlanRequest,
    Speed,
    Stage,
)
from phirt.dispatch.quarantine import in_force
from phirt.dispatch.ranking import Tier, Way, rank, tier_of
from phirt.dispatch.registry import formats_of, is_automatic, kv_precisions_of
from phirt.dispatch.shape import ModelShape
from phirt.errors import OutOfMemoryError, UnknownBackendError
from phirt.models.variants import device_rank
from phirt.protocols import Accept, Reject
from phirt.types import Availability

__all__ = ["OFFERED", "Accepts", "listed_as", "make_plan", "offer_of"]

Accepts: TypeAlias = Callable[[PlannedArtifact, str, str], Accept | Reject]
"""``f(artifact, backend, device)``: whether the backend's adapter takes it there."""

_KV_FIX = 'Leave kv_precision at "auto", or name another backend.'

OFFERED = ("found", "loads", "ran")
"""What a probe says of a device that a load may be tried on."""


def make_plan(
    machine: Machine,
    artifacts: Sequence[PlannedArtifact],
    request: PlanRequest,
    *,
    formats: Mapping[str, Sequence[str]] | None = None,
    refusals: Mapping[str, str] | None = None,
    shape: ModelShape | None = None,
    measurements: Sequence[Measurement] = (),
    accepts: Accepts | None = None,
    notes: Sequence[str] = (),
) -> Plan:
    """Every way to run a model on a machine, ranked, and why the others are none.

    Nothing is asked of this machine: the record of another one gives the plan that is made
    there.

    Args:
        machine: The record.
        artifacts: The forms of the model, preferred first.
        request: What was asked for.
        formats: The layouts that each backend reads, preferred first; those of the adapters
            that are registered here where not given.
        refusals: Why a backend cannot have the model in any form, by backend, where that is
            known.
        shape: The decoder's sizes, by which memory is predicted; None where nobody knows them.
        measurements: What was measured of these artifacts on that machine.
        accepts: Asks the adapters, where the artifacts and the runtimes are here.
        notes: Put into the plan.

    Raises:
        ValueError: The name of the device is malformed.
    """
    judge = _Judge(
        machine=machine,
        artifacts=artifacts,
        request=request,
        device=DeviceName.parse(request.device),
        formats=_registered(machine) if formats is None else formats,
        refusals=refusals or {},
        shape=shape,
        measurements=measurements,
        accepts=accepts,
    )
    ways: list[Way] = []
    rejected: list[PlanCandidate] = []
    for record in machine.backends:
        for row in judge.rows(record):
            if isinstance(row, Way):
                ways.append(row)
            else:
                rejected.append(row)
    ranked = rank(
        ways,
        optimize=request.optimize,
        precision=request.precision,
        is_named="auto" not in (request.device, request.backend),
        device=request.device,
    )
    return Plan(
        model=request.model,
        device=request.device,
        backend=request.backend,
        precision=request.precision,
        context=request.context,
        optimize=request.optimize,
        candidates=(*ranked, *rejected),
        notes=tuple(notes),
        kv_precision=request.kv_precision,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Judge:
    """Says of each backend, device and artifact whether it can be used."""

    machine: Machine
    artifacts: Sequence[PlannedArtifact]
    request: PlanRequest
    device: DeviceName
    formats: Mapping[str, Sequence[str]]
    refusals: Mapping[str, str]
    shape: ModelShape | None
    measurements: Sequence[Measurement]
    accepts: Accepts | None

    def rows(self, record: BackendRecord) -> Iterator[Way | PlanCandidate]:
        """The rows of one backend."""
        name = record.backend
        offered = [each for each in record.listing if each.status in OFFERED]
        out = self._excluded(record)
        if out is not None:
            for device in [each.device for each in offered] or [self._any_device]:
                yield _out(out.stage, name, device, out.reason, out.fix)
            return
        if record.outcome == "not run" and not record.listing:
            reason = f"nothing is known of it yet: {record.reason}"
            yield from self._on(record, Availability(self._any_device, "found", reason))
            return
        if record.outcome not in ("listed", "not run"):
            yield _out("runtime", name, self._any_device, record.reason, record.fix)
            return
        for offer in record.listing:
            if offer in offered:
                continue
            if offer.status == "no device" and not self._is_meant(offer):
                yield _out("request", name, offer.device, self._another_device)
            elif offer.status == "missing":
                reason, fix = why_missing(self.machine, record, offer, self.device)
                yield _out("runtime", name, self._any_device, reason, fix)
            else:
                yield _out("runtime", name, offer.device, offer.reason, offer.fix)
        if offered:
            yield from self._among(record, offered)

    def _excluded(self, record: BackendRecord) -> _Exclusion | None:
        """Why a backend is out whatever it finds, if it is."""
        name, asked = record.backend, self.request.backend
        if asked not in ("auto", name):
            return _Exclusion("request", f"backend {asked!r} was asked for")
        if asked == "auto" and not is_automatic(name):
            return _Exclusion("request", "it is used by name only")
        wanted = self.request.kv_precision
        if wanted == "auto" or wanted in _kv_precisions(record):
            return None
        return _Exclusion("runtime", f"it keeps no KV cache in {wanted}", _KV_FIX)

    def _is_meant(self, offer: Availability) -> bool:
        return self.device.kind == "auto" or self.device.is_one_of([offer.device])

    @property
    def _another_device(self) -> str:
        return f"device {self.request.device!r} was asked for"

    @property
    def _any_device(self) -> str:
        """The device of a row that is about the backend as a whole."""
        return "cpu" if self.device.kind == "auto" else str(self.device)

    def _among(
        self, record: BackendRecord, offered: Sequence[Availability]
    ) -> Iterator[Way | PlanCandidate]:
        if self.device.kind == "auto":
            for offer in offered:
                yield from self._on(record, offer)
            return
        meant = self._meant(offered)
        for offer in offered:
            if offer in meant:
                # Of several, each by the name that means it alone.
                device = offer.device if self.device.index is None else str(self.device)
                yield from self._on(record, offer, device=device)
            elif not self._is_meant(offer):
                yield _out("request", record.backend, offer.device, self._another_device)
        # Where the runtime looked for it, its own words are there already.
        if not meant and not any(map(self._is_meant, record.listing)):
            names = ", ".join(dict.fromkeys(offer.device for offer in offered))
            yield _out(
                "runtime",
                record.backend,
                str(self.device),
                f"it offers only {names}",
                how_served(self.machine, record, self.device)
                or 'Pass one of these, or device="auto".',
            )

    def _meant(self, offered: Sequence[Availability]) -> list[Availability]:
        """What the name means: a kind without a number is whichever of that kind is best."""
        numbered = [offer for offer in offered if ":" in offer.device and self._is_meant(offer)]
        if self.device.index is None and numbered:
            return numbered
        match = offer_of(offered, self.device)
        return [] if match is None else [match]

    def _on(
        self, record: BackendRecord, offer: Availability, device: str | None = None
    ) -> Iterator[Way | PlanCandidate]:
        """The rows of one device, one an artifact."""
        name, device = record.backend, device or offer.device
        tier, doubt = tier_of(offer, self.machine), ""
        if tier is Tier.BY_NAME and self.device.kind == "auto":
            reason = "it is used by name only: there the runtime chooses"
            yield _out("request", name, device, reason)
            return
        wanted = self.request.kv_precision
        if wanted != "auto" and DeviceName.parse(device).kind not in _kv_precisions(record)[wanted]:
            yield _out("runtime", name, device, f"it keeps no KV cache in {wanted} there", _KV_FIX)
            return
        fault = self._fault(record, offer)
        if fault is not None:
            reason, fix, is_only_doubt = fault
            if not is_only_doubt or self.device.kind == "auto":
                yield _out("device", name, device, reason, fix)
                return
            doubt = f"{reason} (it was named, so it may be used)"
        fitting = self._fitting(name, device)
        if not fitting:
            reason = self.refusals.get(name) or self._no_artifact(name)
            yield _out("model", name, device, reason)
        for artifact in fitting:
            candidate = PlanCandidate(
                artifact=artifact,
                backend=name,
                device=device,
                status="usable",
                reason="",
                memory=self._memory(artifact, name, offer),
                speed=self._speed(artifact, record, offer),
            )
            rejected = self._objection(candidate)
            yield rejected or Way(
                candidate=candidate, tier=tier, tried=_tried(record, offer), doubt=doubt
            )

    def _objection(self, candidate: PlanCandidate) -> PlanCandidate | None:
        """The candidate rejected, where its artifact does not go there."""
        artifact = candidate.artifact
        assert artifact is not None  # noqa: S101  # it was made of one
        backend, device = candidate.backend, candidate.device
        held = self._held_otherwise(artifact, backend, device)
        if held:
            return candidate.rejected(
                "model",
                f"it would have to be fetched as {artifact.format}, and is here as {held}",
                f'To fetch it in another form as well, pass backend="{backend}".',
            )
        if self.accepts is not None and artifact.state == "here":
            verdict = self.accepts(artifact, backend, device)
            if isinstance(verdict, Reject):
                return candidate.rejected("model", verdict.reason.rstrip("."), verdict.fix)
        if candidate.memory is None or self.shape is None:
            return None
        try:
            check_fit(
                candidate.memory,
                shape=self.shape,
                model=self.request.model,
                backend=backend,
                device=device,
                precision=artifact.precision,
            )
        except OutOfMemoryError as error:
            return candidate.rejected("memory", str(error))
        return None

    def _held_otherwise(self, artifact: PlannedArtifact, backend: str, device: str) -> str:
        """The other forms that are here for a device, where this one would be fetched by "auto"."""
        named = (self.request.backend, self.request.precision) != ("auto", "auto")
        if named or artifact.state != "to fetch":
            return ""
        kind, reads = DeviceName.parse(device).kind, self.formats.get(backend, ())
        held = [
            other.format
            for other in self.artifacts
            if other.state == "here"
            and other.format not in reads
            and device_rank(kind, frozenset(other.devices)) is not None
        ]
        return " and ".join(dict.fromkeys(held))

    def _memory(
        self, artifact: PlannedArtifact, backend: str, offer: Availability
    ) -> MemoryNeed | None:
        if self.shape is None:
            return None
        return memory_need(
            artifact,
            self.shape,
            backend=backend,
            offer=offer,
            machine=self.machine,
            context=self.request.context,
            kv_precision=self.request.kv_precision,
        )

    def _speed(
        self, artifact: PlannedArtifact, record: BackendRecord, offer: Availability
    ) -> Speed | None:
        optimize = self.request.optimize
        best = artifact.id and fastest(
            self.measurements,
            artifact=artifact.id,
            backend=record.backend,
            device=offer.device,
            version=offer.version or record.version,
            optimize=optimize,
        )
        if not best:
            return None
        return Speed(
            prefill_tokens_per_s=best.points[-1].tokens / best.points[-1].prefill_s,
            decode_tokens_per_s=1 / best.points[0].decode_s,
            seconds=predict_seconds(best, optimize),
            prefill_seconds=predict_prefill(best, optimize),
            setting=best.setting,
            when=best.when,
        )

    def _fault(
        self, record: BackendRecord, offer: Availability
    ) -> tuple[str, str | None, bool] | None:
        """What is wrong with a device: reason, fix, and whether its name lets it be used."""
        entry = in_force(
            self.machine.quarantine,
            backend=record.backend,
            device=offer.device,
            version=offer.version or record.version,
            driver=offer.hardware.driver if offer.hardware else None,
        )
        if entry is not None:
            fix = "Update its driver or runtime, which ends the quarantine."
            return f"quarantined since {entry.when}: {entry.reason}", fix, True
        trial = record.trial(offer.device)
        if trial is None or trial.outcome in ("ran", "not run"):
            return None
        return trial.reason, trial.fix, trial.outcome == "wrong numbers"

    def _fitting(self, backend: str, device: str) -> list[PlannedArtifact]:
        readable = tuple(self.formats.get(backend, ()))
        kind = DeviceName.parse(device).kind
        fitting = [
            artifact
            for artifact in self.artifacts
            if artifact.format in readable
            and backend in (artifact.backends or (backend,))
            and device_rank(kind, frozenset(artifact.devices)) is not None
        ]
        # Where the caller has not said what is meant for whom, the backend's own order counts.
        return sorted(fitting, key=lambda a: 0 if a.backends else readable.index(a.format))

    def _no_artifact(self, backend: str) -> str:
        reads = " or ".join(self.formats.get(backend, ())) or "nothing that is known"
        held = " and ".join(dict.fromkeys(_described(artifact) for artifact in self.artifacts))
        return f"it reads {reads}, and the model is there as {held or 'nothing'}"


@dataclass(frozen=True, slots=True)
class _Exclusion:
    stage: Stage
    reason: str
    fix: str | None = None


def _kv_precisions(record: BackendRecord) -> Mapping[str, tuple[str, ...]]:
    with contextlib.suppress(UnknownBackendError):  # a plugin of the machine that was recorded
        return kv_precisions_of(record.backend, imports=not record.is_fatal)
    return {}


def offer_of(offered: Sequence[Availability], device: DeviceName) -> Availability | None:
    """The one of a backend's devices that a name means, or None."""
    for offer in offered:
        if device.is_one_of([offer.device]):
            return offer
    # A kind without a number is the only one of it where its hardware is known, and says nothing
    # of how many there are where it is not: the load will. A machine has one CPU.
    names = [offer.device for offer in offered]
    is_numbered = any(name.startswith(f"{device.kind}:") for name in names)
    if device.kind == "cpu" or is_numbered:
        return None
    unknown = (offer for offer in offered if offer.hardware is None)
    return next((offer for offer in unknown if offer.device == device.kind), None)


def listed_as(machine: Machine, backend: str, device: str) -> Availability:
    """How a backend lists the device of a candidate."""
    record = machine.backend(backend)
    offered = [each for each in record.listing if each.status in OFFERED] if record else []
    match = offer_of(offered, DeviceName.parse(device))
    return match or Availability(device, "found", "not listed")


def _registered(machine: Machine) -> dict[str, tuple[str, ...]]:
    """What the backends of a machine read, those of them that are registered here."""
    found = {}
    for record in machine.backends:
        with contextlib.suppress(UnknownBackendError):
            found[record.backend] = formats_of(record.backend, imports=not record.is_fatal)
    return found


def _out(
    stage: Stage, backend: str, device: str, reason: str, fix: str | None = None
) -> PlanCandidate:
    row = PlanCandidate(artifact=None, backend=backend, device=device, status="usable", reason="")
    return row.rejected(stage, reason, fix)


def _tried(record: BackendRecord, offer: Availability) -> str:
    trial = record.trial(offer.device)
    if trial is None:
        return "" if record.outcome == "listed" else offer.reason
    return "a tiny model ran there" if trial.outcome == "ran" else trial.reason


def _described(artifact: PlannedArtifact) -> str:
    devices = f" for {' and '.join(artifact.devices)}" if artifact.devices else ""
    return f"{artifact.format}{devices}"
