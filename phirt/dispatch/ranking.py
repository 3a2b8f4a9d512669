"""In which order the ways to run a model go, and the sentence that says why.

Without measurements the order is a rule of thumb: a GPU with memory of its own, then the
CPU, then what shares the CPU's memory or is computed by it. What was measured goes by the
predicted time. Neither outweighs quality: numbers further from the model's own do not win
by being there sooner.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

from phirt.devices.machine import Machine
from phirt.devices.names import DeviceName
from phirt.dispatch.plan import PlanCandidate, PlannedArtifact
from phirt.types import Availability, Optimize

__all__ = ["KL_TOLERANCE", "Tier", "Way", "rank", "tier_of"]

KL_TOLERANCE = 0.01
"""What KL divergence may be above that of the best candidate, in nats, without coming after it."""

# Whose distance from the source is known to be under the tolerance where it was not measured
# (docs/precision.md). Of others, int4 first of all, nothing can be said beforehand.
_FAITHFUL = ("fp32", "fp16", "bf16", "exact", "int8")

_WORKLOADS: dict[Optimize, str] = {
    "latency": "one answer",
    "prefill": "a long prompt",
    "throughput": "many requests at once",
}


class Tier(IntEnum):
    """What a device is to a choice that cannot rest on measurements; lower goes first.

    `MEASURED` stands between them: only a GPU with memory of its own goes before what was
    measured, because it would win as soon as it was.
    """

    GPU = 0
    MEASURED = 1
    CPU = 2
    INTEGRATED = 3
    NPU = 4
    OTHER = 5
    UNSEEN = 6
    BY_NAME = 7


# What is there wherever its runtime is. A runtime that chooses for itself ("openvino-auto") is
# not chosen for a user who has not said so.
_SURE = {
    "cpu": Tier.CPU,
    "metal": Tier.GPU,
    "openvino-cpu": Tier.OTHER,
    "openvino-auto": Tier.BY_NAME,
}
# Of the kinds that say it all: `cuda` is the best that its machine has, whoever owns the memory;
# `webgpu` and `coreml` may be anything.
_TIERS = {
    "cuda": Tier.GPU,
    "tensorrt-rtx": Tier.GPU,
    "npu": Tier.NPU,
    "webgpu": Tier.OTHER,
    "coreml": Tier.OTHER,
}

_NOTES = {
    Tier.GPU: "a GPU goes before the CPU",
    Tier.CPU: "the CPU goes before what may be slower",
    Tier.INTEGRATED: "a GPU without memory of its own comes after the CPU until it is measured",
    Tier.NPU: "an NPU comes after the CPU until it is measured",
    Tier.OTHER: "it comes after the CPU until it is measured",
    Tier.UNSEEN: "neither the system nor the runtime has said that there is one",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A usable candidate, and what its place depends on.

    Attributes:
        candidate: The candidate, with no reason yet.
        tier: What its device is.
        tried: What is known of the device working at all, for the reason.
        doubt: Why it would be out under ``"auto"``, where it was asked for by name; else "".
    """

    candidate: PlanCandidate
    tier: Tier
    tried: str
    doubt: str = ""


def tier_of(offer: Availability, machine: Machine) -> Tier:
    """What a device is, as its runtime tells.

    A name that a runtime has for what neither it nor the system sees is no GPU or NPU yet. A
    GPU of which nobody tells whether it has memory of its own counts as one that has where
    its kind or its vendor leaves no doubt (``cuda``, ``metal``, NVIDIA), else as one that
    has not.
    """
    kind = DeviceName.parse(offer.device).kind
    hardware = offer.hardware
    if hardware is not None and hardware.software:
        return Tier.OTHER
    if kind in _SURE:
        return _SURE[kind]
    wanted = "npu" if kind == "npu" else "gpu"
    if hardware is None and not any(device.kind == wanted for device in machine.pci):
        return Tier.UNSEEN
    if kind in _TIERS:
        return _TIERS[kind]
    if hardware is None:
        return Tier.INTEGRATED
    discrete = hardware.vendor == "nvidia" if hardware.discrete is None else hardware.discrete
    return Tier.GPU if discrete else Tier.INTEGRATED


def rank(
    ways: Sequence[Way],
    *,
    optimize: Optimize,
    precision: str,
    is_named: bool,
    device: str = "auto",
) -> list[PlanCandidate]:
    """The ways in order, each with its reason; the first is chosen.

    Args:
        ways: In order of preference of the backends.
        optimize: What the choice is for.
        precision: What was asked for: where one is named, quality is its user's business.
        is_named: Whether backend and device were both named.
        device: The device that was asked for.
    """
    local = [way for way in ways if not _is_to_fetch(way)]
    measured = _measured_kl(ways)
    best = min((_distance(way, measured) for way in local or ways), default=0.0)

    def is_further(way: Way) -> bool:
        return precision == "auto" and _distance(way, measured) > best + KL_TOLERANCE

    def is_worse(way: Way) -> bool:
        # Of what is all still to be downloaded nothing was measured, and the build that was made
        # for a backend is a fraction of the checkpoint's size: it is taken, and that is said.
        return bool(local) and is_further(way)

    def place(way: Way) -> tuple[bool, bool, bool, int, float]:
        speed = way.candidate.speed
        tier = way.tier if speed is None else Tier.MEASURED
        seconds = 0.0 if speed is None else speed.seconds
        return bool(way.doubt), bool(local) and _is_to_fetch(way), is_worse(way), tier, seconds

    ordered = sorted(ways, key=place)
    # How a device that was named compares with the CPU is nobody's question.
    is_compared = device == "auto" or len({way.tier for way in ways}) > 1
    rivals = {way.candidate.backend for way in ordered if place(way) == place(ordered[0])}
    found = []
    for position, way in enumerate(ordered):
        reasons = [way.doubt] if way.doubt else []
        if is_named:
            reasons.append("it was named")
        if local and _is_to_fetch(way):
            reasons.append("it would have to be downloaded, and the model is here in another form")
        if is_worse(way):
            reasons.append(_why_worse(way, best))
        elif is_further(way):
            reasons.append(
                f"its weights are {_precision(way)}, and nobody measured what that costs: another "
                "form that can be downloaded is closer to the source"
            )
        note = _NOTES.get(way.tier, "it was named") if is_compared else "its device was named"
        if position == 0 and len(rivals) > 1:
            note += f"; of the backends there, {way.candidate.backend} comes first"
        reasons.append(_why(way, optimize, note, is_first=position == 0))
        if way.tried:
            reasons.append(way.tried)
        candidate = replace(way.candidate, reason="; ".join(reasons))
        found.append(candidate if position else replace(candidate, status="chosen"))
    return found


def _why(way: Way, optimize: Optimize, note: str, *, is_first: bool) -> str:
    speed = way.candidate.speed
    if speed is None:
        return f"not measured: {note}"
    fastest = "the fastest that was measured" if is_first else "measured"
    return f"{fastest}: {speed.seconds:.3g} s for {_WORKLOADS[optimize]}"


def _why_worse(way: Way, best: float) -> str:
    known = way.candidate.artifact.kl if way.candidate.artifact else None
    distance = "by nobody knows how much" if known is None else f"by a KL divergence of {known:.3f}"
    return (
        f"its weights differ from the source {distance}, those of another candidate by "
        f"{best:.3f}: it goes first only where its precision is named"
    )


def _precision(way: Way) -> str:
    artifact = way.candidate.artifact
    return (artifact and artifact.precision) or "of a precision that nobody states"


def _is_to_fetch(way: Way) -> bool:
    artifact = way.candidate.artifact
    return artifact is not None and artifact.state == "to fetch"


def _measured_kl(ways: Sequence[Way]) -> dict[str | None, float]:
    """The largest KL divergence that was measured of each precision of this model."""
    found: dict[str | None, float] = {}
    for way in ways:
        artifact = way.candidate.artifact
        if artifact is not None and artifact.kl is not None and artifact.precision is not None:
            found[artifact.precision] = max(artifact.kl, found.get(artifact.precision, 0.0))
    return found


def _distance(way: Way, measured: Mapping[str | None, float]) -> float:
    """KL divergence from the source, as it was measured or as the precision is known to have."""
    artifact = way.candidate.artifact
    if artifact is None:
        return 0.0
    if artifact.kl is not None:
        return artifact.kl
    if not _is_faithful(artifact):
        return float("inf")
    # What rounds alike is no better for not being measured yet.
    return measured.get(artifact.precision, 0.0)


def _is_faithful(artifact: PlannedArtifact) -> bool:
    # What is still to be made, "auto" makes in a precision that is faithful.
    is_automatic = artifact.precision is None and artifact.state == "to convert"
    return is_automatic or artifact.precision in _FAITHFUL
