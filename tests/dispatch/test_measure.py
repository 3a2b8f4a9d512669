"""Timing a candidate: what is tried, and what a process that fails costs."""

from pathlib import Path

import psutil
import pytest

from phirt.dispatch import measure as measuring
from phirt.dispatch.measure import Effort, Task, measure, measure_apart
from phirt.dispatch.measurements import Setting
from phirt.dispatch.trial_model import trial_folder
from phirt.errors import BackendRuntimeError
from phirt.models.folder import read_folder
from tests.fakes import FakeModel
from tests.installed import require

EFFORT = Effort(lengths=(4, 8), decode_tokens=2, rounds=1, settings=8, budget_s=60.0)


def task(backend="reference", *, layout="safetensors", effort=EFFORT, path=None):
    artifact = read_folder(trial_folder((layout,)), formats=(layout,)).artifact
    return Task(
        name="trial",
        path=str(path or artifact.path),
        format=layout,
        architecture=artifact.architecture,
        precision=artifact.precision,
        weights_id=artifact.weights_id,
        backend=backend,
        device="cpu",
        version="1",
        hardware="0123",
        cores=2,
        threads=4,
        effort=effort,
    )


def test_prefill_and_decode_are_timed_at_every_length_and_for_several_rows():
    (found,) = measure(task())
    assert [point.tokens for point in found.points] == [4, 8]
    assert found.batch is not None
    assert found.batch.rows == 4
    assert found.artifact.endswith(":safetensors:fp32")
    assert (found.backend, found.device, found.version, found.hardware) == (
        "reference",
        "cpu",
        "1",
        "0123",
    )


def test_it_is_done_in_a_process_of_its_own():
    require("onnxruntime")
    found = measure_apart(task("onnxruntime", layout="onnx-genai"))
    # The runtime's own settings; cores, logical processors, half the cores; spinning or not; and
    # threads that are bound to processors, where the system has such.
    assert [each.setting.threads for each in found[:4]] == [None, 2, 4, 1]
    spinning = [each.setting.spinning for each in found]
    assert spinning[:6] == [None] * 4 + [True, False]
    pins = [True] if hasattr(psutil.Process, "cpu_affinity") else []
    assert [each.setting.pinning for each in found] == [None] * 6 + pins


def test_the_number_of_settings_is_bounded():
    require("onnxruntime")
    found = list(measure(task("onnxruntime", layout="onnx-genai", effort=Effort.quick())))
    assert [each.setting for each in found] == [Setting()]


def test_no_setting_is_begun_after_the_time_is_up():
    require("onnxruntime")
    late = Effort(lengths=(4,), decode_tokens=2, rounds=1, settings=8, budget_s=0.0)
    assert len(list(measure(task("onnxruntime", layout="onnx-genai", effort=late)))) == 1


def test_a_slow_candidate_is_timed_once_and_no_further(monkeypatch):
    monkeypatch.setattr(measuring, "_SLOW_S", 0.0)
    calls = []
    timed = measuring._time

    def count(model, length, new_tokens):
        calls.append(length)
        return timed(model, length, new_tokens)

    monkeypatch.setattr(measuring, "_time", count)
    effort = Effort(lengths=(4, 8), decode_tokens=2, rounds=5, settings=1, budget_s=60.0)
    (found,) = measure(task(effort=effort))
    assert [point.tokens for point in found.points] == [4]
    assert calls == [4, 4]  # the first warms up


def test_a_context_shorter_than_every_length_is_measured_as_far_as_it_goes():
    model = FakeModel(context_length=8)
    (point,) = measuring._points(model, Effort.quick())
    assert 1 <= point.tokens < 8


def test_a_model_that_cannot_be_loaded_is_an_error_that_says_why(tmp_path: Path):
    with pytest.raises(BackendRuntimeError, match=r"no-such"):
        measure_apart(task(path=tmp_path / "no-such"))


def test_a_process_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(measuring, "_TIMEOUT_S", 0.01)
    with pytest.raises(BackendRuntimeError, match=r"gave no answer within 0.01 s"):
        measure_apart(task())


def test_a_crash_costs_only_what_was_not_timed_yet(tmp_path, monkeypatch):
    require("onnxruntime")
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "def dies(event, arguments):\n"
        "    if event == 'os.rename' and os.path.exists(str(arguments[1])):\n"
        "        os._exit(1)  # once a second setting is to be written\n"
        "sys.addaudithook(dies)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = measure_apart(task("onnxruntime", layout="onnx-genai"))
    assert [each.setting for each in found] == [Setting()]


def test_where_no_process_can_be_started_this_one_does_it(monkeypatch):
    monkeypatch.setenv("PHIRT_PROBE_CHILD", "1")
    assert len(measure_apart(task())) == 1
