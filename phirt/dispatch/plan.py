"""A plan: every artifact, backend and device that a model could run with, ranked, and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, TypeAlias

from phirt.dispatch.measurements import Setting
from phirt.types import Optimize

__all__ = [
    "DEFAULT_CONTEXT",
    "MemoryNeed",
    "Plan",
    "PlanCandidate",
    "PlanRequest",
    "PlannedArtifact",
    "Speed",
    "Stage",
]

DEFAULT_CONTEXT = 2048
"""Tokens that memory is predicted for where nobody says, or the model's own limit if less."""


Stage: TypeAlias = Literal[
    "request", "runtime", "device", "model", "memory", "load", "answer", "use"
]
"""Where a candidate was rejected.

``request``: something else was asked for; ``runtime``: it is missing or broken, or does not
offer the device; ``device``: it failed its trial there, or is quarantined; ``model``: there is
no form of the model for it; ``memory``: the model does not fit; ``load``: loading it failed;
``answer``: it was loaded, and computed wrong numbers; ``use``: it failed while it generated.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryNeed:
    """Memory that a load is predicted to take, in bytes.

    Attributes:
        weights: The weights, as the runtime keeps them.
        kv: Keys and values of ``context`` tokens.
        workspace: The runtime itself and what it computes in.
        context: Tokens that ``kv`` is for.
        free: What is free where they will be, or None where nobody tells.
        host: What the host's memory holds beside them, where they are in a device's own.
    """

    weights: int
    kv: int
    workspace: int
    context: int
    free: int | None
    host: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.kv + self.workspace

    @property
    def fits(self) -> bool:
        """Whether it fits; assumed where nobody tells what is free."""
        return self.free is None or self.total <= self.free


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedArtifact:
    """A form of the model that a backend reads, there already or still to be made.

    Attributes:
        format: Its layout, as in `Artifact`.
        precision: How its weights are stored, where that is known.
        state: Whether it is on this disk.
        path: The folder, where it is.
        bytes: Size of the weights' files, where known.
        kl: Mean KL divergence from its fp32 source that was measured when it was built, in
            nats, or None where it was not.
        id: `artifact_id`, by which measurements are kept; None where it is not here.
        devices: Kinds of device that it was exported for; empty for any.
        backends: Backends that it is meant for; empty for all that read its layout.
    """

    format: str
    precision: str | None
    state: Literal["here", "to convert", "to fetch"]
    path: Path | None = None
    bytes: int | None = None
    kl: float | None = None
    id: str | None = None
    devices: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What was measured of a candidate (`phirt tune`).

    Attributes:
        prefill_tokens_per_s: Of the longest prompt that was measured.
        decode_tokens_per_s: One sequence, after the shortest prompt that was measured.
        seconds: Predicted time of the workload that the plan is for.
        prefill_seconds: That of one of its prompts.
        setting: The setting that is best for it.
        when: When it was measured, in UTC.
    """

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    seconds: float
    prefill_seconds: float
    setting: Setting
    when: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanCandidate:
    """One way to run the model.

    Attributes:
        artifact: What would be loaded; None where the backend is out before that is asked.
        backend: Name of the backend.
        device: Device name.
        status: ``chosen``, ``usable`` or ``rejected``.
        reason: Why, in one sentence.
        fix: What the user can do about it, or None.
        memory: What it is predicted to take, where the model's shape is known.
        speed: What was measured, or None.
        stage: Where it was rejected, or None.
    """

    artifact: PlannedArtifact | None
    backend: str
    device: str
    status: Literal["chosen", "usable", "rejected"]
    reason: str
    fix: str | None = None
    memory: MemoryNeed | None = None
    speed: Speed | None = None
    stage: Stage | None = None

    @property
    def described(self) -> str:
        """Backend and device, for a message."""
        return f"{self.backend} on {self.device}"

    def rejected(self, stage: Stage, reason: str, fix: str | None = None) -> PlanCandidate:
        """It, rejected."""
        return replace(self, status="rejected", reason=reason, fix=fix, stage=stage)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """What was asked for.

    Attributes:
        model: The model.
        device: A device name, or ``"auto"``.
        backend: A backend name, or ``"auto"``.
        precision: A precision, or ``"auto"``.
        context: Tokens of context that there must be memory for.
        optimize: What the choice is for.
        kv_precision: One of `KV_PRECISIONS`, or ``"auto"`` for what a backend does by itself.
    """

    model: str
    device: str = "auto"
    backend: str = "auto"
    precision: str = "auto"
    context: int = DEFAULT_CONTEXT
    optimize: Optimize = "latency"
    kv_precision: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What `phirt.load` would do, or did.

    Attributes:
        model: The model, as it was asked for.
        device: The device that was asked for.
        backend: The backend that was asked for.
        precision: The precision that was asked for.
        context: Tokens of context that memory was predicted for.
        optimize: What it is for.
        candidates: All that was considered, best first; the chosen one, if any, is the first.
        notes: What else the user should know, a sentence each.
        kv_precision: The precision of the KV cache that was asked for.
    """

    model: str
    device: str
    backend: str
    precision: str
    context: int
    optimize: Optimize
    candidates: tuple[PlanCandidate, ...]
    notes: tuple[str, ...] = ()
    kv_precision: str = "auto"

    @property
    def chosen(self) -> PlanCandidate | None:
        """The candidate that is used, or None where none can be."""
        return next((each for each in self.candidates if each.status == "chosen"), None)

    def with_note(self, note: str) -> Plan:
        """The plan with another note."""
        return replace(self, notes=(*self.notes, note))

    def without(self, candidate: PlanCandidate, rejected: PlanCandidate) -> Plan:
        """The plan with one candidate rejected; the best of the others is chosen.

        Args:
            candidate: One of its candidates.
            rejected: What becomes of it (`PlanCandidate.rejected`).
        """
        others = [each for each in self.candidates if each is not candidate]
        usable = [each for each in others if each.status != "rejected"]
        if usable and candidate.status == "chosen":
            usable[0] = replace(usable[0], status="chosen")
        out = [each for each in others if each.status == "rejected"]
        # Behind those whose turn came before.
        before = sum(1 for _ in takewhile(lambda each: each.artifact is not None, out))
        return replace(self, candidates=(*usable, *out[:before], rejected, *out[before:]))

    def without_device(self, candidate: PlanCandidate) -> Plan:
        """The plan less all that a backend would do on the device of a rejected candidate."""
        same = (candidate.backend, candidate.device)
        left = [
            each
            for each in self.candidates
            if each.status == "rejected" or (each.backend, each.device) != same
        ]
        if left and left[0].status == "usable":
            left[0] = replace(left[0], status="chosen")
        return replace(self, candidates=tuple(left))

    def with_artifact(self, artifact: PlannedArtifact) -> Plan:
        """The plan with the chosen candidate's artifact as it was made or fetched."""
        return replace(
            self,
            candidates=tuple(
                replace(each, artifact=artifact) if each is self.chosen else each
                for each in self.candidates
            ),
        )

    def to_json(self) -> dict[str, Any]:
        """All of it in values of JSON; a path is text."""
        document = asdict(self)
        for row, candidate in zip(document["candidates"], self.candidates, strict=True):
            if candidate.artifact is not None:
                path = candidate.artifact.path
                row["artifact"]["path"] = None if path is None else str(path)
            if candidate.memory is not None:
                row["memory"] |= {"total": candidate.memory.total, "fits": candidate.memory.fits}
        return document
