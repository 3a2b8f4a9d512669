"""Which rows there are, what is refused, and one real benchmark of a tiny model."""

from __future__ import annotations

from dataclasses import replace

import pytest

import phirt
from phirt.benchmark import run as benchmark
from phirt.benchmark.child import Load
from phirt.benchmark.report import BenchFailure
from phirt.benchmark.turns import RowTask
from phirt.devices.machine import Machine, Memory, Trial
from phirt.dispatch.plan import MemoryNeed, PlannedArtifact
from phirt.dispatch.survey import Survey
from phirt.errors import UnsupportedModelError
from phirt.tuning import folder_for
from tests.benchmark.samples import SETTINGS, row
from tests.installed import require


@pytest.fixture
def turns(monkeypatch):
    """In place of the measurement: the groups that would have been measured."""
    seen = []

    def take_turns(groups, settings, *, environment, on_step):
        seen.extend(groups)
        return [row(task.load.backend) for group in groups for task in group]

    monkeypatch.setattr(benchmark, "take_turns", take_turns)
    return seen


@pytest.fixture(autouse=True)
def trials(monkeypatch):
    """Every device passes its trial at once."""

    def trial(self, backend, device):
        return Trial(device=device, outcome="ran", reason="ran")

    monkeypatch.setattr(Survey, "trial", trial)


def test_a_row_for_each_backend_and_device_with_the_form_that_a_load_takes(turns, tiny_gguf):
    require("onnxruntime")
    require("openvino")
    phirt.load(tiny_gguf, backend="onnxruntime", precision="fp32").close()
    report = phirt.bench(tiny_gguf)
    places = [(task.load.backend, task.load.device) for group in turns for task in group]
    assert len(places) == len(set(places))
    assert {("onnxruntime", "cpu"), ("openvino", "cpu")} <= set(places)
    loads = {task.load.backend: task.load for group in turns for task in group}
    with phirt.load(tiny_gguf, backend="onnxruntime") as model:
        assert loads["onnxruntime"].path == str(model.path)
    not_measured = {(each.backend, each.device): each.reason for each in report.failures}
    assert not_measured["reference", "cpu"] == "it is used by name only"
    assert not set(not_measured) & set(places)
    assert report.versions["phirt"] == phirt.__version__
    assert "onnxruntime" in report.versions


def test_a_backend_that_is_named_is_the_only_row(turns, tiny_gguf):
    require("openvino")
    report = phirt.bench(tiny_gguf, backend="openvino", device="cpu", precision="fp32")
    ((task,),) = turns
    assert {each.backend for each in report.failures} <= {"openvino"}
    assert (task.load.backend, task.load.device, task.precision) == ("openvino", "cpu", "fp32")


def test_what_fails_its_trial_is_no_row(turns, tiny_gguf, monkeypatch):
    require("onnxruntime")
    require("openvino")

    def trial(self, backend, device):
        crashed = backend == "openvino"
        return Trial(device=device, outcome="crashed" if crashed else "ran", reason="It crashed.")

    monkeypatch.setattr(Survey, "trial", trial)
    report = phirt.bench(tiny_gguf, device="cpu")
    assert BenchFailure(backend="openvino", device="cpu", reason="It crashed.") in report.failures
    assert "openvino" not in {task.load.backend for group in turns for task in group}


def test_a_form_that_cannot_be_made_is_no_row(turns, tiny_gguf, monkeypatch):
    require("onnxruntime")
    require("openvino")

    def fails(prepared, candidate, *, announce):
        if candidate.backend == "openvino":
            raise UnsupportedModelError("It cannot be converted.")
        return folder_for(prepared, candidate, announce=announce)

    monkeypatch.setattr(benchmark, "folder_for", fails)
    report = phirt.bench(tiny_gguf, device="cpu")
    reasons = {each.backend: each.reason for each in report.failures}
    assert reasons["openvino"] == "It cannot be converted."


def test_a_model_that_would_have_to_be_downloaded_is_an_error_that_says_how(turns):
    require("onnxruntime")
    with pytest.raises(UnsupportedModelError, match=r"downloads nothing\..*phirt pull smollm2"):
        phirt.bench("smollm2-135m-instruct", backend="onnxruntime", device="cpu")
    assert turns == []


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"backend": "onnx"}, phirt.UnknownBackendError, "onnx"),
        ({"device": "c p u"}, ValueError, "c p u"),
        ({"prompt_tokens": ()}, ValueError, "prompt_tokens must have at least one"),
        ({"prompt_tokens": (0,)}, ValueError, "prompt_tokens=0 must be from 1"),
        ({"prompt_tokens": 128}, TypeError, "prompt_tokens must be a list"),
        ({"concurrency": (True,)}, TypeError, "concurrency must be a whole number"),
        ({"concurrency": (1000,)}, ValueError, "concurrency=1000 must be from 1 to 256"),
        ({"new_tokens": 1}, ValueError, "new_tokens=1 must be from 2"),
        ({"repeats": 0}, ValueError, "repeats=0 must be from 1"),
        ({"row_timeout_s": 0}, ValueError, "row_timeout_s=0"),
        ({"row_timeout_s": "1"}, TypeError, "row_timeout_s must be a number"),
        ({"prompt_tokens": (64, 4000)}, ValueError, "4000 tokens and an answer of 64 are 4064"),
        ({"device": "cuda:7"}, phirt.DeviceNotAvailableError, "cuda:7"),
    ],
)
def test_what_cannot_be_meant_is_refused(turns, tiny_gguf, given, error, message):
    require("onnxruntime")
    with pytest.raises(error, match=message):
        phirt.bench(tiny_gguf, **given)
    assert turns == []


def test_a_named_backend_that_is_not_installed_is_an_error(turns, tiny_gguf, monkeypatch):
    from phirt.errors import BackendNotInstalledError

    def is_missing(*_, **__):
        raise BackendNotInstalledError("Backend 'openvino' is not installed.")

    monkeypatch.setattr(benchmark, "check_offered", is_missing)
    with pytest.raises(BackendNotInstalledError):
        phirt.bench(tiny_gguf, backend="openvino")


def need(total, *, free=1000, host=0):
    return MemoryNeed(weights=total - 10, kv=10, workspace=0, context=64, free=free, host=host)


def task(backend):
    load = Load(path="somewhere", backend=backend, device="cpu", context=64)
    return RowTask(load=load, version=None, precision="int8")


@pytest.fixture
def machine():
    from tests.benchmark.samples import report

    cpu = report().machine.cpu
    memory = Memory(total=2000, available=1000)
    return Machine(phirt="0", python="3", system="linux", cpu=cpu, memory=memory)


@pytest.mark.parametrize(
    ("needs", "concurrency", "groups"),
    [
        ([need(300), need(400)], 1, 1),
        ([need(300), need(400)], 8, 2),  # 7 more caches of 10 each: 840 of 800
        ([need(450), need(400)], 1, 2),
        ([need(300), need(100, free=400, host=200)], 1, 2),
        ([need(300), None], 1, 2),
        ([None], 1, 1),
    ],
)
def test_rows_take_turns_where_all_fit_into_memory(machine, needs, concurrency, groups):
    settings = replace(SETTINGS, concurrency=(concurrency,))
    tasks = [task(str(number)) for number in range(len(needs))]
    found = benchmark._group(tasks, needs, settings, machine)
    assert len(found.groups) == groups
    assert [each for group in found.groups for each in group] == tasks
    assert bool(found.notes) == (groups > 1)


def test_forms_that_are_here_go_before_those_to_fetch():
    from phirt.dispatch.plan import Plan, PlanCandidate

    def candidate(status, state):
        artifact = PlannedArtifact(format="onnx-genai", precision=state, state=state)
        return PlanCandidate(
            artifact=artifact, backend="onnxruntime", device="cpu", status=status, reason="so"
        )

    rejected, remote, here = (
        candidate("rejected", "here"),
        candidate("chosen", "to fetch"),
        candidate("usable", "here"),
    )
    plan = Plan(
        model="m",
        device="auto",
        backend="auto",
        precision="auto",
        context=64,
        optimize="latency",
        candidates=(remote, here, rejected),
    )
    assert benchmark._best_of_each(plan) == [here]


def test_a_real_one_end_to_end(tiny_gguf):
    require("onnxruntime")
    steps: list[str] = []
    report = phirt.bench(
        tiny_gguf,
        backend="onnxruntime",
        device="cpu",
        prompt_tokens=(24, 8),
        new_tokens=4,
        concurrency=(1, 2),
        repeats=2,
        offline=True,
        on_step=steps.append,
    )
    (found,) = report.rows
    assert found.notes == ()
    assert [(each.prompt_tokens, each.concurrency) for each in found.points] == [
        (8, 1),
        (24, 1),
        (8, 2),
        (24, 2),
    ]
    assert all(len(each.samples) == 2 for each in found.points)
    assert all(each.decode_tokens_per_s.low > 0 for each in found.points)
    assert found.load_s > 0
    # A process that loads a runtime takes tens of megabytes.
    assert found.peak_memory_bytes >= found.loaded_memory_bytes > found.imported_memory_bytes
    assert found.imported_memory_bytes > 10_000_000
    assert report.takes_turns
    assert steps[-1] == "24 prompt tokens, 2 streams, repeat 2 of 2"
