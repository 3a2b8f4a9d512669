"""Two plans as one: what prefills, and what decodes."""

from __future__ import annotations

from dataclasses import replace

from phirt.dispatch.plan import MemoryNeed, Plan, PlanCandidate

__all__ = ["join_plans"]


def join_plans(prefill: Plan, decode: Plan, *, prefill_from: int) -> Plan:
    """The plan of a model that runs on what both of two plans chose.

    The pair is chosen; its parts follow, as what else could be used, each alone.

    Args:
        prefill: The plan of what runs long prefills.
        decode: The plan of what runs everything else.
        prefill_from: Fewest tokens of a long prefill.
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
            f"else on {_described(second)}, as was asked for"
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
