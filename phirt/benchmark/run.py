"""How fast a model is with each backend and device of this machine: `bench`."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from phirt._version import __version__
from phirt.benchmark.child import Load
from phirt.benchmark.report import (
    BenchFailure,
    BenchMachine,
    BenchReport,
    BenchRow,
    BenchSettings,
)
from phirt.benchmark.turns import OnStep, RowTask, take_turns
from phirt.devices.hardware import hardware_id
from phirt.devices.installed import runtime_versions, scan_installed
from phirt.devices.machine import Machine
from phirt.dispatch.candidates import check_offered
from phirt.dispatch.machine_dir import VARIABLE, machine_dir
from phirt.dispatch.plan import MemoryNeed, Plan, PlanCandidate
from phirt.dispatch.planner import listed_as
from phirt.errors import PhirtError, UnsupportedModelError
from phirt.models.store import Store
from phirt.models.variants import megabytes
from phirt.planning import Prepared, plan_on
from phirt.tuning import folder_for, working_of
from phirt.types import ProgressCallback

__all__ = ["bench"]

# Of the free memory, what the models of all rows may take together, as predicted; the rest is
# for what predictions miss, and for everybody else.
_SHARE = 0.8
_LOOK_S = 0.5  # how long it is looked how busy the machine is
_BUSY = 0.1
_MOST = {"prompt_tokens": 1 << 24, "new_tokens": 1 << 24, "concurrency": 256, "repeats": 1000}


def bench(
    model: str | Path | None = None,
    *,
    backend: str = "all",
    device: str = "all",
    precision: str = "auto",
    prompt_tokens: Sequence[int] = (128, 512),
    new_tokens: int = 64,
    concurrency: Sequence[int] = (1,),
    repeats: int = 3,
    row_timeout_s: float = 300.0,
    offline: bool = False,
    progress: ProgressCallback | None = None,
    on_step: OnStep | None = None,
) -> BenchReport:
    """Measure a model with each backend on each device of this machine, as a user sees it.

    Seconds of the load, time to first token, tokens a second of prompts and of answers, time
    between tokens, and peak memory. Each backend on each device is a row, with the form of the
    model that `phirt.load` would take there, in a process of its own, where one that crashes ends
    its row alone. Repeats alternate between the rows where all models fit into memory at once.

    What a backend needs is converted first. Nothing is downloaded: a form that would have to be
    is no row. Nothing else should run meanwhile. `phirt.load` does not choose by what is measured
    here: `phirt.tune` is for that.

    Args:
        model: As for `phirt.load`.
        backend: A backend name, or ``"all"``.
        device: A device name, or ``"all"``.
        precision: As for `phirt.load`.
        prompt_tokens: Lengths of the prompts, each of at least 1 token.
        new_tokens: Tokens of each answer, at least 2. End tokens do not end it.
        concurrency: Numbers of streams that run at once, each in a thread, on one model. Each
            is measured with each length.
        repeats: How often each is measured; medians count. One more before them does not.
        row_timeout_s: Seconds that one backend on one device may take in all. What was measured
            within them is in the report.
        offline: As for `phirt.load`.
        progress: As for `phirt.load`.
        on_step: Told what is about to be done.

    Returns:
        The report. Rows that could not be measured are in it, with the reason.

    Raises:
        ModelError: There is no such model, or nothing here can run it without a download.
        BackendError: There is no such backend, or the one that was named is missing or broken.
        DeviceNotAvailableError: No backend here offers the device that was named.
        TypeError: An argument is of a wrong type.
        ValueError: A name is malformed, a setting out of range, or prompt and answer are longer
            than the model's context.
    """
    settings = _settings(
        backend=backend,
        device=device,
        precision=precision,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        concurrency=concurrency,
        repeats=repeats,
        row_timeout_s=row_timeout_s,
    )
    say = on_step or (lambda _: None)
    when = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    prepared = _prepare(model, settings, offline=offline, progress=progress)
    candidates, failures = _candidates(prepared)
    tasks: list[RowTask] = []
    needs: list[MemoryNeed | None] = []
    for candidate in candidates:
        assert candidate.artifact is not None  # noqa: S101  # as that of all that are usable
        if candidate.artifact.state != "here":
            say(f"preparing {candidate.described}")
        try:
            tasks.append(_task(prepared, candidate))
        except PhirtError as error:
            failures.append(_failure(candidate, str(error)))
        else:
            needs.append(candidate.memory)
    grouping = _group(tasks, needs, settings, prepared.machine)
    machine = _describe(prepared.machine)
    found = take_turns(
        grouping.groups,
        settings,
        environment={"PHIRT_HOME": str(Store().root), VARIABLE: str(machine_dir())},
        on_step=say,
    )
    failures += [each for each in found if isinstance(each, BenchFailure)]
    notes = list(grouping.notes)
    if machine.busy_share > _BUSY:
        notes.append(
            f"Just before, {100 * machine.busy_share:.0f} % of the processors' time was taken by "
            "something else: figures of a busy machine say little."
        )
    return BenchReport(
        model=prepared.plan.model,
        settings=settings,
        rows=tuple(each for each in found if isinstance(each, BenchRow)),
        failures=tuple(failures),
        takes_turns=len(grouping.groups) <= 1,
        notes=tuple(notes),
        machine=machine,
        versions={
            "phirt": __version__,
            "python": platform.python_version(),
            **runtime_versions(scan_installed(sys.path)),
        },
        when=when,
    )


def _settings(
    *,
    backend: str,
    device: str,
    precision: str,
    prompt_tokens: Sequence[int],
    new_tokens: int,
    concurrency: Sequence[int],
    repeats: int,
    row_timeout_s: float,
) -> BenchSettings:
    if isinstance(row_timeout_s, bool) or not isinstance(row_timeout_s, int | float):
        raise TypeError(f"row_timeout_s must be a number of seconds, not {row_timeout_s!r}")
    if not 0 < row_timeout_s < float("inf"):
        raise ValueError(f"row_timeout_s={row_timeout_s} must be more than 0, and finite")
    return BenchSettings(
        backend=backend,
        device=device,
        precision=precision,
        prompt_tokens=_counts("prompt_tokens", prompt_tokens),
        new_tokens=_count("new_tokens", new_tokens, least=2),
        concurrency=_counts("concurrency", concurrency),
        repeats=_count("repeats", repeats),
        row_timeout_s=float(row_timeout_s),
    )


def _counts(name: str, values: object) -> tuple[int, ...]:
    """Whole numbers, ascending, each once."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a list of whole numbers, not {values!r}")
    if not values:
        raise ValueError(f"{name} must have at least one number")
    return tuple(sorted({_count(name, each) for each in values}))


def _count(name: str, value: object, *, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if not least <= value <= _MOST[name]:
        raise ValueError(f"{name}={value} must be from {least} to {_MOST[name]}")
    return value


def _prepare(
    model: str | Path | None,
    settings: BenchSettings,
    *,
    offline: bool,
    progress: ProgressCallback | None,
) -> Prepared:
    """The plan, with memory for the longest prompt and answer."""
    device, backend = (
        "auto" if name == "all" else name for name in (settings.device, settings.backend)
    )

    def planned(context: int | None) -> Prepared:
        return plan_on(
            None,
            model,
            device=device,
            backend=backend,
            precision=settings.precision,
            context=context,
            optimize="latency",
            offline=offline,
            progress=progress,
        )

    prepared = planned(None)
    check_offered(prepared.machine, device=device, backend=backend)
    forms = [row.artifact for row in prepared.plan.candidates if row.artifact is not None]
    shape = prepared.forms.shape(forms)
    needed = max(settings.prompt_tokens) + settings.new_tokens
    if shape is not None and needed > shape.context_length:
        raise ValueError(
            f"A prompt of {max(settings.prompt_tokens)} tokens and an answer of "
            f"{settings.new_tokens} are {needed}, more than the {shape.context_length} that "
            f"{prepared.plan.model!r} was made for. Pass shorter ones."
        )
    return prepared if needed <= prepared.plan.context else planned(needed)


def _candidates(prepared: Prepared) -> tuple[list[PlanCandidate], list[BenchFailure]]:
    """The best form that is here for each backend and device, and why others have none."""
    best = _best_of_each(prepared.plan)
    failures: list[BenchFailure] = []
    usable: list[PlanCandidate] = []
    is_wide = (prepared.plan.backend, prepared.plan.device) == ("auto", "auto")
    for row in best:
        if row.stage == "request" and not is_wide:
            continue  # nobody asked for it
        if row.status == "rejected":
            failures.append(_failure(row, row.reason, row.fix))
        elif _is_remote(row):
            fix = f"phirt pull {prepared.plan.model}"
            failures.append(_failure(row, "the model would have to be downloaded", fix))
        else:
            usable.append(row)
    working, broken = working_of(prepared.machine, usable)
    failures += [
        BenchFailure(backend=each.backend, device=each.device, reason=each.reason)
        for each in broken
    ]
    if not usable and any(map(_is_remote, best)):
        name = prepared.plan.model
        raise UnsupportedModelError(
            f"Nothing of {name!r} that could be measured is on this machine, and a benchmark "
            f"downloads nothing. Fetch it first: phirt pull {name}"
        )
    if not working:
        reasons = [
            f"{each.backend} on {each.device}: {each.reason.rstrip('.')}"
            + (f" ({each.fix.rstrip('.')})" if each.fix else "")
            for each in failures
        ]
        raise UnsupportedModelError(
            f"Nothing here can run {prepared.plan.model!r}. {'; '.join(reasons)}."
        )
    return working, failures


def _best_of_each(plan: Plan) -> list[PlanCandidate]:
    """Of each backend on each device, what is usable and here goes first, then what is usable."""
    best: dict[tuple[str, str], PlanCandidate] = {}
    for row in plan.candidates:
        before = best.get((row.backend, row.device))
        if before is None or _place(row) < _place(before):
            best[row.backend, row.device] = row
    return list(best.values())


def _place(row: PlanCandidate) -> int:
    if row.status == "rejected":
        return 2
    return 1 if _is_remote(row) else 0


def _is_remote(row: PlanCandidate) -> bool:
    return row.artifact is not None and row.artifact.state == "to fetch"


def _failure(row: PlanCandidate, reason: str, fix: str | None = None) -> BenchFailure:
    return BenchFailure(backend=row.backend, device=row.device, reason=reason, fix=fix)


def _task(prepared: Prepared, candidate: PlanCandidate) -> RowTask:
    artifact = folder_for(prepared, candidate, announce=None).artifact
    offer = listed_as(prepared.machine, candidate.backend, candidate.device)
    record = prepared.machine.backend(candidate.backend)
    return RowTask(
        load=Load(
            path=str(artifact.path),
            backend=candidate.backend,
            device=candidate.device,
            context=prepared.plan.context,
        ),
        version=offer.version or (record.version if record else None),
        precision=artifact.precision,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Grouping:
    """Which rows take turns, and what is to be said of it."""

    groups: list[list[RowTask]]
    notes: tuple[str, ...] = ()


def _group(
    tasks: Sequence[RowTask],
    needs: Sequence[MemoryNeed | None],
    settings: BenchSettings,
    machine: Machine,
) -> _Grouping:
    """All rows in one group, or each in its own where not all models fit into memory at once."""
    known = [need for need in needs if need is not None]
    if len(tasks) < 2:
        return _Grouping(groups=[list(tasks)])
    alone = [[task] for task in tasks]
    before = "The rows did not take turns, but were measured one after the other:"
    if len(known) < len(needs):
        return _Grouping(
            groups=alone, notes=(f"{before} what memory they need is not known for all of them.",)
        )
    others = max(settings.concurrency) - 1
    # Of a device that takes the host's memory nobody says so: its need counts there as well.
    together = sum(need.total + need.host + others * need.kv for need in known)
    least = min([machine.memory.free, *(need.free for need in known if need.free is not None)])
    if together <= _SHARE * least:
        return _Grouping(groups=[list(tasks)])
    note = f"{before} together they need {megabytes(together)}, and {megabytes(least)} are free."
    return _Grouping(groups=alone, notes=(note,))


def _describe(machine: Machine) -> BenchMachine:
    # Imported here: few programs measure.
    import psutil

    return BenchMachine(
        system=machine.system,
        release=machine.release,
        cpu=machine.cpu,
        memory_bytes=machine.memory.total,
        pci=machine.pci,
        drivers=machine.drivers,
        hardware_id=hardware_id(machine),
        busy_share=psutil.cpu_percent(interval=_LOOK_S) / 100,
    )
