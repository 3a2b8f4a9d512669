"""A record of a machine survives JSON, and a wrong one is refused with the place."""

from __future__ import annotations

import json
from typing import Any

import pytest

from phirt.devices.machine import SCHEMA, BackendRecord, Machine, PciDevice, Quarantine, Trial
from phirt.devices.record_json import from_json, machine_from_json, to_json
from phirt.types import Availability, Hardware
from tests.devices.machines import NVIDIA, listed, make_machine, missing

FULL = make_machine(
    listed(
        "onnxruntime",
        Availability(
            "cuda:0",
            "found",
            "seen",
            version="onnxruntime 1.31.1",
            hardware=Hardware(native="CUDA 0", pci="0000:01:00.0", discrete=True),
        ),
        trials=(Trial(device="cuda:0", outcome="ran", reason="It ran.", kl=0.001, seconds=2.0),),
        seconds=0.5,
    ),
    missing("openvino"),
    BackendRecord(backend="mlx", outcome="crashed", reason="It crashed.", fix="Mend it."),
    pci=(NVIDIA, PciDevice(kind="npu")),
    drivers={"nvidia": "570.1"},
    environment={"CUDA_VISIBLE_DEVICES": "0"},
    distributions={"onnxruntime-gpu": "1.31.1"},
    quarantine=(
        Quarantine(
            backend="onnxruntime",
            device="cuda:0",
            version=None,
            driver="570.1",
            reason="KL 3.",
            when="2026-11-22T03:00:00Z",
        ),
    ),
)


def document() -> dict[str, Any]:
    """A record as its JSON, to spoil."""
    loaded: dict[str, Any] = json.loads(json.dumps(to_json(FULL)))
    return loaded


def test_a_record_comes_back_as_it_was():
    assert machine_from_json(document()) == FULL


def test_what_has_a_default_may_be_left_out():
    given = document()
    given["backends"] = [{"backend": "mlx", "outcome": "listed"}]
    del given["quarantine"], given["schema"]
    read = machine_from_json(given)
    assert read.backends == (BackendRecord(backend="mlx", outcome="listed"),)
    assert (read.quarantine, read.schema) == ((), SCHEMA)


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("cpu.threads", "8", r"machine\.cpu\.threads must be a whole number from 0, not '8'"),
        ("cpu.threads", True, r"machine\.cpu\.threads must be a whole number from 0, not True"),
        ("cpu.threads", -1, r"machine\.cpu\.threads must be a whole number from 0, not -1"),
        ("cpu.features", "avx2", r"machine\.cpu\.features must be a list, not 'avx2'"),
        ("cpu.name", None, r"machine\.cpu\.name must be a string, not None"),
        ("cpu", [], r"machine\.cpu must be an object, not a list"),
        ("cpu.thread", 8, r"machine\.cpu has no field 'thread'; it has: name, vendor"),
        ("pci.0.kind", "tpu", r"machine\.pci\[0\]\.kind must be one of 'gpu', 'npu', not 'tpu'"),
        ("drivers", {"nvidia": 570}, r"machine\.drivers\.nvidia must be a string, not 570"),
        ("backends.0.seconds", "1", r"machine\.backends\[0\]\.seconds must be a number"),
        ("backends.0.seconds", float("nan"), r"backends\[0\]\.seconds must be a number, not nan"),
        (
            "backends.0.listing.0.hardware.discrete",
            1,
            r"listing\[0\]\.hardware\.discrete must be true or false, not 1",
        ),
        ("memory", {"total": 1}, r"machine\.memory lacks the field 'available'"),
    ],
)
def test_a_wrong_field_is_named(path, value, complaint):
    given: Any = document()
    place: Any = given
    *parents, last = path.split(".")
    for part in parents:
        place = place[int(part) if part.isdecimal() else part]
    place[last] = value
    with pytest.raises(ValueError, match=complaint):
        machine_from_json(given)


def test_a_record_of_another_schema_names_its_writer():
    with pytest.raises(ValueError, match=r"schema 99 \(written by phirt '0'\).*reads schema 1"):
        machine_from_json(document() | {"schema": 99})


@pytest.mark.parametrize("given", [None, [], "record", 1])
def test_what_is_no_object_is_no_record(given):
    with pytest.raises(ValueError, match="machine must be an object"):
        machine_from_json(given)


def test_a_part_can_be_read_alone():
    trial = Trial(device="cpu", outcome="ran", reason="It ran.")
    assert from_json(Trial, to_json(trial), where="trial") == trial


@pytest.mark.parametrize("given", [Machine, {"a": 1}, None])
def test_only_records_become_json(given):
    with pytest.raises(TypeError, match="a record is an instance of a dataclass"):
        to_json(given)
