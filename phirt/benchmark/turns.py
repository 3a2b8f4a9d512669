"""Lets rows take turns: each is a process of its own, with its model loaded all the while.

A machine's speed changes from one minute to the next. Where the repeats of all rows alternate,
a slow minute meets all of them alike.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from phirt.benchmark.child import Load, Loaded, Reply, Request
from phirt.benchmark.report import BenchFailure, BenchPoint, BenchRow, BenchSample, BenchSettings
from phirt.benchmark.streams import Case
from phirt.devices.record_json import from_json, to_json
from phirt.devices.worker import Worker, WorkerEndedError

__all__ = ["OnStep", "RowTask", "take_turns"]

OnStep: TypeAlias = Callable[[str], None]
"""Called with what is about to be done, in a few words."""

_CHILD = "phirt.benchmark.child"
# A runtime's idle workers spin for a while after its turn, at the next one's expense.
_REST_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class RowTask:
    """A row to be measured.

    Attributes:
        load: What is loaded.
        version: Of the runtime, or None where it does not tell.
        precision: How the weights are stored, for a message.
    """

    load: Load
    version: str | None
    precision: str | None

    @property
    def described(self) -> str:
        """Backend, device and precision, for a message."""
        form = f", {self.precision}" if self.precision else ""
        return f"{self.load.backend} on {self.load.device}{form}"


def take_turns(
    groups: Sequence[Sequence[RowTask]],
    settings: BenchSettings,
    *,
    environment: Mapping[str, str],
    on_step: OnStep,
) -> list[BenchRow | BenchFailure]:
    """Measure rows, those of a group in turns, and one group after the other.

    Args:
        groups: The rows.
        settings: What is measured.
        environment: Variables to set for their processes.
        on_step: Told what is done.

    Returns:
        What came of each row, in order.
    """
    found: list[BenchRow | BenchFailure] = []
    count = sum(map(len, groups))
    for group in groups:
        rows: list[_Row] = []
        try:
            for task in group:
                number = len(found) + len(rows) + 1
                on_step(f"loading {task.described} ({number} of {count})")
                rows.append(_Row(task, settings))
                rows[-1].load(environment)
            name = group[0].described if len(groups) > 1 else ""
            _measure(rows, settings, on_step, name=name)
        finally:
            for row in rows:
                row.close()
        found += [row.outcome for row in rows]
    return found


def _measure(rows: Sequence[_Row], settings: BenchSettings, on_step: OnStep, *, name: str) -> None:
    number = 0  # of the next prompt: no two of a model are the same
    for length, streams in settings.cases:
        for turn in range(settings.repeats + 1):
            alive = [row for row in rows if row.is_on]
            if not alive:
                return
            what = f"repeat {turn} of {settings.repeats}" if turn else "warm-up"
            on_step(": ".join(filter(None, (name, f"{_words(length, streams)}, {what}"))))
            case = Case(
                prompt_tokens=length,
                new_tokens=settings.new_tokens,
                concurrency=streams,
                number=number,
            )
            number += streams
            # Each comes after each other once in a while: who went before may matter.
            first = turn % len(alive)
            for row in [*alive[first:], *alive[:first]]:
                row.measure(case)
        for row in rows:
            row.end_case(length, streams)


def _words(length: int, streams: int) -> str:
    return f"{length:,} prompt tokens, {streams} {'stream' if streams == 1 else 'streams'}"


@dataclass(slots=True)
class _Row:
    """A row that is being measured.

    Attributes:
        task: What it is.
        settings: What is measured.
        is_on: Whether more can be measured of it.
    """

    task: RowTask
    settings: BenchSettings
    is_on: bool = False
    _worker: Worker | None = None
    _loaded: Loaded | None = None
    _spent_s: float = 0.0
    _peak: int = 0
    _samples: list[BenchSample] = field(default_factory=list)
    _last_s: float = 0.0
    _skips_case: bool = False
    _points: list[BenchPoint] = field(default_factory=list)
    _notes: list[str] = field(default_factory=list)

    def load(self, environment: Mapping[str, str]) -> None:
        """Start its process, and load the model there."""
        try:
            self._worker = Worker(_CHILD, environment=environment)
            reply = self._ask(Request(load=self.task.load))
        except WorkerEndedError as end:
            self._notes.append(f"Its process {end}.")
            return
        if reply.loaded is None:
            self._notes.append(reply.error or "It was not loaded.")
            self.close()
            return
        self._loaded = reply.loaded
        self.is_on = True

    def measure(self, case: Case) -> None:
        """Measure a case once more, where there is time for it."""
        if self._skips_case:
            return
        words = _words(case.prompt_tokens, case.concurrency)
        expected = self._last_s if self._samples else 0.0
        if self._spent_s + expected >= self.settings.row_timeout_s:
            # It would be killed within it; what was measured is as good as it is.
            done = max(len(self._samples) - 1, 0)
            self._end(f"{words}: {self._limit} were over after {done} of its repeats.")
            return
        time.sleep(_REST_S)
        started = time.perf_counter()
        try:
            reply = self._ask(Request(case=case))
        except WorkerEndedError as end:
            over = self._spent_s >= self.settings.row_timeout_s
            why = f"{self._limit} were over. Its" if over else "its"
            self._end(f"{words}: {why} process {end}.")
            return
        self._last_s = time.perf_counter() - started
        if reply.sample is None:
            self._notes.append(f"{words}: {reply.error}")
            self._skips_case = True
            return
        self._samples.append(reply.sample)

    def end_case(self, length: int, streams: int) -> None:
        """Keep what was measured of a case."""
        if len(self._samples) > 1:
            warm_up, *samples = self._samples
            self._points.append(
                BenchPoint(
                    prompt_tokens=length,
                    new_tokens=self.settings.new_tokens,
                    concurrency=streams,
                    samples=tuple(samples),
                    warm_up=warm_up,
                )
            )
        self._samples = []
        self._skips_case = False

    def close(self) -> None:
        """End its process."""
        self.is_on = False
        if self._worker is not None:
            self._worker.close()

    @property
    def outcome(self) -> BenchRow | BenchFailure:
        """What came of it."""
        load = self.task.load
        loaded = self._loaded
        if loaded is None:
            return BenchFailure(
                backend=load.backend, device=load.device, reason=" ".join(self._notes)
            )
        return BenchRow(
            backend=load.backend,
            device=load.device,
            version=self.task.version,
            format=loaded.format,
            precision=loaded.precision,
            weights_id=loaded.weights_id,
            path=loaded.path,
            load_s=loaded.load_s,
            imported_memory_bytes=loaded.imported_memory_bytes,
            loaded_memory_bytes=loaded.loaded_memory_bytes,
            peak_memory_bytes=self._peak,
            points=tuple(self._points),
            notes=tuple(self._notes),
        )

    def _ask(self, request: Request) -> Reply:
        assert self._worker is not None  # noqa: S101  # it was started
        started = time.perf_counter()
        left = max(self.settings.row_timeout_s - self._spent_s, 0.0)
        try:
            answer = self._worker.ask(json.dumps(to_json(request)), timeout_s=left)
        finally:
            self._spent_s += time.perf_counter() - started
        reply = from_json(Reply, json.loads(answer), where="reply")
        self._peak = max(self._peak, reply.peak_memory_bytes)
        return reply

    def _end(self, note: str) -> None:
        self._notes.append(note)
        self.close()

    @property
    def _limit(self) -> str:
        return f"the {self.settings.row_timeout_s:g} s of a row"
