"""A plan that is carried out: what is tried, what is recorded, what is raised."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from phirt.devices.machine import Memory, Trial
from phirt.dispatch import quarantine, select
from phirt.dispatch.canary import Verdict
from phirt.dispatch.measurements import Setting
from phirt.dispatch.plan import MemoryNeed, PlanRequest, Speed
from phirt.dispatch.planner import make_plan
from phirt.dispatch.select import PlanLoader, without_wrong
from phirt.errors import (
    BackendBrokenError,
    BackendError,
    BackendNotInstalledError,
    BackendRuntimeError,
    DeviceNotAvailableError,
    DevicePlacementError,
    ModelFormatError,
    OutOfMemoryError,
    UnsupportedModelError,
)
from phirt.protocols import LoadOptions
from phirt.types import Artifact
from tests.dispatch.fake_backend import ONNX, FakeBackend, machine, record

ANY = dict.fromkeys(("first", "second", "third"), ("onnx-genai",))


@pytest.fixture(autouse=True)
def _a_machine_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("PHIRT_MACHINE_DIR", str(tmp_path / "machine"))


@pytest.fixture(autouse=True)
def _artifacts_of_these_tests_have_no_sizes(monkeypatch):
    monkeypatch.setattr(select, "shape_of", lambda folder: None)
    monkeypatch.setattr(select, "memory_need", lambda *_, **__: None)


@pytest.fixture
def answers(monkeypatch):
    """What comes of comparing a loaded model's numbers, by device; passed where not said."""
    verdicts: dict[str, Verdict | Exception | Callable[[], Verdict]] = {}
    passed = Verdict(status="passed", kl=0.0, bound=0.02, reason="as it should be")

    def check(loaded, folder, place, **_):
        verdict = verdicts.get(place.device, passed)
        if isinstance(verdict, Exception):
            raise verdict
        return verdict() if callable(verdict) else verdict

    monkeypatch.setattr(select, "check_loaded", check)
    return verdicts


@pytest.fixture
def bench(monkeypatch, answers):
    """Registers fake backends, in order, and gives what loads a model with them."""
    return Bench(monkeypatch)


class Bench:
    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch
        self.outcomes: dict[tuple[str, str], Trial] = {}
        self.tried: list[tuple[str, str]] = []
        self.refusals: dict[str, Exception] = {}

    def register(self, **adapters):
        self.adapters = adapters

        def get(name):
            if isinstance(adapters[name], Exception):
                raise adapters[name]
            return adapters[name]

        self.monkeypatch.setattr(select, "get_backend", get)

    def load(
        self, device="auto", backend="auto", *, options=None, find=None, change=None, **fields
    ):
        records = [record(name, *each.devices) for name, each in self.adapters.items()]
        here = machine(*records, **fields)
        request = PlanRequest(model="a-model", device=device, backend=backend)
        told = {name: str(error) for name, error in self.refusals.items()}
        formats = {name: () if name in told else layouts for name, layouts in ANY.items()}
        plan = make_plan(here, [ONNX], request, formats=formats, refusals=told)
        loader = PlanLoader(
            here,
            find or folder_of,
            options or LoadOptions(),
            try_first=self.try_first,
            refusals=self.refusals,
        )
        self.loader = loader
        return loader.load(change(plan) if change else plan)

    def try_first(self, backend, device):
        self.tried.append((backend, device))
        ran = Trial(device=device, outcome="ran", reason="it ran")
        return self.outcomes.get((backend, device), ran)

    def fails(self, backend, device, outcome, reason="something was seen", fix=None):
        trial = Trial(device=device, outcome=outcome, reason=reason, fix=fix)
        self.outcomes[backend, device] = trial


def folder_of(candidate):
    """A model folder as it is found: only its artifact is looked at."""
    artifact = Artifact(
        name="a-model",
        path=Path("somewhere"),
        format=candidate.artifact.format,
        architecture="llama",
        precision="int8",
        weights_id="x",
    )
    return SimpleNamespace(artifact=artifact)


def row_of(selection, backend, device="cpu"):
    rows = selection.plan.candidates
    return next(row for row in rows if (row.backend, row.device) == (backend, device))


class TestAuto:
    def test_it_takes_the_first_that_works(self, bench):
        first, second = FakeBackend(), FakeBackend()
        bench.register(first=first, second=second)
        selection = bench.load()
        assert (selection.backend, selection.device) == ("first", "cpu")
        assert selection.loaded is first.model
        assert selection.plan.chosen.backend == "first"
        assert (second.seen, bench.tried) == ([], [("first", "cpu")])

    def test_what_fails_to_load_is_recorded_and_the_next_is_taken(self, bench):
        bench.register(
            first=FakeBackend(error=BackendNotInstalledError("not there")), second=FakeBackend()
        )
        selection = bench.load()
        assert selection.backend == "second"
        row = row_of(selection, "first")
        assert (row.status, row.stage, row.reason) == ("rejected", "load", "not there")

    def test_what_rejects_the_model_says_why_and_what_helps(self, bench):
        bench.register(first=FakeBackend(rejects=True), second=FakeBackend())
        row = row_of(bench.load(), "first")
        assert (row.stage, row.reason) == ("model", "no onnx-genai on cpu here")
        assert row.fix == "Buy one."

    def test_what_cannot_have_the_model_is_passed_over(self, bench):
        def find(candidate):
            if candidate.backend == "first":
                raise UnsupportedModelError("no such graph")
            return folder_of(candidate)

        bench.register(first=FakeBackend(), second=FakeBackend())
        assert bench.load(find=find).backend == "second"

    def test_a_plugin_that_does_not_import_is_passed_over(self, bench):
        bench.register(first=FakeBackend(), second=FakeBackend())
        bench.adapters["first"] = SimpleNamespace(devices=("cpu",))

        def get(name):
            if name == "first":
                raise BackendBrokenError("The adapter of backend 'first' cannot be imported")
            return bench.adapters[name]

        bench.monkeypatch.setattr(select, "get_backend", get)
        assert row_of(bench.load(), "first").reason.endswith("cannot be imported")

    def test_those_passed_over_stand_behind_the_others_in_the_order_of_their_turns(self, bench):
        error = BackendRuntimeError("no")
        bench.register(
            first=FakeBackend(error=error), second=FakeBackend(error=error), third=FakeBackend()
        )
        rows = bench.load().plan.candidates
        assert [(row.backend, row.status) for row in rows] == [
            ("third", "chosen"),
            ("first", "rejected"),
            ("second", "rejected"),
        ]

    def test_a_damaged_model_is_nobodys_fallback(self, bench):
        second = FakeBackend()
        bench.register(first=FakeBackend(error=ModelFormatError("damaged")), second=second)
        with pytest.raises(ModelFormatError, match="damaged"):
            bench.load()
        assert second.seen == []

    def test_what_failed_in_use_is_followed_by_the_next(self, bench):
        bench.register(first=FakeBackend(), second=FakeBackend())
        failed = bench.load()
        after = bench.loader.load_next(failed, "it died")
        assert after.backend == "second"
        assert (row_of(after, "first").stage, row_of(after, "first").reason) == ("use", "it died")

    def test_what_follows_must_fit_beside_it(self, bench, monkeypatch):
        need = MemoryNeed(weights=300, kv=100, workspace=100, context=8, free=None)

        def full(*_, **__):
            raise OutOfMemoryError("no room beside the other")

        def planned(plan):
            return replace(plan, candidates=tuple(replace(c, memory=need) for c in plan.candidates))

        bench.register(first=FakeBackend(), second=FakeBackend())
        monkeypatch.setattr(select, "read_memory", lambda: Memory(total=1000, available=400))
        seen = []

        def predicted(*_, machine, **__):
            seen.append(machine.memory)
            return need

        monkeypatch.setattr(select, "memory_need", predicted)
        failed = bench.load(change=planned)
        assert seen == []
        monkeypatch.setattr(select, "check_fit", full)
        with pytest.raises(OutOfMemoryError, match="no room beside the other"):
            bench.loader.load_next(failed, "it died")
        assert [memory.free for memory in seen] == [400]
        assert bench.adapters["second"].seen == []


class TestTrial:
    """Row L10: what crashes in a process of its own is never imported in this one."""

    @pytest.mark.parametrize("outcome", ["raised", "crashed", "timed out", "wrong numbers"])
    def test_what_fails_its_trial_is_not_loaded(self, bench, outcome):
        first = FakeBackend()
        bench.register(first=first, second=FakeBackend())
        bench.fails("first", "cpu", outcome, "it died of SIGILL", "Update it.")
        selection = bench.load()
        assert (selection.backend, first.seen) == ("second", [])
        row = row_of(selection, "first")
        assert (row.stage, row.reason, row.fix) == ("device", "it died of SIGILL", "Update it.")

    def test_where_no_process_can_be_started_it_is_used_and_noted(self, bench):
        bench.register(first=FakeBackend())
        bench.fails("first", "cpu", "not run", "Not tried: no process.")
        (note,) = bench.load().plan.notes
        assert note == "first on cpu: Not tried: no process."

    def test_a_named_backend_is_used_without(self, bench):
        bench.register(first=FakeBackend())
        assert bench.load(backend="first").backend == "first"
        assert bench.tried == []

    def test_a_device_that_phirt_chooses_is_tried_with_a_named_backend_too(self, bench):
        bench.register(first=FakeBackend(devices=("cpu", "cuda")))
        bench.fails("first", "cuda", "elsewhere", "it ran on the CPU")
        assert bench.load(backend="first").device == "cpu"
        assert bench.tried == [("first", "cuda")]

    def test_the_one_that_was_named_is_tried_where_a_kind_is_not_counted(self, bench):
        bench.register(first=FakeBackend(devices=("cpu", "cuda")))
        assert bench.load(device="cuda:1").device == "cuda:1"
        assert bench.tried == [("first", "cuda:1")]

    @pytest.mark.parametrize(
        ("outcome", "error"),
        [
            ("raised", DeviceNotAvailableError),
            ("elsewhere", DevicePlacementError),
            ("crashed", BackendRuntimeError),
        ],
    )
    def test_a_named_device_that_fails_it_is_not_replaced(self, bench, outcome, error):
        bench.register(first=FakeBackend(devices=("cpu", "cuda")))
        bench.fails("first", "cuda", outcome, "ran on the CPU", 'Pass device="cpu".')
        with pytest.raises(error, match=r"'cuda'.*'first': ran on the CPU\. Pass device"):
            bench.load(device="cuda")


class TestAnswer:
    WRONG = Verdict(status="failed", kl=3.0, bound=0.02, reason="KL 3.0, at most 0.02 passes")
    PASSED = Verdict(status="passed", kl=0.0, bound=0.02, reason="as it should be")

    def test_wrong_numbers_quarantine_the_device(self, bench, answers):
        bench.register(first=FakeBackend(devices=("cuda", "cpu")))
        answers["cuda"] = self.WRONG
        selection = bench.load()
        assert selection.device == "cpu"
        assert row_of(selection, "first", "cuda").stage == "answer"
        (entry,) = quarantine.entries()
        assert (entry.backend, entry.device, entry.version) == ("first", "cuda", "first 1")

    def test_a_quarantined_device_is_not_chosen_again(self, bench):
        bench.register(first=FakeBackend(devices=("cuda", "cpu")))
        entry = quarantine.add(
            backend="first", device="cuda", version="first 1", driver=None, reason="KL 3.0"
        )
        selection = bench.load(quarantine=(entry,))
        assert selection.device == "cpu"
        assert "KL 3.0" in row_of(selection, "first", "cuda").reason

    def test_a_named_device_is_used_all_the_same_and_the_log_warns(self, bench, answers, caplog):
        bench.register(first=FakeBackend(devices=("cuda", "cpu")))
        answers["cuda"] = self.WRONG
        with caplog.at_level(logging.WARNING, logger="phirt"):
            selection = bench.load(device="cuda")
        assert selection.device == "cuda"
        (note,) = selection.plan.notes
        assert "wrong numbers" in note
        assert note in caplog.text
        assert quarantine.entries() == ()

    def test_where_nothing_is_right_nothing_is_used(self, bench, answers):
        bench.register(first=FakeBackend())
        answers["cpu"] = self.WRONG
        with pytest.raises(BackendRuntimeError, match=r"wrong .*KL 3\.0.*another precision"):
            bench.load()
        assert bench.adapters["first"].model.closed

    def test_wrong_numbers_on_a_cpu_say_nothing_of_other_models(self, bench, answers):
        first, second = FakeBackend(), FakeBackend()
        bench.register(first=first, second=second)
        wrong = iter([self.WRONG])
        answers["cpu"] = lambda: next(wrong, self.PASSED)
        selection = bench.load()
        assert selection.backend == "second"
        assert row_of(selection, "first").stage == "answer"
        assert quarantine.entries() == ()

    @pytest.mark.parametrize("device", ["cuda", "cpu"])
    def test_what_is_known_to_be_wrong_is_not_loaded_again(self, bench, monkeypatch, device):
        first, second = FakeBackend(devices=(device,)), FakeBackend()
        bench.register(first=first, second=second)
        known = {("first", device): self.WRONG}
        monkeypatch.setattr(
            select, "known_verdict", lambda _, place: known.get((place.backend, place.device))
        )
        assert bench.load().backend == "second"
        assert first.seen == []
        assert bench.load(device=device, backend="first").backend == "first"

    def test_a_plan_tells_what_a_load_will_pass_over(self, monkeypatch):
        here = machine(record("first", "cpu"), record("second", "cpu"))
        artifact = replace(ONNX, id="a")
        known = {("a", "first"): self.WRONG}
        monkeypatch.setattr(
            select, "known_verdict", lambda artifact, place: known.get((artifact, place.backend))
        )

        def chosen(device):
            request = PlanRequest(model="a-model", device=device)
            plan = without_wrong(make_plan(here, [artifact], request, formats=ANY), here)
            assert plan.chosen is not None
            return plan.chosen.backend, [row.stage for row in plan.candidates if row.stage]

        assert chosen("auto") == ("second", ["answer"])
        assert chosen("cpu") == ("first", [])
        known.clear()
        assert chosen("auto") == ("first", [])

    def test_what_nobody_can_compare_is_used_and_noted(self, bench, answers):
        bench.register(first=FakeBackend(devices=("cuda",)))
        answers["cuda"] = Verdict(status="unverified", kl=None, bound=None, reason="no canary")
        assert bench.load().plan.notes == ("first on cuda is unverified: no canary",)

    def test_a_runtime_that_fails_at_it_is_passed_over(self, bench, answers):
        bench.register(first=FakeBackend(devices=("cuda", "cpu")))
        answers["cuda"] = BackendRuntimeError("the driver failed")
        assert row_of(bench.load(), "first", "cuda").reason == "the driver failed"


class TestNamed:
    def test_a_named_device_is_never_replaced(self, bench):
        """Strict devices: no silent fall back to the CPU."""
        first = FakeBackend(devices=("cpu",))
        bench.register(first=first)
        with pytest.raises(DeviceNotAvailableError, match=r"^Device 'cuda'.*it offers only cpu"):
            bench.load(device="cuda")
        assert first.seen == []

    def test_a_named_backend_is_never_replaced(self, bench):
        error = OutOfMemoryError("too big")
        other = FakeBackend()
        bench.register(first=other, second=FakeBackend(error=error))
        with pytest.raises(OutOfMemoryError) as caught:
            bench.load(backend="second")
        assert caught.value is error
        assert other.seen == []

    def test_a_named_device_that_rejects_the_model(self, bench):
        bench.register(first=FakeBackend(devices=("cuda:0", "cuda:1"), rejects=True))
        with pytest.raises(DeviceNotAvailableError, match=r"'cuda:1'.*no onnx-genai.*Buy one"):
            bench.load(device="cuda:1")

    def test_the_only_candidates_placement_error_is_raised_as_it_is(self, bench):
        error = DevicePlacementError("3 of 4 nodes ran on the CPU")
        bench.register(first=FakeBackend(devices=("cuda", "cpu"), error=error))
        with pytest.raises(DevicePlacementError) as caught:
            bench.load(device="cuda")
        assert caught.value is error


class TestNothingWorks:
    def test_every_reason_is_told(self, bench):
        bench.register(
            first=FakeBackend(error=BackendNotInstalledError("first is missing")),
            second=FakeBackend(error=BackendNotInstalledError("second is missing")),
        )
        with pytest.raises(BackendError, match=r"first is missing.*second is missing"):
            bench.load()

    def test_a_fault_that_all_find_is_told_once(self, bench):
        def find(candidate):
            raise UnsupportedModelError("a kind that nobody converts")

        bench.register(first=FakeBackend(), second=FakeBackend())
        with pytest.raises(UnsupportedModelError, match=r"^a kind that nobody converts$"):
            bench.load(find=find)

    def test_nobody_reads_this_model(self, bench):
        bench.register(first=FakeBackend(rejects=True))
        with pytest.raises(UnsupportedModelError, match="no onnx-genai on cpu here"):
            bench.load()

    def test_what_the_search_for_forms_said_is_raised(self, bench):
        bench.register(first=FakeBackend())
        bench.refusals["first"] = UnsupportedModelError("it is a checkpoint of another kind")
        with pytest.raises(UnsupportedModelError, match=r"^it is a checkpoint of another kind$"):
            bench.load()

    def test_no_room_anywhere(self, bench):
        bench.register(
            first=FakeBackend(error=OutOfMemoryError("no room in one")),
            second=FakeBackend(error=OutOfMemoryError("no room in two")),
        )
        with pytest.raises(OutOfMemoryError, match=r"no room in one.*no room in two"):
            bench.load()

    def test_of_many_that_do_not_fit_the_message_tells_of_the_closest(self, bench):
        def cramped(plan):
            rows = []
            for row, total in zip(plan.candidates, (900, 500, 700), strict=True):
                need = MemoryNeed(weights=total, kv=0, workspace=0, context=8, free=100)
                rows.append(replace(row, memory=need).rejected("memory", f"It needs {total}."))
            return replace(plan, candidates=tuple(rows))

        bench.register(first=FakeBackend(), second=FakeBackend(), third=FakeBackend())
        with pytest.raises(OutOfMemoryError) as caught:
            bench.load(change=cramped)
        assert "It needs 500. `phirt plan` lists the others." in str(caught.value)
        assert "900" not in str(caught.value)


class TestSettings:
    SPEED = Speed(
        prefill_tokens_per_s=100,
        decode_tokens_per_s=10,
        seconds=1,
        prefill_seconds=0.5,
        setting=Setting(threads=3, spinning=True, pinning=True),
        when="2026-11-22T03:00:00Z",
    )

    def load(self, bench, options):
        def measured(plan):
            first, *rest = plan.candidates
            return replace(plan, candidates=(replace(first, speed=self.SPEED), *rest))

        bench.register(first=FakeBackend())
        bench.load(options=options, change=measured)
        ((_, _, used),) = bench.adapters["first"].seen
        return used

    def test_what_was_measured_best_is_used(self, bench):
        used = self.load(bench, LoadOptions())
        assert (used.threads, used.spinning, used.pinning) == (3, True, True)

    def test_what_the_user_said_goes_before(self, bench):
        used = self.load(bench, LoadOptions(threads=1, spinning=False, pinning=False))
        assert (used.threads, used.spinning, used.pinning) == (1, False, False)
