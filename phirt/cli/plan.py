"""``phirt plan``: how a model would be run here, what else could run it, and why not."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from phirt.cli.arguments import UsageError
from phirt.cli.devices import read_machine
from phirt.cli.lines import Line, paragraph, print_lines
from phirt.cli.selection import print_json
from phirt.cli.terminal import plain
from phirt.errors import PhirtError
from phirt.models.variants import megabytes

if TYPE_CHECKING:
    from phirt.devices.machine import Machine
    from phirt.dispatch.plan import MemoryNeed, Plan, PlanCandidate, PlannedArtifact, Speed

__all__ = ["print_plan"]

_INDENT = 10
_STYLES = {"chosen": "bold green", "usable": "green", "rejected": "dim"}
_STATES = {"here": "", "to convert": ", to be converted", "to fetch": ", to be downloaded"}
_WORKLOADS = {
    "latency": "one answer at a time",
    "prefill": "long prompts and short answers",
    "throughput": "many requests at once",
}


def print_plan(arguments: argparse.Namespace) -> None:
    """Carry out ``phirt plan``.

    Raises:
        UsageError: The arguments make no sense.
        PhirtError: There is no such model, or it cannot be read.
    """
    # Imported here, as what it needs is only this command's.
    from phirt.planning import plan_on

    machine = None if arguments.machine is None else read_machine(arguments.machine)
    try:
        prepared = plan_on(
            machine,
            arguments.model,
            device=arguments.device,
            backend=arguments.backend,
            precision=arguments.precision,
            context=arguments.context,
            optimize=arguments.optimize,
            kv_precision=arguments.kv_precision,
            offline=arguments.offline,
        )
    except PhirtError:
        raise
    except ValueError as error:
        raise UsageError(" ".join(str(error).split())) from error
    if arguments.json:
        print_json(prepared.plan.to_json())
    else:
        print_lines(lambda width: _lines(prepared.plan, prepared.machine, width=width))


def _lines(plan: Plan, machine: Machine, *, width: int) -> Iterator[Line]:
    yield [(plain(plan.model), "bold"), (f" on {machine.cpu.name or 'this machine'}", "")]
    yield from paragraph(_asked(plan), width=width, indent=2)
    yield []
    if plan.chosen is None:
        yield from paragraph("Nothing here can run it.", width=width, style="bold red")
    considered = [each for each in plan.candidates if each.stage != "request"]
    before = None
    for _, alike in groupby(considered, key=_said_of):
        rows = list(alike)
        if before not in (None, rows[0].status):
            yield []
        before = rows[0].status
        yield from _candidates(rows, width=width)
    unasked: dict[str, dict[str, None]] = {}
    for each in plan.candidates:
        if each.stage == "request":
            unasked.setdefault(each.backend, {})[each.device] = None
    if unasked:
        named = (f"{backend} ({', '.join(devices)})" for backend, devices in unasked.items())
        yield []
        yield from paragraph(
            f"Not asked for, or used by name only: {', '.join(named)}.", width=width, style="dim"
        )
    for note in [*plan.notes, *_hints(plan)]:
        yield []
        yield from paragraph(note, width=width, style="yellow")


def _hints(plan: Plan) -> Iterator[str]:
    usable = [each for each in plan.candidates if each.status != "rejected"]
    if len(usable) > 1 and not any(each.speed for each in usable):
        yield f"No speed was measured here: `phirt tune {plan.model}` does, and ranks them by it."


def _asked(plan: Plan) -> str:
    asked = [
        f"{name} {value!r}"
        for name, value in (
            ("device", plan.device),
            ("backend", plan.backend),
            ("precision", plan.precision),
            ("kv_precision", plan.kv_precision),
        )
        if value != "auto"
    ]
    wish = f"{', '.join(asked)}; " if asked else ""
    return f"{wish}for {_WORKLOADS[plan.optimize]}, {plan.context:,} tokens of context"


def _said_of(candidate: PlanCandidate) -> tuple[object, ...]:
    """What rows that follow each other must share to be told of together."""
    return candidate.status, candidate.reason, candidate.fix, candidate.speed


def _candidates(alike: Sequence[PlanCandidate], *, width: int) -> Iterator[Line]:
    first = alike[0]
    label, style = str(first.status), _STYLES[first.status]
    weight = "bold" if first.status == "chosen" else ""
    for candidate in alike:
        artifact = "" if candidate.artifact is None else _artifact(candidate.artifact)
        where = f"{candidate.backend:<18} {candidate.device:<13}"
        is_short = _INDENT + len(where) + len(artifact) < width
        shown = f"{where} {artifact if is_short else ''}".rstrip()
        yield [(f"{label:<{_INDENT}}", style), (plain(shown), weight)]
        if not is_short:
            yield from paragraph(artifact, width=width, indent=_INDENT)
        label = ""
    details = [first.reason]
    if first.status != "rejected":
        details += [_memory([each.memory for each in alike if each.memory]), _speed(first.speed)]
    for detail in filter(None, details):
        yield from paragraph(detail, width=width, indent=_INDENT)
    if first.fix:
        yield from paragraph(first.fix, width=width, indent=_INDENT, style="cyan")


def _artifact(artifact: PlannedArtifact) -> str:
    facts = " ".join(filter(None, (artifact.format, artifact.precision)))
    return facts + _STATES[artifact.state]


def _memory(needs: Sequence[MemoryNeed]) -> str:
    if not needs:
        return ""
    first, *others = needs
    free = "" if first.free is None else f" of {megabytes(first.free)} free"
    if others:
        low, high = (megabytes(bound(each.total for each in needs)) for bound in (min, max))
        return f"memory: {low if low == high else f'{low} to {high}'}{free}"
    return (
        f"memory: {megabytes(first.total)}{free} (weights {megabytes(first.weights)}, KV cache "
        f"{megabytes(first.kv)}, workspace {megabytes(first.workspace)})"
    )


def _speed(speed: Speed | None) -> str:
    if speed is None:
        return ""
    return (
        f"speed: {speed.prefill_tokens_per_s:,.0f} tokens/s of a prompt, "
        f"{speed.decode_tokens_per_s:,.1f} tokens/s of an answer"
    )
