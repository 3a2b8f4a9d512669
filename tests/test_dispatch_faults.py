"""What is broken ends in the stated outcome on every public face, and never in a silent CPU run."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

import phirt
from phirt.cli import main
from phirt.devices.device import DeviceBackend
from phirt.devices.hardware import read_system
from phirt.dispatch import survey
from phirt.dispatch.plan import Plan, PlanCandidate, Stage
from phirt.dispatch.survey import Survey
from phirt.errors import (
    BackendBrokenError,
    BackendRuntimeError,
    DeviceNotAvailableError,
    DevicePlacementError,
    PhirtError,
)
from tests.dispatch import faulty_gpu
from tests.installed import require

require("onnxruntime")

CPU = "onnxruntime"
LIMIT_S = 10  # of a child; what hangs is given up then
BOUND_S = 60  # of all that a test asks, several times what it takes

PLUGIN = "import os\n\nexec(os.environ['FAULTY_SOURCE'])\n"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distribution with one backend, which is what FAULTY_SOURCE says."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "faulty_plugin.py").write_text(PLUGIN, encoding="utf-8")
    metadata = folder / "faulty-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Name: faulty\nVersion: 1.0\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text(
        "[phirt.backends]\nfaulty = faulty_plugin:Backend\n", encoding="utf-8"
    )
    return folder


@pytest.fixture(scope="module")
def folder(tiny_model: phirt.Model) -> Path:
    """A model that is there as onnxruntime reads it, in fp32."""
    return tiny_model.path


@pytest.fixture(scope="module")
def known_cpu(site: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is known of the machine once onnxruntime was asked and tried."""
    known = tmp_path_factory.mktemp("known")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        patch.setenv("PHIRT_MACHINE_DIR", str(known))
        patch.setattr(survey, "backend_names", lambda: [CPU])
        Survey().machine(trials="all")
    return known


@pytest.fixture
def install(
    monkeypatch: pytest.MonkeyPatch, site: Path, known_cpu: Path, own_machine_dir: Path
) -> Callable[[str], None]:
    """Gives the machine a backend beside onnxruntime: a class of faulty_gpu, or a source."""
    shutil.copytree(known_cpu, own_machine_dir)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(survey, "backend_names", lambda: [CPU, "faulty"])
    monkeypatch.setattr(
        survey,
        "Survey",
        functools.partial(Survey, listing_timeout_s=LIMIT_S, trial_timeout_s=LIMIT_S),
    )

    def install(fault: str) -> None:
        source = fault
        if fault.isidentifier():
            source = f"from tests.dispatch.faulty_gpu import {fault} as Backend"
        monkeypatch.setenv("FAULTY_SOURCE", source)
        monkeypatch.delitem(sys.modules, "faulty_plugin", raising=False)
        faulty_gpu.loads.clear()

    return install


@pytest.fixture
def bounded() -> Iterator[None]:
    """Nothing hangs."""
    started = time.monotonic()
    yield
    assert time.monotonic() - started < BOUND_S


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault, and what is to come of it.

    Attributes:
        name: A class of tests/dispatch/faulty_gpu.py, or the source of the plugin.
        stage: Where "auto" passes it over.
        reason: Part of what is said of it everywhere.
        named: What naming its backend raises.
        status: What `phirt.devices` says of it.
    """

    name: str
    stage: Stage
    reason: str
    named: type[PhirtError]
    on_device: type[PhirtError] = DeviceNotAvailableError
    status: str = "broken"


def row_of(plan: Plan) -> PlanCandidate:
    """The one row of the faulty backend."""
    (row,) = [row for row in plan.candidates if row.backend == "faulty"]
    return row


def read_json(capsys: Any, *arguments: str, status: int = 0) -> Any:
    assert main([*arguments, "--json"]) == status
    return json.loads(capsys.readouterr().out)


SIGILL = (
    "crashed with SIGILL: an instruction that this processor does not have"
    if os.name == "posix"
    else "ended with exit status 3 and without an answer"
)
IMPORTS = [
    Fault(
        name="raise RuntimeError('libcard.so.1: cannot open shared object file')",
        stage="runtime",
        reason="RuntimeError: libcard.so.1: cannot open shared object file",
        named=BackendBrokenError,
    ),
    Fault(
        name="import signal; signal.raise_signal(signal.SIGILL)",
        stage="runtime",
        reason=SIGILL,
        named=BackendBrokenError,
    ),
    Fault(
        name="import os; os.abort()",
        stage="runtime",
        reason="crashed with SIGABRT" if os.name == "posix" else "its process ",
        named=BackendBrokenError,
    ),
    Fault(
        name="import sys; sys.exit(3)",
        stage="runtime",
        reason="ended with exit status 3",
        named=BackendBrokenError,
    ),
    Fault(
        name="import time; time.sleep(10_000)",
        stage="runtime",
        reason=f"gave no answer within {LIMIT_S} s",
        named=BackendBrokenError,
    ),
    Fault(
        name="ProbeRaises",
        stage="runtime",
        reason="RuntimeError: the driver is too old",
        named=BackendBrokenError,
    ),
    Fault(name="ProbeIsIllegal", stage="runtime", reason=SIGILL, named=BackendBrokenError),
    Fault(
        name="ProbeHangs",
        stage="runtime",
        reason=f"gave no answer within {LIMIT_S} s",
        named=BackendBrokenError,
    ),
]
ELSEWHERE = "2 of 2 nodes (100.0%) elsewhere"
SILENT = "the model was placed on the CPU (CPUExecutionProvider)"
SESSIONS = [
    Fault(
        name="SessionRaises",
        stage="device",
        reason="libcard.so.1: cannot open shared object file",
        named=DeviceNotAvailableError,
    ),
    Fault(
        name="SessionRaisesLater",
        stage="load",
        reason="RuntimeError: the card fell off the bus",
        named=BackendRuntimeError,
        on_device=BackendRuntimeError,
        status="ready",
    ),
    Fault(
        name="SessionIsIllegal",
        stage="device",
        reason=SIGILL,
        named=BackendRuntimeError,
        on_device=BackendRuntimeError,
    ),
    Fault(
        name="SessionHangs",
        stage="device",
        reason=f"gave no answer within {LIMIT_S} s",
        named=BackendRuntimeError,
        on_device=BackendRuntimeError,
    ),
    Fault(
        name="SessionExits",
        stage="device",
        reason="ended with exit status 3",
        named=BackendRuntimeError,
        on_device=BackendRuntimeError,
    ),
    Fault(
        name="ProvenOnCpu",
        stage="device",
        reason=ELSEWHERE,
        named=DevicePlacementError,
        on_device=DevicePlacementError,
    ),
    Fault(
        name="ProvenOnCpuLater",
        stage="load",
        reason=ELSEWHERE,
        named=DevicePlacementError,
        on_device=DevicePlacementError,
        status="ready",
    ),
    Fault(
        name="SilentlyOnCpu",
        stage="device",
        reason=SILENT,
        named=DevicePlacementError,
        on_device=DevicePlacementError,
    ),
    Fault(
        name="SilentlyOnCpuLater",
        stage="load",
        reason=SILENT,
        named=DevicePlacementError,
        on_device=DevicePlacementError,
        status="ready",
    ),
]


def identify(fault: Fault) -> str:
    return fault.name


class TestFaults:
    """Every face of phirt, fault by fault."""

    @pytest.fixture(params=[*IMPORTS, *SESSIONS], ids=identify)
    def fault(self, request, install, bounded) -> Fault:
        install(request.param.name)
        fault: Fault = request.param
        return fault

    def test_it_ends_in_the_stated_outcome(self, fault, folder, capsys):
        device = "cpu" if fault.stage == "runtime" else "cuda"

        with phirt.load(folder) as model:
            assert (model.backend, model.device, model.placement.device) == (CPU, "cpu", "cpu")
            row = row_of(model.plan)
            assert len(model.generate("hello", max_new_tokens=3, ignore_eos=True).token_ids) == 3
        assert (row.status, row.stage, row.device) == ("rejected", fault.stage, device)
        assert fault.reason in row.reason

        with pytest.raises(fault.named) as named:
            phirt.load(folder, backend="faulty")
        assert "'faulty'" in str(named.value) or "'cuda'" in str(named.value)
        assert fault.reason in str(named.value)

        with pytest.raises(fault.on_device) as on_device:
            phirt.load(folder, device="cuda")
        assert "'cuda'" in str(on_device.value)
        assert fault.reason in str(on_device.value)

        shown = find_row()
        assert (shown.device, shown.status) == (device, fault.status)
        found = read_json(capsys, "devices")
        (printed,) = [
            each for one in found for each in one["backends"] if each["backend"] == "faulty"
        ]
        assert (printed["status"], printed["reason"]) == (shown.status, shown.reason)

        planned = read_json(capsys, "plan", str(folder))["candidates"]
        assert (planned[0]["backend"], planned[0]["status"]) == (
            (CPU, "chosen") if fault.status == "broken" else ("faulty", "chosen")
        )
        if fault.status == "broken":
            assert fault.reason in shown.reason
            # phirt's own errors say what to do themselves.
            assert shown.fix or re.search(r"(Pass|Use|Reinstall or update) \w+", shown.reason)
            (out,) = [each for each in planned if each["backend"] == "faulty"]
            assert (out["status"], out["stage"]) == ("rejected", fault.stage)
            assert fault.reason in out["reason"]
            told = read_json(capsys, "doctor", status=1)
            findings = [each for each in told["findings"] if "faulty" in each["found"]]
            assert [each["severity"] for each in findings] == ["broken"]
            assert fault.reason in findings[0]["found"]


def find_row(backend: str = "faulty") -> DeviceBackend:
    """The one row of a backend's among all devices."""
    rows = [each for found in phirt.devices() for each in found.backends]
    (row,) = [each for each in rows if each.backend == backend]
    return row


class TestACardThatWorks:
    """Else nothing above would prove that it was not merely never considered."""

    @pytest.fixture(autouse=True)
    def _card(self, install):
        install("Working")

    def test_it_goes_before_the_cpu(self, folder):
        with phirt.load(folder) as model:
            assert (model.backend, model.device) == ("faulty", "cuda")
            assert model.placement.device == "cuda"
            others = [row for row in model.plan.candidates if row.backend == CPU]
            assert (others[0].device, others[0].status) == ("cpu", "usable")
        assert faulty_gpu.loads == [folder.name]
        assert find_row().status == "ready"

    def test_it_is_used_where_it_is_named(self, folder):
        ways: list[dict[str, Any]] = [{"device": "cuda"}, {"backend": "faulty"}]
        for named in ways:
            with phirt.load(folder, **named) as model:
                assert (model.backend, model.device) == ("faulty", "cuda")


class TestMemory:
    def test_a_card_whose_memory_is_taken_is_passed_over_and_not_broken(self, install, folder):
        install("NoMemory")
        with phirt.load(folder) as model:
            assert (model.backend, model.device) == (CPU, "cpu")
            row = row_of(model.plan)
        assert (row.stage, row.device) == ("load", "cuda")
        assert row.reason == "Something else has the card's memory."
        with pytest.raises(phirt.OutOfMemoryError, match="Something else has"):
            phirt.load(folder, device="cuda")
        assert find_row().status == "unverified"


class TestWrongNumbers:
    @pytest.mark.parametrize("name", ["OffByAFactor", "NotFinite"])
    def test_a_card_that_fails_its_trial(self, install, folder, capsys, name):
        install(name)
        wrong = "A tiny model ran there and gave wrong numbers"
        with phirt.load(folder) as model:
            assert (model.backend, model.placement.device) == (CPU, "cpu")
            row = row_of(model.plan)
        assert (row.stage, row.device) == ("device", "cuda")
        assert wrong in row.reason
        assert faulty_gpu.loads == []
        with pytest.raises(BackendRuntimeError, match=wrong):
            phirt.load(folder, backend="faulty")
        row_shown = find_row()
        assert row_shown.status == "broken"
        assert wrong in row_shown.reason
        assert "Update the driver" in str(row_shown.fix)
        told = read_json(capsys, "doctor", status=1)
        assert any(wrong in each["found"] for each in told["findings"])

    def test_a_named_card_is_used_and_its_numbers_are_told(self, install, folder, caplog):
        install("OffByAFactor")
        with phirt.load(folder, device="cuda") as model:
            assert (model.backend, model.device, model.placement.device) == (
                "faulty",
                "cuda",
                "cuda",
            )
            notes = " ".join(model.plan.notes)
        assert "faulty on cuda was named, and is used" in notes
        assert "wrong numbers" in notes
        assert notes in " ".join(caplog.messages)

    def test_the_canary_finds_what_a_tiny_model_does_not(
        self, install, folder, capsys, monkeypatch
    ):
        install("OffByAFactorLater")
        wrong = "its mean KL divergence from its original weights is"
        with phirt.load(folder) as model:
            assert (model.backend, model.device, model.placement.device) == (CPU, "cpu", "cpu")
            row = row_of(model.plan)
        assert (row.stage, row.device) == ("answer", "cuda")
        assert wrong in row.reason
        assert faulty_gpu.loads == [folder.name]

        with phirt.load(folder) as model:  # quarantined: it is not loaded again
            assert model.backend == CPU
            row = row_of(model.plan)
        assert (row.stage, row.status) == ("device", "rejected")
        assert row.reason.startswith("quarantined since ")
        assert faulty_gpu.loads == [folder.name]

        shown = find_row()
        assert shown.status == "broken"
        assert re.match(r"Quarantined since \S+ with driver 570.1: its mean KL", shown.reason)
        assert "driver" in str(shown.fix)
        told = read_json(capsys, "doctor", status=1)
        (finding,) = [each for each in told["findings"] if "quarantine" in each["found"]]
        assert finding["command"] == "phirt devices --refresh"
        with pytest.raises(PhirtError, match=wrong):
            phirt.load(folder, backend="faulty")

        updated = replace(read_system(), drivers={"nvidia": "580.2"})
        monkeypatch.setattr(survey, "read_system", lambda: updated)
        monkeypatch.setenv("FAULTY_DRIVER", "580.2")  # with which it computes what it should
        with phirt.load(folder) as model:
            assert (model.backend, model.device) == ("faulty", "cuda")
        assert find_row().status == "ready"


class TestACardThatIsLost:
    PARAMS: ClassVar[dict[str, Any]] = {"max_new_tokens": 10, "ignore_eos": True}

    @pytest.fixture(autouse=True, params=["DiesInUse", "DiesInUseRaw"])
    def _card(self, request, install):
        install(request.param)

    def test_the_next_candidate_goes_on_where_that_was_asked_for(self, folder):
        with phirt.load(folder, backend=CPU) as sound:
            expected = sound.generate("hello", **self.PARAMS)
        with phirt.load(folder, failover=True) as model:
            assert (model.backend, model.device) == ("faulty", "cuda")
            found = model.generate("hello", **self.PARAMS)
            assert (model.backend, model.device, model.placement.device) == (CPU, "cpu", "cpu")
            row = row_of(model.plan)
        assert found.token_ids == expected.token_ids
        (failover,) = found.failovers
        assert (failover.backend, failover.device) == ("faulty", "cuda")
        assert (failover.next_backend, failover.next_device, failover.tokens) == (CPU, "cpu", 4)
        assert "the card was lost" in failover.reason
        assert (row.stage, row.device) == ("use", "cuda")
        assert "the card was lost" in row.reason

    @pytest.mark.parametrize("options", [{}, {"device": "cuda", "failover": True}])
    def test_else_it_is_an_error(self, folder, options):
        with phirt.load(folder, **options) as model:
            assert model.backend == "faulty"
            with pytest.raises(Exception, match="the card was lost"):
                model.generate("hello", **self.PARAMS)
            assert model.backend == "faulty"
