"""Records of machines, replayed: what each device is, and the plan, reason by reason.

CONTRIBUTING.md says how a record comes here.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from phirt.devices.machine import BackendRecord, Machine, Quarantine, Trial, TrialOutcome
from phirt.devices.merge import devices_of
from phirt.devices.record_json import machine_from_json, to_json
from phirt.dispatch.plan import Plan, PlanCandidate, PlannedArtifact, PlanRequest
from phirt.dispatch.planner import make_plan

FOLDER = Path(__file__).parent / "machines"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))

# The model in a form for every backend, so that the machine alone decides.
FORMS = (
    PlannedArtifact(format="onnx-genai", precision="int8", state="to convert"),
    PlannedArtifact(format="openvino", precision="int8", state="to convert"),
    PlannedArtifact(format="safetensors", precision="fp32", state="to convert"),
)

# What a trial says of a device that fails. One that crashes is no invention: torch did on an Arc
# GPU (github.com/pytorch/pytorch/issues/179891).
FAILURES: dict[TrialOutcome, str] = {
    "crashed": "Running a tiny model there, its process crashed with SIGSEGV: memory that is not "
    "there was accessed.",
    "timed out": "Running a tiny model there, its process gave no answer within 120 s.",
    "wrong numbers": "A tiny model ran there and gave wrong numbers: KL 3, at most 0.021 is right.",
    "elsewhere": "The graph runs on the CPU.",
    "raised": "RuntimeError: out of resources",
    "no device": "The driver finds no device.",
}

_KEYS = ("backend", "device")
_CITED = re.compile(r"https://\S+\.\S+|phirt/[a-z_/]+\.py|\bmeasured\b")


def read(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return document


def machine_of(name: str) -> Machine:
    return machine_from_json(read(name)["machine"])


def plan_of(machine: Machine, **request: Any) -> Plan:
    return make_plan(machine, FORMS, PlanRequest(model="a model", **request))


def row_of(candidate: PlanCandidate) -> dict[str, Any]:
    """What a record's file says of a candidate."""
    row = {
        "backend": candidate.backend,
        "device": candidate.device,
        "artifact": candidate.artifact.format if candidate.artifact else None,
        "status": candidate.status,
        "stage": candidate.stage,
        "reason": candidate.reason,
        "fix": candidate.fix,
    }
    return {key: value for key, value in row.items() if value is not None}


def leaves(value: Any, path: str = "") -> Iterator[str]:
    """The paths of all that a record says; what is null or empty says nothing.

    Elements of a list go by the backend or the device that they are about, else by number.
    """
    if isinstance(value, dict):
        for key, each in value.items():
            yield from leaves(each, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for index, each in enumerate(value):
            known = each if isinstance(each, dict) else {}
            name = next((known[key] for key in _KEYS if key in known), index)
            yield from leaves(each, f"{path}.{name}")
    elif value is not None and value != "":
        yield path


def covers(source: str, leaf: str) -> bool:
    return leaf == source or leaf.startswith(f"{source}.")


def failing(machine: Machine, backend: str, device: str, outcome: TrialOutcome) -> Machine:
    """The machine, with one device that fails its trial."""

    def changed(record: BackendRecord) -> BackendRecord:
        if record.backend != backend:
            return record
        trial = Trial(device=device, outcome=outcome, reason=FAILURES[outcome])
        others = [each for each in record.trials if each.device != device]
        return replace(record, trials=(*others, trial))

    return replace(machine, backends=tuple(map(changed, machine.backends)))


def accelerators(plan: Plan) -> list[tuple[str, str]]:
    """The ways to something else than the CPU, in order."""
    usable = [each for each in plan.candidates if each.status != "rejected"]
    ways = [(each.backend, each.device) for each in usable if each.device != "cpu"]
    return list(dict.fromkeys(ways))


def of(plan: Plan, backend: str, device: str) -> list[PlanCandidate]:
    return [each for each in plan.candidates if (each.backend, each.device) == (backend, device)]


class TestRecords:
    """Facts come from documents, each with its own."""

    @pytest.mark.parametrize("name", NAMES)
    def test_every_field_has_a_source_and_every_source_a_field(self, name):
        document = read(name)
        sources = document["sources"]
        said = list(leaves(document["machine"]))
        assert [leaf for leaf in said if not any(covers(key, leaf) for key in sources)] == []
        assert [key for key in sources if not any(covers(key, leaf) for leaf in said)] == []
        assert [key for key, text in sources.items() if not _CITED.search(text)] == []

    @pytest.mark.parametrize("name", NAMES)
    def test_it_is_a_record_and_stays_the_same_when_it_is_written(self, name):
        machine = machine_of(name)
        assert machine_from_json(to_json(machine)) == machine

    def test_every_kind_of_machine_is_there(self):
        """Those that a record was asked for; a user's may be added."""
        assert {
            "bare-cpu",
            "linux-cuda-broken",
            "linux-igpu-dgpu",
            "macos-metal",
            "windows-directml-npu",
            "windows-snapdragon-qnn",
        } <= set(NAMES)


class TestReplay:
    """The code that decides on this machine decides the same of a record."""

    @pytest.mark.parametrize("name", NAMES)
    def test_the_devices(self, name):
        document = read(name)
        found = devices_of(machine_from_json(document["machine"]))
        assert [to_json(device) for device in found] == document["devices"]

    @pytest.mark.parametrize(
        ("name", "number"),
        [(name, number) for name in NAMES for number in range(len(read(name)["plans"]))],
    )
    def test_the_plan_reason_by_reason(self, name, number):
        expected = read(name)["plans"][number]
        plan = plan_of(machine_of(name), **expected["request"])
        assert list(map(row_of, plan.candidates)) == expected["candidates"]

    @pytest.mark.parametrize("name", NAMES)
    def test_one_candidate_is_chosen_and_all_have_a_reason(self, name):
        plan = plan_of(machine_of(name))
        assert plan.chosen is plan.candidates[0]
        assert all(each.reason for each in plan.candidates)
        offered = {
            (record.backend, offer.device)
            for record in machine_of(name).backends
            for offer in record.listing
        }
        assert {(each.backend, each.device) for each in plan.candidates} >= offered


@pytest.mark.parametrize("outcome", FAILURES)
@pytest.mark.parametrize("name", NAMES)
class TestFailures:
    """A device that failed is not chosen, what comes next is, and the plan says why."""

    def test_each_alone_is_rejected_and_the_others_keep_their_order(self, name, outcome):
        machine = machine_of(name)
        before = plan_of(machine)
        for backend, device in accelerators(before):
            plan = plan_of(failing(machine, backend, device, outcome))
            rows = of(plan, backend, device)
            assert rows
            assert {row.status for row in rows} == {"rejected"}
            assert {(row.stage, row.reason) for row in rows} == {("device", FAILURES[outcome])}
            usable = [row.described for row in before.candidates if row.status != "rejected"]
            assert [row.described for row in plan.candidates if row.status != "rejected"] == [
                row for row in usable if row != f"{backend} on {device}"
            ]

    def test_all_after_another_until_the_cpu_is_left(self, name, outcome):
        machine = machine_of(name)
        failed: list[tuple[str, str]] = []
        while left := accelerators(plan := plan_of(machine)):
            assert plan.chosen is not None
            chosen = (plan.chosen.backend, plan.chosen.device)
            assert chosen not in failed
            # The accelerator that is chosen; where the CPU is, one that could be.
            worse = chosen if chosen in left else left[0]
            machine = failing(machine, *worse, outcome)
            failed.append(worse)
        assert plan.chosen is not None
        assert plan.chosen.device == "cpu"
        for backend, device in failed:
            assert [row.reason for row in of(plan, backend, device)] == [FAILURES[outcome]]

    def test_one_that_was_named_is_not_replaced_by_the_cpu(self, name, outcome):
        machine = machine_of(name)
        for backend, device in accelerators(plan_of(machine)):
            broken = failing(machine, backend, device, outcome)
            plan = plan_of(broken, device=device, backend=backend)
            if outcome == "wrong numbers":
                # The user's word against a tiny model's: it is used, and the plan has the doubt.
                assert plan.chosen is not None
                assert (plan.chosen.backend, plan.chosen.device) == (backend, device)
                assert plan.chosen.reason.startswith(FAILURES[outcome].rstrip("."))
            else:
                assert plan.chosen is None
                assert [row.reason for row in of(plan, backend, device)] == [FAILURES[outcome]]


@pytest.mark.parametrize("name", NAMES)
def test_a_quarantined_device_is_not_chosen_until_its_driver_changes(name):
    machine = machine_of(name)
    for backend, device in accelerators(plan_of(machine)):
        record = machine.backend(backend)
        assert record is not None
        offer = next(each for each in record.listing if each.device == device)
        entry = Quarantine(
            backend=backend,
            device=device,
            version=offer.version or record.version,
            driver=offer.hardware.driver if offer.hardware else None,
            reason="KL 2.3 from the original weights",
            when="2026-11-22T03:00:00Z",
        )
        (row,) = of(plan_of(replace(machine, quarantine=(entry,))), backend, device)
        assert row.status == "rejected"
        assert "2026-11-22T03:00:00Z" in row.reason
        assert entry.reason in row.reason
        updated = replace(machine, quarantine=(replace(entry, driver="another"),))
        assert plan_of(updated) == plan_of(machine)


def fill(name: str) -> None:
    """Write what the code says of a record into its file, for somebody to read."""
    document = read(name)
    machine = machine_from_json(document["machine"])
    document["devices"] = [to_json(device) for device in devices_of(machine)]
    for each in document["plans"]:
        plan = plan_of(machine, **each["request"])
        each["candidates"] = list(map(row_of, plan.candidates))
    text = json.dumps(document, indent=2, ensure_ascii=False)
    (FOLDER / f"{name}.json").write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        fill(argument)
