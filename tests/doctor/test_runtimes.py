"""What the record of a machine says of its runtimes, as findings."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from phirt.devices.machine import (
    BackendRecord,
    Cpu,
    Machine,
    Memory,
    PciDevice,
    Quarantine,
    Trial,
)
from phirt.doctor import Finding
from phirt.doctor.packages import read_installed
from phirt.doctor.runtimes import examine_machine
from phirt.types import Availability, Hardware

CPU = Availability("cpu", "found", "onnxruntime 1.31.1")
GPU = Availability("cuda", "found", "found", hardware=Hardware(native="0", driver="580.1"))
WORKS = BackendRecord(
    backend="onnxruntime", outcome="listed", version="onnxruntime 1.31.1", listing=(CPU, GPU)
)
MACHINE = Machine(
    phirt="1.0",
    python="3.11.0",
    system="linux",
    cpu=Cpu(name="A processor", architecture="x86_64", threads=2),
    memory=Memory(total=8 << 30, available=4 << 30),
    backends=(WORKS,),
)


def look(*backends, **more):
    machine = replace(MACHINE, backends=backends or MACHINE.backends, **more)
    return list(examine_machine(machine, read_installed()))


def test_what_works_is_one_line():
    (found,) = look(replace(WORKS, trials=(Trial(device="cpu", outcome="ran", reason="KL 0"),)))
    assert found.severity == "ok"
    assert found.found == "onnxruntime 1.31.1: cpu, cuda (not tried)."


def test_nothing_works():
    missing = Availability("cpu", "missing", "not installed")
    reference = BackendRecord(backend="reference", outcome="listed", listing=(CPU,))
    none = BackendRecord(backend="openvino", outcome="listed", listing=(missing,))
    (found,) = (each for each in look(none, reference) if each.severity != "ok")
    assert (found.severity, found.found) == ("broken", "No runtime is installed and works.")
    assert found.command is not None
    assert found.command.endswith('pip install "phirt[cpu]"')


def test_what_is_missing_is_not_broken():
    missing = Availability("cpu", "missing", "not installed", 'pip install "phirt[openvino]"')
    assert look(WORKS, BackendRecord(backend="openvino", outcome="listed", listing=(missing,))) == (
        look(WORKS)
    )


class TestBroken:
    def test_an_import_without_a_library(self):
        broken = Availability(
            "cpu",
            "broken",
            "Backend 'openvino': 'openvino' is installed, but importing it failed with "
            "ImportError: libgomp.so.1: cannot open shared object file: No such file or directory. "
            "Reinstall it with: python -m pip install --force-reinstall openvino",
        )
        record = BackendRecord(backend="openvino", outcome="listed", listing=(broken,))
        (found,) = (each for each in look(WORKS, record) if each.severity == "broken")
        assert found.area == "libraries"
        assert found.found.startswith("Backend 'openvino': 'openvino' is installed, but importing")
        assert "Reinstall" not in found.found
        assert "libgomp.so.1 is missing" in found.why

    def test_an_import_that_fails_otherwise_is_installed_again(self, site):
        site.install("openvino", "2026.4.1")
        broken = Availability("cpu", "broken", "openvino is installed, but 1/0.")
        record = BackendRecord(backend="openvino", outcome="listed", listing=(broken,))
        (found,) = (each for each in look(WORKS, record) if each.severity == "broken")
        assert found.area == "devices"
        assert str(found.command).endswith('--force-reinstall --no-deps "openvino==2026.4.1"')

    def test_the_build_that_stands_in_is_what_is_installed_again(self, site):
        site.install("onnxruntime-gpu", "1.31.1", "onnxruntime/__init__.py")
        site.install("onnxruntime-genai", "0.18.0")
        record = BackendRecord(backend="onnxruntime", outcome="raised", reason="it raised")
        (found,) = (each for each in look(record) if each.area == "devices" and each.why == "")
        assert str(found.command).endswith(' "onnxruntime-gpu==1.31.1"')

    @pytest.mark.parametrize("outcome", ["crashed", "timed out"])
    def test_a_runtime_that_takes_its_process_along(self, outcome):
        record = BackendRecord(
            backend="openvino", outcome=outcome, reason="Its process ended by SIGILL", fix="Update."
        )
        (found,) = (each for each in look(WORKS, record) if each.severity == "broken")
        assert found.found == "openvino: Its process ended by SIGILL."
        assert (found.why, found.command) == ("Update.", None)

    @pytest.mark.parametrize(
        "outcome", ["raised", "elsewhere", "wrong numbers", "crashed", "timed out"]
    )
    def test_a_device_that_failed_its_trial(self, outcome):
        trial = Trial(device="cuda", outcome=outcome, reason="It did not do it")
        found, rest = look(replace(WORKS, trials=(trial,)))
        assert found.found == "onnxruntime on cuda: It did not do it."
        assert found.severity == "broken"
        assert rest.found == "onnxruntime 1.31.1: cpu (not tried)."

    def test_a_trial_without_a_library(self):
        trial = Trial(
            device="cuda",
            outcome="raised",
            reason="Failed to load libonnxruntime_providers_cuda.so with error: libcudnn.so.9: "
            "cannot open shared object file: No such file or directory",
        )
        found, _ = look(replace(WORKS, trials=(trial,)))
        assert found.area == "libraries"
        assert "onnxruntime-gpu[cuda,cudnn]" in str(found.command)

    def test_what_was_not_tried_says_nothing(self):
        trial = Trial(device="cuda", outcome="not run", reason="no process")
        (found,) = look(replace(WORKS, trials=(trial,)))
        assert found.severity == "ok"


def test_the_libraries_of_another_runtime_come_another_way():
    trial = Trial(
        device="cpu", outcome="raised", reason="libcudart.so.13: cannot open shared object file"
    )
    record = BackendRecord(backend="mlx", outcome="listed", listing=(CPU,), trials=(trial,))
    (found,) = (each for each in look(WORKS, record) if each.severity == "broken")
    assert (found.area, found.command) == ("libraries", None)


class TestUnused:
    GPU = PciDevice(kind="gpu", vendor="nvidia", name="NVIDIA GeForce RTX 4090", pci="0000:01:00.0")
    ONLY_CPU = replace(WORKS, listing=(CPU,))

    def test_a_gpu_that_nothing_serves(self):
        (found,) = (each for each in look(self.ONLY_CPU, pci=(self.GPU,)) if each.severity != "ok")
        assert (found.severity, found.area) == ("note", "devices")
        assert found.found.startswith("NVIDIA GeForce RTX 4090 (")
        assert "pip install" in str(found.command)

    def test_a_gpu_that_one_runtime_serves(self):
        assert {each.severity for each in look(pci=(self.GPU,))} == {"ok"}

    def test_a_gpu_that_fails_is_broken_and_no_more(self):
        trial = Trial(device="cuda", outcome="raised", reason="It did not do it")
        found = look(replace(WORKS, trials=(trial,)), pci=(self.GPU,))
        assert {each.severity for each in found} == {"broken", "ok"}


class TestTold:
    """A fault of packages or versions is one finding, not one more for each backend."""

    def told(self, reason, *findings):
        broken = Availability("cpu", "broken", reason)
        record = BackendRecord(backend="transformers", outcome="listed", listing=(broken,))
        machine = replace(MACHINE, backends=(WORKS, record))
        found = examine_machine(machine, read_installed(), told=findings)
        return not [each for each in found if each.severity == "broken"]

    def test_two_owners(self):
        conflict = "a 1 and b 1 both installed 'a' into /x, and overwrote each other's files."
        told = Finding(severity="broken", area="packages", found=conflict)
        assert self.told(f"Backend 'a': {conflict} Keep one of them: pip …", told)
        assert not self.told("Backend 'a': 1/0", told)
        assert not self.told(f"Backend 'a': {conflict}")

    def test_too_old(self):
        told = Finding(
            severity="warning",
            area="versions",
            found="phirt[torch] needs transformers>=5.23; installed is transformers 5.5.4.",
        )
        reason = "Backend 'transformers' needs {} 5.23 or later; installed is 5.5.4. Update it."
        assert self.told(reason.format("transformers"), told)
        assert not self.told(reason.format("torch"), told)


class TestQuarantine:
    ENTRY = Quarantine(
        backend="onnxruntime",
        device="cuda",
        version="onnxruntime 1.31.1",
        driver="580.1",
        reason="KL 3.1, at most 0.02 is right",
        when="2026-11-22T03:00:00Z",
    )

    def test_a_quarantined_device(self):
        found, _ = look(quarantine=(self.ENTRY,))
        assert found.severity == "broken"
        assert found.found.startswith("onnxruntime on cuda is in quarantine since 2026-11-22")
        assert found.command == "phirt devices --refresh"

    def test_another_driver_ends_it(self):
        (found,) = look(quarantine=(replace(self.ENTRY, driver="579.0"),))
        assert found.severity == "ok"


def test_a_runtime_without_its_library_from_import_to_finding(environment):
    """An import that fails as with a wheel for GPUs on a machine without cuDNN."""
    environment.install("onnxruntime-gpu", "1.31.1", "onnxruntime/__init__.py")
    (environment.site / "onnxruntime" / "__init__.py").write_text(
        "raise ImportError('libcudnn.so.9: cannot open shared object file: No such file')"
    )
    program = """
import json
from dataclasses import asdict, replace
from phirt.dispatch.probe_child import list_backend
from phirt.doctor import Finding
from phirt.doctor.packages import read_installed
from phirt.doctor.runtimes import examine_machine
from tests.doctor.test_runtimes import MACHINE
machine = replace(MACHINE, backends=(list_backend("onnxruntime"),))
print(json.dumps([asdict(each) for each in examine_machine(machine, read_installed())]))
"""
    first, _ = json.loads(environment.run([environment.python, "-c", program]))
    assert (first["severity"], first["area"]) == ("broken", "libraries")
    assert "libcudnn.so.9 is missing" in first["why"]
    assert first["command"] == 'python -m pip install "onnxruntime-gpu[cuda,cudnn]"'
