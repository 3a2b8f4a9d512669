"""A runtime that fails in any way costs a row, and never the application (row L10)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from phirt.cli import main
from phirt.devices.device import DeviceBackend
from phirt.devices.merge import devices_of
from phirt.dispatch import survey
from phirt.dispatch.survey import Survey

SIGILL = (
    "crashed with SIGILL: an instruction that this processor does not have."
    if os.name == "posix"
    else "ended with exit status 3 and without an answer."
)
ASKED = "Asked for its devices, its process "
TRIED = "Running a tiny model there, its process "


@pytest.fixture
def faulty(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own_machine_dir: Path
) -> Callable[[str], None]:
    """Installs a class of tests/dispatch/faulty.py as the only backend, for children too."""

    def install(target: str) -> None:
        metadata = tmp_path / "site" / "faulty-1.0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text("Name: faulty\nVersion: 1.0\n", encoding="utf-8")
        (metadata / "entry_points.txt").write_text(
            f"[phirt.backends]\nfaulty = {target}\n", encoding="utf-8"
        )
        monkeypatch.syspath_prepend(str(metadata.parent))
        monkeypatch.setattr(survey, "backend_names", lambda: ["faulty"])

    return install


def find_row(*, listing_s: float = 60, trial_s: float = 60) -> DeviceBackend:
    """The one row that there is, after everything was asked and tried."""
    asked = Survey(listing_timeout_s=listing_s, trial_timeout_s=trial_s)
    (cpu,) = devices_of(asked.machine(trials="all"))
    (row,) = cpu.backends
    assert (row.backend, row.device) == ("faulty", "cpu")
    return row


@pytest.mark.parametrize("target", ["Sound", "Chatty"])
def test_what_works_is_ready_whatever_it_prints(faulty, target):
    faulty(f"tests.dispatch.faulty:{target}")
    row = find_row()
    assert (row.status, row.version, row.fix) == ("ready", "faulty 1.0", None)
    assert row.reason.startswith("A tiny model ran there and gave the right numbers: KL ")


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("faulty:ProbeRaises", "RuntimeError: the driver is too old"),
        (
            "faulty_import:Backend",
            (
                "The adapter of backend 'faulty' (tests.dispatch.faulty_import:Backend) cannot "
                "be imported: RuntimeError: libnothing.so.1: cannot open shared object file. "
                "Reinstall or update the package that brings it."
            ),
        ),
        ("faulty:ProbeIsIllegal", ASKED + SIGILL),
        ("faulty:ProbeExits", ASKED + "ended with exit status 7 and without an answer."),
        (
            "faulty:ProbeLies",
            (
                "ValueError: its answer.listing[0].status must be one of 'found', 'loads', "
                "'ran', 'no device', 'missing', 'broken', not 'excellent'"
            ),
        ),
        (
            "faulty:ProbeSurveys",
            (
                "This process was started to ask a backend for its devices, and the backend asks "
                "phirt for them."
            ),
        ),
    ],
)
def test_a_runtime_that_cannot_be_asked_is_broken(faulty, target, reason):
    faulty(f"tests.dispatch.{target}")
    row = find_row()
    assert (row.status, row.reason) == ("broken", reason)


def test_what_a_runtime_said_before_it_aborted_is_told(faulty):
    faulty("tests.dispatch.faulty:ProbeAborts")
    row = find_row()
    assert row.status == "broken"
    assert row.reason.startswith(ASKED)
    assert "It said last: terminate called after throwing" in row.reason
    assert row.fix == (
        "Reinstall or update its runtime. Once that is mended, `phirt devices --refresh` asks "
        "again."
    )


def test_a_runtime_that_hangs_is_given_up(faulty):
    faulty("tests.dispatch.faulty:ProbeHangs")
    started = time.monotonic()
    row = find_row(listing_s=4)
    assert (row.status, row.reason) == ("broken", ASKED + "gave no answer within 4 s.")
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("target", "status", "reason"),
    [
        ("TrialIsIllegal", "broken", TRIED + SIGILL),
        ("TrialRaises", "broken", "OSError: the device is busy"),
        ("TrialFindsNothing", "no-device", "No device answers."),
        ("TrialIsElsewhere", "broken", "The graph runs on the CPU."),
        (
            "NotANumber",
            "broken",
            "A tiny model ran there and gave wrong numbers: KL inf, at most 0.02 is right.",
        ),
    ],
)
def test_a_device_that_is_listed_and_does_not_work(faulty, target, status, reason):
    faulty(f"tests.dispatch.faulty:{target}")
    row = find_row()
    assert (row.status, row.reason) == (status, reason)


def test_a_device_that_computes_wrong_numbers(faulty):
    faulty("tests.dispatch.faulty:OffByAFactor")
    row = find_row()
    assert row.status == "broken"
    assert row.reason.startswith("A tiny model ran there and gave wrong numbers: KL ")


def test_a_trial_that_hangs_is_given_up(faulty):
    faulty("tests.dispatch.faulty:TrialHangs")
    row = find_row(trial_s=4)
    assert (row.status, row.reason) == ("broken", TRIED + "gave no answer within 4 s.")


def test_what_the_trial_model_is_not_there_for_is_unverified(faulty):
    faulty("tests.dispatch.faulty:ReadsNothing")
    row = find_row()
    assert row.status == "unverified"
    assert "the backend reads a format of its own" in row.reason


def test_a_device_whose_memory_is_taken_is_tried_again(faulty):
    faulty("tests.dispatch.faulty:TrialFindsNoMemory")
    asked: list[str] = []
    for _ in range(2):
        (cpu,) = devices_of(Survey(report=asked.append).machine(trials="all"))
        (row,) = cpu.backends
        assert (row.status, row.reason) == ("unverified", "Something else has the memory.")
    assert asked == ["asking faulty", *2 * ["trying faulty on cpu"]]


@pytest.mark.parametrize("short", ["_LEAST_DISK_BYTES", "_LEAST_MEMORY_BYTES"])
def test_a_failure_where_memory_or_disk_is_short_says_nothing_of_the_runtime(
    faulty, monkeypatch, tmp_path, short
):
    faulty("tests.dispatch.faulty:ProbeRaises")
    (tmp_path / "site" / "wants_more.py").write_text(
        "import sys\n"
        "from phirt.dispatch import probe_child\n"
        f"probe_child.{short} = 1 << 60\n"
        "probe_child.main(sys.argv[1:])\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(survey, "_CHILD", "wants_more")
    asked: list[str] = []
    for _ in range(2):
        Survey(report=asked.append).machine()
    assert asked == ["asking faulty"] * 2


def test_a_child_without_a_parent_ends_by_itself(faulty, tmp_path):
    faulty("tests.dispatch.faulty:ProbeHangs")
    command = [sys.executable, "-m", "phirt.dispatch.probe_child", "list", "faulty", "3"]
    orphan = subprocess.run(
        [*command, str(tmp_path / "answer")],
        check=False,
        timeout=60,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert orphan.returncode == 1
    assert not (tmp_path / "answer").exists()


class TestRealAdapters:
    """What users meet: an installation of a known runtime that is damaged."""

    @pytest.fixture
    def site(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own_machine_dir: Path
    ) -> Callable[..., Path]:
        """Installs a package of this name that does as the source says, before any other."""

        def install(name: str, source: str) -> Path:
            (tmp_path / "site" / name).mkdir(parents=True)
            (tmp_path / "site" / name / "__init__.py").write_text(source, encoding="utf-8")
            monkeypatch.syspath_prepend(str(tmp_path / "site"))
            monkeypatch.setattr(survey, "backend_names", lambda: [name])
            return tmp_path / "site"

        return install

    def find(self, *, listing_s: float = 60) -> DeviceBackend:
        (cpu, *_) = devices_of(Survey(listing_timeout_s=listing_s).machine(trials="all"))
        (row,) = cpu.backends
        return row

    def test_an_import_that_raises(self, site):
        site("openvino", "raise ImportError('libtbb.so.12: cannot open shared object file')")
        row = self.find()
        assert row.status == "broken"
        assert "libtbb.so.12: cannot open shared object file" in row.reason
        assert "python -m pip install --force-reinstall openvino" in f"{row.reason} {row.fix}"

    def test_an_import_that_aborts(self, site):
        site("openvino", "import signal; signal.raise_signal(signal.SIGILL)")
        row = self.find()
        assert (row.status, row.reason) == ("broken", ASKED + SIGILL)

    def test_an_import_that_hangs(self, site):
        site("openvino", "import time; time.sleep(10_000)")
        row = self.find(listing_s=4)
        assert (row.status, row.reason) == ("broken", ASKED + "gave no answer within 4 s.")

    def test_two_wheels_that_overwrote_each_other(self, site):
        folder = site("onnxruntime", "")
        for name, version in (("onnxruntime", "1.31.1"), ("onnxruntime-gpu", "1.26.0")):
            metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info"
            metadata.mkdir()
            text = f"Name: {name}\nVersion: {version}\n"
            (metadata / "METADATA").write_text(text, encoding="utf-8")
            (metadata / "RECORD").write_text("onnxruntime/__init__.py,,\n", encoding="utf-8")
        row = self.find()
        assert row.status == "broken"
        assert "both installed the package 'onnxruntime'" in row.reason
        assert "python -m pip uninstall -y onnxruntime onnxruntime-gpu" in f"{row.reason}{row.fix}"


@pytest.mark.parametrize("target", ["ProbeIsIllegal", "TrialIsIllegal"])
def test_the_command_tells_of_it_and_succeeds(faulty, target, capsys):
    faulty(f"tests.dispatch.faulty:{target}")
    assert main(["devices", "--json"]) == 0
    (cpu,) = json.loads(capsys.readouterr().out)
    assert [row["status"] for row in cpu["backends"]] == ["broken"]


@pytest.mark.parametrize("target", ["Sound", "ProbeRaises", "TrialIsIllegal"])
def test_the_answer_is_remembered_a_failure_too(faulty, target):
    faulty(f"tests.dispatch.faulty:{target}")
    asked: list[str] = []
    first = Survey(report=asked.append).machine(trials="all")
    count = len(asked)
    again = Survey(report=asked.append).machine(trials="all")
    assert again.backends == first.backends
    assert len(asked) == count > 0
