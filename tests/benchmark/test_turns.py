"""Rows take turns; one that crashes, hangs or is slow ends alone, with what it has."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from phirt.benchmark import turns
from phirt.benchmark.child import Load, Loaded, Reply, Request
from phirt.benchmark.report import BenchFailure, BenchRow
from phirt.benchmark.turns import RowTask, take_turns
from phirt.devices.record_json import from_json, to_json
from phirt.devices.worker import WorkerEndedError
from tests.benchmark.samples import SETTINGS, sample


def task(backend: str) -> RowTask:
    load = Load(path="somewhere", backend=backend, device="cpu", context=2048)
    return RowTask(load=load, version="1.2", precision="int8")


class Workers:
    """In place of `Worker`: each is of the backend that it is asked to load, and has a script.

    A step of a script is seconds that a case takes, an error that it answers, an exception, or
    seconds and an exception after them.
    """

    def __init__(self, scripts: dict[str, list[Any]]) -> None:
        self.scripts = scripts
        self.log: list[tuple[str, Any]] = []
        self.limits: list[float] = []
        self.now = 0.0

    def __call__(self, module: str, *, environment: Any) -> FakeWorker:
        assert module == "phirt.benchmark.child"
        return FakeWorker(self)

    def clock(self) -> float:
        return self.now


class FakeWorker:
    def __init__(self, workers: Workers) -> None:
        self.workers = workers
        self.backend = ""
        self.closed = 0

    def ask(self, line: str, *, timeout_s: float) -> str:
        assert not self.closed
        workers = self.workers
        request = from_json(Request, json.loads(line), where="request")
        workers.limits.append(timeout_s)
        if request.load is not None:
            self.backend = request.load.backend
        workers.log.append((self.backend, request.case or "load"))
        step = workers.scripts[self.backend].pop(0)
        if isinstance(step, tuple):
            seconds, step = step
            workers.now += seconds
        if isinstance(step, BaseException):
            raise step
        if isinstance(step, str):
            return json.dumps(to_json(Reply(error=step, peak_memory_bytes=7)))
        workers.now += step
        if request.case is not None:
            found = sample(step, streams=request.case.concurrency)
            return json.dumps(to_json(Reply(sample=found, peak_memory_bytes=int(1000 * step))))
        loaded = Loaded(
            format="onnx-genai",
            precision="int8",
            weights_id="sha256:a",
            path="somewhere",
            load_s=step,
            imported_memory_bytes=1,
            loaded_memory_bytes=2,
        )
        return json.dumps(to_json(Reply(loaded=loaded, peak_memory_bytes=2)))

    def close(self, *, kill: bool = False) -> None:
        self.closed += 1
        self.workers.log.append((self.backend, "close"))


@pytest.fixture
def run(monkeypatch):
    """Takes turns with scripts by backend; gives what was found, the workers and the steps."""

    def run(scripts, *, together=True, settings=SETTINGS):
        workers = Workers(scripts)
        steps: list[str] = []
        monkeypatch.setattr(turns, "Worker", workers)
        clock = SimpleNamespace(perf_counter=workers.clock, sleep=lambda _: None)
        monkeypatch.setattr(turns, "time", clock)
        tasks = [task(backend) for backend in scripts]
        groups = [tasks] if together else [[each] for each in tasks]
        found = take_turns(groups, settings, environment={}, on_step=steps.append)
        return found, workers, steps

    return run


def measured(workers):
    return [backend for backend, what in workers.log if what not in ("load", "close")]


def test_repeats_alternate_and_none_is_always_first(run):
    found, workers, steps = run({"a": [1.0] * 5, "b": [2.0] * 5, "c": [3.0] * 5})
    assert [what for _, what in workers.log[:3]] == ["load"] * 3
    assert measured(workers) == [*"abc", *"bca", *"cab", *"abc"]
    assert [type(each) for each in found] == [BenchRow] * 3
    (point,) = found[1].points
    assert len(point.samples) == 3
    assert found[1].load_s == 2.0
    assert found[1].peak_memory_bytes == 2000
    assert steps[:2] == ["loading a on cpu, int8 (1 of 3)", "loading b on cpu, int8 (2 of 3)"]
    assert steps[3:5] == [
        "128 prompt tokens, 1 stream, warm-up",
        "128 prompt tokens, 1 stream, repeat 1 of 3",
    ]


def test_all_rows_get_the_same_prompts_and_no_prompt_comes_twice(run):
    settings = replace(SETTINGS, prompt_tokens=(8, 16), concurrency=(1, 3))
    _, workers, _ = run({"a": [1.0] * 17, "b": [1.0] * 17}, settings=settings)
    numbers = {
        name: [
            number
            for backend, what in workers.log
            if backend == name and what not in ("load", "close")
            for number in range(what.number, what.number + what.concurrency)
        ]
        for name in "ab"
    }
    assert numbers["a"] == numbers["b"] == list(range(4 * (1 + 1 + 3 + 3)))


def test_what_does_not_fit_at_once_is_measured_one_after_the_other(run):
    _, workers, steps = run({"a": [1.0] * 5, "b": [1.0] * 5}, together=False)
    assert measured(workers) == [*"aaaa", *"bbbb"]
    assert workers.log.index(("a", "close")) < workers.log.index(("b", "load"))
    assert "b on cpu, int8: 128 prompt tokens, 1 stream, warm-up" in steps


def test_a_crash_ends_its_row_alone_and_what_it_has_is_kept(run):
    settings = replace(SETTINGS, prompt_tokens=(8, 16))
    crash = WorkerEndedError("crashed with SIGSEGV: it was bad")
    (a, b), _, _ = run({"a": [1.0, *[1.0] * 4, 1.0, 1.0, crash], "b": [1.0] * 9}, settings=settings)
    assert [(len(each.samples), each.prompt_tokens) for each in a.points] == [(3, 8), (1, 16)]
    assert a.notes == ("16 prompt tokens, 1 stream: its process crashed with SIGSEGV: it was bad.",)
    assert [len(each.samples) for each in b.points] == [3, 3]
    assert b.notes == ()


def test_one_that_crashes_as_it_loads_is_a_failure(run):
    a, b = run({"a": [WorkerEndedError("gave no answer within 300 s")], "b": [1.0] * 5})[0]
    assert a == BenchFailure(
        backend="a", device="cpu", reason="Its process gave no answer within 300 s."
    )
    assert isinstance(b, BenchRow)


def test_an_error_of_a_load_is_the_reason(run):
    (a,), workers, _ = run({"a": ["There is no memory for it."]})
    assert a.reason == "There is no memory for it."
    assert ("a", "close") in workers.log


def test_a_case_that_fails_is_left_out_and_others_go_on(run):
    settings = replace(SETTINGS, prompt_tokens=(8, 16))
    (a,), workers, _ = run({"a": [1.0, "The prompt is too long.", *[1.0] * 4]}, settings=settings)
    assert [each.prompt_tokens for each in a.points] == [16]
    assert a.notes == ("8 prompt tokens, 1 stream: The prompt is too long.",)
    assert len(measured(workers)) == 5


def test_a_slow_row_ends_before_its_time_is_over(run):
    settings = replace(SETTINGS, row_timeout_s=10.0)
    (a, b), workers, _ = run({"a": [1.0, 4.0, 4.0], "b": [1.0] * 5}, settings=settings)
    assert [len(each.samples) for each in a.points] == [1]
    assert a.notes == (
        "128 prompt tokens, 1 stream: the 10 s of a row were over after 1 of its repeats.",
    )
    # Each request is given what is left of the row's own time.
    assert workers.limits[:2] == [10.0, 10.0]
    assert min(workers.limits) == 5.0
    assert len(b.points[0].samples) == 3


def test_a_case_is_not_begun_when_the_time_is_over(run):
    settings = replace(SETTINGS, prompt_tokens=(8, 16), row_timeout_s=10.0)
    (a,), workers, _ = run({"a": [1.0, 2.0, 2.0, 2.0, 3.0]}, settings=settings)
    assert [each.prompt_tokens for each in a.points] == [8]
    assert len(measured(workers)) == 4
    assert a.notes == (
        "16 prompt tokens, 1 stream: the 10 s of a row were over after 0 of its repeats.",
    )


def test_one_that_is_killed_for_its_time_says_so(run):
    late = WorkerEndedError("gave no answer within 9 s")
    settings = replace(SETTINGS, row_timeout_s=10.0)
    (a,), *_ = run({"a": [1.0, (9.0, late)]}, settings=settings)
    assert a.points == ()
    (note,) = a.notes
    assert note.endswith("the 10 s of a row were over. Its process gave no answer within 9 s.")


def test_processes_end_when_it_is_interrupted(run, monkeypatch):
    closed = []
    monkeypatch.setattr(FakeWorker, "close", lambda self, **_: closed.append(self.backend))
    with pytest.raises(KeyboardInterrupt):
        run({"a": [1.0, 1.0, 1.0], "b": [1.0, 1.0, KeyboardInterrupt()]})
    assert sorted(closed) == ["a", "b"]
