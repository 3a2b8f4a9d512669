"""Two runtimes for one generation: which two to take, and their plans as one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import permutations

from phirt.dispatch.measurements import WORKLOADS
from phirt.dispatch.plan import MemoryNeed, Plan, PlanCandidate
from phirt.dispatch.ranking import KL_TOLERANCE

__all__ = ["PairChoice", "choose_pair", "join_plans"]


# Seconds for each byte of keys and values that changes hands: an export, a new session and an
# import took 40 us for each token of SmolLM2 (docs/two-runtimes.md).
_HAND_OVER_S = 40e-6 / 46_080
# A pair holds the weights twice: for less than this it is not taken.
_GAIN = 0.95
# Backends that cannot hand a cache over, which is known without loading a model.
_NO_HAND_OVER = ("onnxruntime-genai",)
# Mean KL divergence, in nats, that the prompt's weights may be from their source where the
# answer's are nearer.
_MOST_KL = 0.01


@dataclass(frozen=True, slots=True)
class PairChoice:
    """Two candidates that are predicted to be faster together than each candidate alone.

    Attributes:
        prefill: What runs long prefills.
        decode: What runs everything else.
        reason: Why, in one sentence.
    """

    prefill: PlanCandidate
    decode: PlanCandidate
    reason: str


def choose_pair(plan: Plan) -> PairChoice | str:
    """The two candidates of a plan that are fastest together, or why one alone is better.

    Only what was measured counts, of what is here, on the CPU.

    Args:
        plan: The plan.
    """
    if plan.optimize == "throughput":
        return "no pair was looked for: two runtimes share no batch"
    first = plan.chosen
    if first is not None and first.device != "cpu":
        return f"no pair was looked for: {first.described} goes before the CPU"
    usable = [each for each in plan.candidates if each.status != "rejected"]
    timed = [each for each in usable if each.speed and each.device == "cpu" and _is_here(each)]
    if plan.precision == "auto":
        # What a load of one runtime would not take before others is not taken by halves either.
        nearest = min(map(_distance, timed), default=0.0)
        timed = [each for each in timed if _distance(each) <= nearest + KL_TOLERANCE]
    timed = [each for each in timed if each.backend not in _NO_HAND_OVER]
    if len(timed) < 2:
        return (
            "no pair was looked for: fewer than two that could share a generation were measured "
            f"(phirt tune {plan.model})"
        )
    prompt = WORKLOADS[plan.optimize].prompt

    def seconds(pair: tuple[PlanCandidate, PlanCandidate]) -> float:
        prefill, decode = pair
        assert prefill.speed is not None  # noqa: S101  # they are timed
        assert decode.speed is not None  # noqa: S101
        need = decode.memory
        moved = 0.0 if need is None else prompt * need.kv / need.context * _HAND_OVER_S
        answer = decode.speed.seconds - decode.speed.prefill_seconds
        return prefill.speed.prefill_seconds + moved + answer

    pairs = [pair for pair in permutations(timed, 2) if _keeps_quality(*pair) and _fit(*pair)]
    best = min(pairs, key=seconds, default=None)
    alone = first if first is not None and first.speed else min(timed, key=_alone)
    if best is None:
        return "no pair was taken: none fits into memory beside the other, or loses too much"
    by_one = f"{_alone(alone):.3g} s are predicted for {_described(alone)} alone"
    if seconds(best) >= _GAIN * _alone(alone):
        return f"no pair was taken: {by_one}, and {seconds(best):.3g} s for the best two"
    return PairChoice(*best, reason=f"as {by_one}, and {seconds(best):.3g} s for these two")


def _alone(candidate: PlanCandidate) -> float:
    assert candidate.speed is not None  # noqa: S101  # it is timed
    return candidate.speed.seconds


def _is_here(candidate: PlanCandidate) -> bool:
    return candidate.artifact is not None and candidate.artifact.state == "here"


def _distance(candidate: PlanCandidate) -> float:
    """KL divergence of its weights from their source, in nats; of one that nobody measured, any."""
    kl = None if candidate.artifact is None else candidate.artifact.kl
    return math.inf if kl is None else kl


def _keeps_quality(prefill: PlanCandidate, decode: PlanCandidate) -> bool:
    """Whether the prompt's weights are near their source, or as near as the answer's."""
    distance = _distance(prefill)
    return distance < math.inf and distance <= max(_MOST_KL, _distance(decode))


def _fit(prefill: PlanCandidate, decode: PlanCandidate) -> bool:
    together = _together(prefill.memory, decode.memory)
    return together is not None and together.fits


def join_plans(
    prefill: Plan, decode: Plan, *, prefill_from: int, why: str = "as was asked for"
) -> Plan:
    """The plan of a model that runs on what both of two plans chose.

    The pair is chosen; its parts follow, as what else could be used, each alone.

    Args:
        prefill: The plan of what runs long prefills.
        decode: The plan of what runs everything else.
        prefill_from: Fewest tokens of a long prefill.
        why: Ends the sentence that says what runs where.
    """
    first, second = prefill.chosen, decode.chosen
    assert first is not None  # noqa: S101  # a plan that was carried out
    assert second is not None  # noqa: S101
    pair = PlanCandidate(
        artifact=second.artifact,
        backend=f"{first.backend}+{second.backend}",
        device="+".join(dict.fromkeys((first.device, second.device))),
        status="chosen",
        reason=(
            f"prefills of {prefill_from} tokens or more run on {_described(first)}, everything "
            f"else on {_described(second)}, {why}"
        ),
        memory=_together(first.memory, second.memory),
    )
    parts = [
        replace(part, status="usable", reason=f"{role} of the pair")
        for part, role in ((first, "the part for prefill"), (second, "the part for decode"))
    ]
    return replace(
        decode,
        device=pair.device,
        backend=pair.backend,
        candidates=(pair, *parts),
        notes=tuple(dict.fromkeys((*prefill.notes, *decode.notes))),
    )


def _described(part: PlanCandidate) -> str:
    artifact = part.artifact
    form = "" if artifact is None else f"{artifact.format} {artifact.precision or ''}".strip()
    return f"{part.described} ({form})" if form else part.described


def _together(first: MemoryNeed | None, second: MemoryNeed | None) -> MemoryNeed | None:
    if first is None or second is None:
        return None
    free = [need.free for need in (first, second) if need.free is not None]
    return MemoryNeed(
        weights=first.weights + second.weights,
        kv=first.kv + second.kv,
        workspace=first.workspace + second.workspace,
        context=second.context,
        free=min(free, default=None),
        host=first.host + second.host,
    )
