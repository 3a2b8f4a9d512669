"""`phirt.tune` and `phirt.load(tune=True)`: what is timed, what is kept, what follows."""

from dataclasses import replace

import pytest

import phirt
from phirt import tuning
from phirt.devices.machine import Trial
from phirt.dispatch.measurements import Measurement, Point, Setting, artifact_id
from phirt.dispatch.survey import Survey
from phirt.errors import BackendRuntimeError, UnsupportedModelError
from tests.installed import require

# Seconds a token of each backend, as if they had been measured.
SPEEDS = {"onnxruntime": 0.02, "openvino": 0.01}


def chosen(plan):
    assert plan.chosen is not None
    return plan.chosen


@pytest.fixture
def timed(monkeypatch, own_machine_dir):
    """Takes the place of the timing itself; holds what it was asked for."""
    tasks = []

    def measure_apart(task):
        tasks.append(task)
        seconds = SPEEDS.get(task.backend)
        if seconds is None:
            raise BackendRuntimeError(f"{task.backend} cannot be timed: it was told not to")
        base = Measurement(
            artifact=artifact_id(task.weights_id, task.format, task.precision),
            backend=task.backend,
            device=task.device,
            version=task.version,
            hardware=task.hardware,
            setting=Setting(),
            points=(Point(tokens=32, prefill_s=seconds, decode_s=seconds),),
            when="2026-11-22T03:00:00Z",
        )
        faster = Point(tokens=32, prefill_s=seconds / 2, decode_s=seconds / 2)
        return [base, replace(base, setting=Setting(threads=1), points=(faster,))]

    monkeypatch.setattr(tuning, "measure_apart", measure_apart)
    return tasks


def test_what_was_measured_decides_from_then_on(timed, tiny_gguf):
    require("onnxruntime")
    require("openvino")
    assert chosen(phirt.plan(tiny_gguf)).backend == "onnxruntime"
    tuned = phirt.tune(tiny_gguf)
    assert chosen(tuned.plan).backend == "openvino"
    assert "the fastest that was measured" in chosen(tuned.plan).reason
    with phirt.load(tiny_gguf) as model:
        assert model.backend == "openvino"
        speed = chosen(model.plan).speed
        assert speed is not None
        assert speed.setting == Setting(threads=1)


def test_it_counts_for_a_backend_that_is_named_too(timed, tiny_gguf):
    require("onnxruntime")
    phirt.tune(tiny_gguf)
    with phirt.load(tiny_gguf, backend="onnxruntime") as model:
        speed = chosen(model.plan).speed
    assert speed is not None
    assert speed.setting == Setting(threads=1)


def test_precisions_that_hold_the_same_weights_are_measured_each(timed, tiny_gguf):
    require("onnxruntime")
    phirt.tune(tiny_gguf, backend="onnxruntime", device="cpu", precision="fp32")
    other = phirt.plan(tiny_gguf, backend="onnxruntime", device="cpu", precision="exact")
    assert chosen(other).speed is None
    phirt.load(tiny_gguf, backend="onnxruntime", device="cpu", precision="exact").close()
    other = phirt.plan(tiny_gguf, backend="onnxruntime", device="cpu", precision="exact")
    assert (chosen(other).artifact.state, chosen(other).speed) == ("here", None)


def test_what_cannot_be_timed_is_told_and_stays_usable(timed, tiny_gguf):
    require("onnxruntime")
    tuned = phirt.tune(tiny_gguf)
    reasons = {failure.backend: failure.reason for failure in tuned.failures}
    assert reasons
    assert all(reason.endswith("it was told not to") for reason in reasons.values())
    status = {row.backend: row.status for row in tuned.plan.candidates if row.device == "cpu"}
    assert all(status[backend] == "usable" for backend in reasons)


def test_a_device_that_fails_its_trial_is_told_once_and_not_timed(timed, tiny_gguf, monkeypatch):
    require("onnxruntime")
    for precision in ("fp32", "exact"):
        phirt.load(tiny_gguf, backend="onnxruntime", precision=precision).close()
    tried = []

    def trial(self, backend, device):
        tried.append((backend, device))
        return Trial(device=device, outcome="crashed", reason=f"{backend} crashed")

    monkeypatch.setattr(Survey, "trial", trial)
    tuned = phirt.tune(tiny_gguf, device="cpu")
    assert timed == []
    assert len(tried) == len(set(tried))
    places = [(failure.backend, failure.device) for failure in tuned.failures]
    assert places == tried
    assert {failure.reason for failure in tuned.failures} >= {"onnxruntime crashed"}


def test_a_named_backend_is_timed_alone(timed, tiny_gguf):
    require("openvino")
    phirt.tune(tiny_gguf, backend="openvino", device="cpu", quick=True)
    (task,) = timed
    assert (task.backend, task.device) == ("openvino", "cpu")
    assert task.effort.settings == 1


def test_load_times_what_is_unknown_and_only_once(timed, tiny_gguf):
    require("openvino")
    for _ in range(2):
        with phirt.load(tiny_gguf, backend="openvino", tune=True) as model:
            assert chosen(model.plan).speed is not None
    assert len({(task.backend, task.device) for task in timed}) == len(timed)


def test_measurements_are_of_the_versions_that_the_plan_looks_for(own_machine_dir, tiny_gguf):
    require("onnxruntime")
    tuned = phirt.tune(tiny_gguf, backend="onnxruntime", device="cpu", quick=True)
    speed = chosen(tuned.plan).speed
    assert speed is not None
    (measured,) = tuned.measurements
    longest = measured.points[-1]
    assert speed.prefill_tokens_per_s == pytest.approx(longest.tokens / longest.prefill_s)


def test_nothing_to_time_is_an_error_that_says_why(timed, tmp_path):
    require("onnxruntime")
    folder = tmp_path / "strange"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "strange"}')
    with pytest.raises(phirt.ModelError):
        phirt.tune(folder)
    assert timed == []


def test_a_candidate_that_runs_nowhere_names_each_reason(timed, tiny_gguf):
    with pytest.raises(UnsupportedModelError, match=r"Nothing here can run the model\. .*: "):
        phirt.tune(tiny_gguf, device="cuda:7")
