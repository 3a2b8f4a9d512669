"""What the system tells of the machine that this runs on, and what identifies a machine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from phirt.devices.hardware import hardware_id, read_environment, read_system
from phirt.devices.machine import Memory
from tests.devices.machines import CPU, INTEL, NVIDIA, listed, make_machine, offer

MACHINE = make_machine(pci=(NVIDIA,), drivers={"nvidia": "570.1"})


def test_this_machine_has_a_processor_and_a_system():
    here = read_system()
    assert here.system in ("linux", "windows", "macos")
    assert here.cpu.name
    assert 1 <= (here.cpu.cores or 1) <= here.cpu.threads


def test_variables_that_runtimes_read_are_recorded(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("A_SECRET", "of nobody's business")
    found = read_environment()
    assert found["CUDA_VISIBLE_DEVICES"] == ""
    assert "A_SECRET" not in found


@pytest.mark.parametrize(
    "other",
    [
        replace(MACHINE, cpu=replace(CPU, name="Another CPU")),
        replace(MACHINE, cpu=replace(CPU, threads=2)),
        replace(MACHINE, pci=(INTEL,)),
        replace(MACHINE, drivers={"nvidia": "571.0"}),
        replace(MACHINE, memory=Memory(total=64 << 30, available=1)),
    ],
)
def test_other_hardware_is_another_machine(other):
    assert hardware_id(other) != hardware_id(MACHINE)


@pytest.mark.parametrize(
    "same",
    [
        replace(MACHINE, memory=replace(MACHINE.memory, available=1)),
        replace(MACHINE, memory=replace(MACHINE.memory, total=32_000_004_096)),
        replace(MACHINE, backends=(listed("openvino", offer("cpu")),)),
        replace(MACHINE, distributions={"openvino": "1"}, environment={"LD_PRELOAD": "x"}),
    ],
)
def test_what_runs_on_it_makes_it_no_other_machine(same):
    assert hardware_id(same) == hardware_id(MACHINE)
    assert len(hardware_id(same)) == 16
