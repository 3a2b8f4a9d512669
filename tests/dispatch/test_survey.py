"""The record of this machine: asked once, remembered, and asked again when something changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import phirt
from phirt.devices.child import ChildEnd
from phirt.devices.device import Device
from phirt.devices.hardware import read_system
from phirt.devices.machine import Memory, Trial
from phirt.devices.merge import devices_of
from phirt.devices.record_json import machine_from_json, to_json
from phirt.dispatch import quarantine, survey
from phirt.dispatch.machine_dir import machine_dir, write_record
from phirt.dispatch.survey import Survey
from phirt.dispatch.survey_cache import SurveyCache, with_trial
from tests.devices.machines import listed, offer, ran

ANSWER = listed("fake", offer("cpu"), version="fake 1")
TRIAL = Trial(device="cpu", outcome="ran", reason="It ran.", kl=0.001)


@pytest.fixture
def asked(monkeypatch, own_machine_dir):
    """Answers in place of children, for a backend "fake"; what children were started for."""
    calls: list[list[str]] = []

    def run_child(module: str, arguments: list[str], **settings: Any) -> ChildEnd:
        calls.append(arguments[:-1])
        answer: Any = ANSWER if arguments[0] == "list" else TRIAL
        return ChildEnd(ending="answered", answer=json.dumps(to_json(answer)), seconds=0.5)

    monkeypatch.setattr(survey, "run_child", run_child)
    monkeypatch.setattr(survey, "backend_names", lambda: ["fake"])
    return calls


class TestTrials:
    def test_none_are_made_where_none_are_asked_for(self, asked):
        (record,) = Survey().machine().backends
        assert (record.listing, record.trials) == (ANSWER.listing, ())
        assert asked == [["list", "fake"]]

    def test_all_are_made_once_and_are_there_from_then_on(self, asked):
        (first,) = Survey().machine(trials="all").backends
        assert [trial.outcome for trial in first.trials] == ["ran"]
        assert Survey().machine(trials="cached").backends == (first,)
        assert Survey().machine(trials="all").backends == (first,)
        (bare,) = Survey().machine(trials="none").backends
        assert bare.trials == ()
        assert asked == [["list", "fake"], ["try", "fake", "cpu"]]

    def test_one_is_made_when_it_is_asked_for(self, asked):
        Survey().machine()
        assert Survey().trial("fake", "cpu").outcome == "ran"
        assert Survey().trial("fake", "cpu").outcome == "ran"
        assert asked == [["list", "fake"], ["try", "fake", "cpu"]]
        (record,) = Survey().machine().backends
        assert record.trial("cpu") is not None


class TestMemory:
    @pytest.fixture
    def known(self, asked):
        Survey().machine(trials="all")
        asked.clear()
        return asked

    def test_nothing_is_asked_twice(self, known):
        Survey().machine(trials="all")
        assert known == []

    @pytest.mark.parametrize(
        "change",
        [
            lambda patch, tmp_path: patch.setenv("CUDA_VISIBLE_DEVICES", "1"),
            lambda patch, tmp_path: patch.setattr(survey, "__version__", "99"),
            lambda patch, tmp_path: install(patch, tmp_path, "onnxruntime_gpu-2.0.dist-info"),
        ],
        ids=["environment", "phirt", "packages"],
    )
    def test_a_change_asks_again(self, known, monkeypatch, tmp_path, change):
        change(monkeypatch, tmp_path)
        Survey().machine()
        assert known == [["list", "fake"]]

    def test_a_driver_that_changes_asks_again(self, known, monkeypatch):
        changed = replace(read_system(), drivers={"nvidia": "999"})
        monkeypatch.setattr(survey, "read_system", lambda: changed)
        assert Survey().machine().drivers["nvidia"] == "999"
        assert known == [["list", "fake"]]

    def test_coming_back_to_what_was_asks_nothing(self, known, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setenv("CUDA_VISIBLE_DEVICES", "1")
            Survey().machine()
        known.clear()
        Survey().machine(trials="all")
        assert known == []

    def test_free_memory_is_never_remembered(self, known, monkeypatch):
        memory = Memory(total=8, available=7)
        monkeypatch.setattr(survey, "read_memory", lambda: memory)
        assert Survey().machine().memory is memory

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": 1, "backends": [{}]}'])
    def test_a_damaged_file_is_none(self, known, own_machine_dir, content):
        (file,) = own_machine_dir.glob("survey-*.json")
        file.write_text(content, encoding="utf-8")
        assert Survey().machine().backends[0].listing == ANSWER.listing
        assert known == [["list", "fake"]]

    def test_a_folder_that_cannot_be_written_costs_time_and_nothing_else(
        self, asked, monkeypatch, tmp_path
    ):
        (tmp_path / "a file").touch()
        monkeypatch.setenv("PHIRT_MACHINE_DIR", str(tmp_path / "a file" / "machine"))
        (record,) = Survey().machine(trials="all").backends
        assert record.trials[0].outcome == "ran"

    def test_refresh_forgets_lists_trials_verdicts_and_quarantine(self, known):
        verdict = machine_dir() / "canaries" / "some.json"
        write_record(verdict, {"status": "failed"})
        quarantine.add(backend="fake", device="cpu", version="fake 1", driver=None, reason="KL 3.")
        assert Survey().machine().quarantine
        Survey().refresh()
        assert not verdict.exists()
        assert Survey().machine(trials="all").quarantine == ()
        assert known == [["list", "fake"], ["try", "fake", "cpu"]]

    def test_few_states_are_kept(self, tmp_path):
        for number in range(40):
            SurveyCache(tmp_path, f"{number:04}").save(ANSWER)
        assert 1 < len(list(tmp_path.glob("survey-*.json"))) < 20
        assert SurveyCache(tmp_path, "0039").read() == {"fake": ANSWER}

    def test_two_processes_that_try_lose_nothing_of_each_other(self, tmp_path):
        one, other = SurveyCache(tmp_path, "state"), SurveyCache(tmp_path, "state")
        one.save(ANSWER)
        other.save(listed("another", offer("cpu")))
        one.add_trial("fake", ran("cpu"))
        other.add_trial("another", ran("cpu"))
        assert [len(record.trials) for record in one.read().values()] == [1, 1]


def test_a_trial_takes_the_place_of_an_older_one():
    record = with_trial(with_trial(ANSWER, ran("cpu")), TRIAL)
    assert record.trials == (TRIAL,)


def test_an_interruption_ends_what_is_being_asked_and_is_not_remembered(
    asked, monkeypatch, own_machine_dir
):
    monkeypatch.setattr(survey, "backend_names", lambda: ["first", "hangs"])
    hangs = threading.Event()

    def run_child(module: str, arguments: list[str], **settings: Any) -> ChildEnd:
        if arguments[1] == "first":
            assert hangs.wait(30)
            raise KeyboardInterrupt  # as if it were the main thread's
        hangs.set()
        assert settings["stop"].wait(30)
        return ChildEnd(ending="not run", reason="it was interrupted", lasts=False)

    with monkeypatch.context() as patch:
        patch.setattr(survey, "run_child", run_child)
        interrupted = Survey()
        with pytest.raises(KeyboardInterrupt):
            interrupted.machine()
    assert not list(own_machine_dir.glob("survey-*.json"))
    assert [record.outcome for record in interrupted.machine().backends] == ["listed"] * 2


class TestWithoutProcesses:
    @pytest.fixture(autouse=True)
    def _frozen(self, monkeypatch, own_machine_dir):
        monkeypatch.setattr(sys, "frozen", True, raising=False)
        monkeypatch.setattr(survey, "backend_names", lambda: ["reference"])

    def test_backends_are_asked_in_this_one(self, own_machine_dir):
        (record,) = Survey().machine(trials="all").backends
        assert record.outcome == "listed"
        assert record.listing[0].device == "cpu"
        assert record.reason == (
            "Asked in this process: this application brings no Python that could be started."
        )
        assert not list(own_machine_dir.glob("survey-*.json"))

    def test_nothing_is_tried(self):
        trial = Survey().trial("openvino", "cpu")
        assert (trial.outcome, trial.reason) == (
            "not run",
            "Not tried: this application brings no Python that could be started.",
        )


@pytest.mark.parametrize(
    "name", ["onnxruntime", "openvino", "onnxruntime-genai", "mlx", "transformers"]
)
def test_what_is_not_installed_is_found_without_a_process(monkeypatch, own_machine_dir, name):
    import importlib.util

    modules, extra = survey._RUNTIMES[name]
    find_spec = importlib.util.find_spec

    def find(module: str, package: str | None = None) -> Any:
        return None if module == modules[0] else find_spec(module, package)

    def import_runtime(module: str, *, backend: str, extra: str) -> None:
        raise phirt.BackendNotInstalledError(f"{backend} needs {module}.")

    monkeypatch.setattr(importlib.util, "find_spec", find)
    monkeypatch.setattr(survey, "import_runtime", import_runtime)
    monkeypatch.setattr(survey, "run_child", None)
    monkeypatch.setattr(survey, "backend_names", lambda: [name])
    machine = Survey().machine(trials="all")
    (cpu, *_) = devices_of(machine)
    (row,) = cpu.backends
    assert (row.backend, row.status) == (name, "missing")
    assert row.fix == f'python -m pip install "phirt[{extra}]"'


@pytest.mark.slow
def test_this_machine():
    """What is asked in earnest, once in a run of the tests."""
    machine = Survey().machine(trials="all")
    assert machine_from_json(json.loads(json.dumps(to_json(machine)))) == machine
    devices = phirt.devices()
    assert devices == devices_of(machine)
    assert all(isinstance(device, Device) for device in devices)
    cpu = devices[0]
    assert (cpu.device, cpu.kind) == ("cpu", "cpu")
    assert [row.status for row in cpu.backends if row.backend == "reference"] == ["ready"]
    # Whatever is installed here can run a tiny model on the CPU.
    failed = [row for row in cpu.backends if row.status == "broken"]
    assert failed == []


@pytest.mark.slow
def test_what_is_known_is_told_without_importing_a_runtime():
    phirt.devices()
    program = """
import sys, phirt
assert len(phirt.devices()) >= 1
from phirt.devices.device import Device
runtimes = {"mlx", "onnxruntime", "onnxruntime_genai", "openvino", "tokenizers", "torch"}
print(sorted(runtimes & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def install(patch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    (tmp_path / "site" / name).mkdir(parents=True)
    patch.syspath_prepend(str(tmp_path / "site"))
