"""What a plan says of every backend and device, from the record of a machine alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from phirt.devices.machine import BackendRecord, PciDevice, Quarantine, Trial
from phirt.dispatch.measurements import Batch, Measurement, Point, Setting
from phirt.dispatch.plan import Plan, PlanCandidate, PlannedArtifact, PlanRequest
from phirt.dispatch.planner import make_plan
from phirt.dispatch.shape import ModelShape
from phirt.protocols import Accept, Reject
from phirt.types import Optimize
from tests.dispatch import fake_backend
from tests.dispatch.fake_backend import GIB, machine, offer, record

# As the search for forms says it: what each backend would take first.
ONNX = replace(fake_backend.ONNX, backends=("onnxruntime",))
IR = PlannedArtifact(
    format="openvino",
    precision="int8",
    state="here",
    path=Path("ir"),
    kl=0.004,
    backends=("openvino",),
)
CHECKPOINT = PlannedArtifact(format="safetensors", precision="fp32", state="to convert")
FORMS = (ONNX, IR, CHECKPOINT)
CPU = record("onnxruntime", "cpu")


def plan_of(
    *records: BackendRecord, forms: tuple[PlannedArtifact, ...] = FORMS, **given: Any
) -> Plan:
    fields = {name: given.pop(name) for name in ("pci", "quarantine", "free") if name in given}
    more = {
        name: given.pop(name)
        for name in ("measurements", "shape", "accepts", "refusals")
        if name in given
    }
    return make_plan(machine(*records, **fields), forms, PlanRequest(model="m", **given), **more)


def order(plan: Plan) -> list[str]:
    return [each.described for each in plan.candidates if each.status != "rejected"]


def row(plan: Plan, backend: str, device: str = "cpu") -> PlanCandidate:
    (found,) = [e for e in plan.candidates if (e.backend, e.device) == (backend, device)]
    return found


class TestKvPrecision:
    BOTH = (CPU, record("openvino", "cpu"), record("transformers", "cpu"))

    def test_those_that_keep_no_such_cache_are_out(self):
        assert order(plan_of(*self.BOTH, kv_precision="int8")) == [
            "onnxruntime on cpu",
            "openvino on cpu",
        ]
        plan = plan_of(*self.BOTH, kv_precision="fp16")
        assert order(plan) == ["openvino on cpu"]
        assert plan.kv_precision == "fp16"
        out = row(plan, "transformers")
        assert out.stage == "runtime"
        assert out.reason == "it keeps no KV cache in fp16"
        assert out.fix == 'Leave kv_precision at "auto", or name another backend.'

    def test_nor_on_devices_where_nobody_has_it(self):
        plan = plan_of(record("onnxruntime", "cuda", "cpu"), kv_precision="int8")
        assert order(plan) == ["onnxruntime on cpu"]
        assert row(plan, "onnxruntime", "cuda").reason == "it keeps no KV cache in int8 there"
        gpu = plan_of(record("openvino", "gpu", "cpu"), kv_precision="fp16", device="gpu")
        assert order(gpu) == []
        assert row(gpu, "openvino", "gpu").stage == "runtime"

    def test_a_plugin_of_another_machine_keeps_none(self):
        plan = plan_of(CPU, record("theirs", "cpu"), kv_precision="int8")
        assert row(plan, "theirs").reason == "it keeps no KV cache in int8"

    def test_it_is_not_said_of_what_was_not_asked_for(self):
        plan = plan_of(*self.BOTH, kv_precision="fp16", backend="openvino")
        assert row(plan, "onnxruntime").stage == "request"


class TestOrderWithoutMeasurements:
    def test_the_order_of_the_backends_decides_between_equal_devices(self):
        plan = plan_of(CPU, record("openvino", "cpu"), record("transformers", "cpu"))
        assert order(plan) == ["onnxruntime on cpu", "openvino on cpu", "transformers on cpu"]
        assert plan.chosen is plan.candidates[0]
        assert plan.chosen.reason == (
            "not measured: the CPU goes before what may be slower; of the backends there, "
            "onnxruntime comes first"
        )

    @pytest.mark.parametrize(
        "gpu",
        [
            offer("cuda"),
            offer("metal"),
            offer("directml", vendor="amd", discrete=True),
            offer("gpu:1", vendor="nvidia"),
        ],
        ids=lambda gpu: gpu.device,
    )
    def test_a_gpu_of_its_own_goes_before_the_cpu(self, gpu):
        plan = plan_of(record("onnxruntime", "cpu", gpu))
        assert order(plan) == [f"onnxruntime on {gpu.device}", "onnxruntime on cpu"]

    @pytest.mark.parametrize(
        "other",
        [
            offer("gpu", vendor="intel", discrete=False),
            offer("gpu"),
            offer("npu", vendor="intel"),
            offer("webgpu", vendor="nvidia"),
            offer("coreml", vendor="apple"),
            offer("openvino-cpu"),
            offer("cuda", software=True),
        ],
        ids=lambda other: other.device,
    )
    def test_all_else_waits_behind_the_cpu_until_it_is_measured(self, other):
        plan = plan_of(record("onnxruntime", other), record("openvino", "cpu"))
        assert order(plan) == ["openvino on cpu", f"onnxruntime on {other.device}"]
        assert "after the CPU until it is measured" in plan.candidates[1].reason

    def test_a_name_without_a_device_comes_last(self):
        """The wheel with CUDA lists "cuda" on a machine without a graphics card."""
        plan = plan_of(record("onnxruntime", "cuda", "cpu"), pci=())
        assert order(plan) == ["onnxruntime on cpu", "onnxruntime on cuda"]
        assert "neither the system nor the runtime" in plan.candidates[1].reason

    def test_what_chooses_for_itself_is_used_by_name_only(self):
        offers = record("openvino", "cpu", "openvino-auto")
        assert order(plan_of(offers)) == ["openvino on cpu"]
        assert order(plan_of(offers, device="openvino-auto")) == ["openvino on openvino-auto"]

    def test_nor_does_it_where_its_backend_alone_is_named(self):
        plan = plan_of(record("openvino", "cpu", "openvino-auto"), backend="openvino")
        assert order(plan) == ["openvino on cpu"]

    def test_the_reference_is_used_by_name_only(self):
        reference = record("reference", "cpu")
        assert order(plan_of(reference)) == []
        assert order(plan_of(reference, backend="reference")) == ["reference on cpu"]

    def test_a_trial_is_told(self):
        ran = Trial(device="cpu", outcome="ran", reason="KL 0")
        plan = plan_of(replace(CPU, trials=(ran,)))
        assert plan.candidates[0].reason.endswith("a tiny model ran there")


def measured(
    artifact: str, backend: str, *, prefill: float, decode: float, batch: float | None = None
) -> Measurement:
    return Measurement(
        artifact=artifact,
        backend=backend,
        device="cpu",
        version=f"{backend} 1",
        hardware="h",
        setting=Setting(threads=2, spinning=True),
        points=(Point(tokens=100, prefill_s=100 / prefill, decode_s=1 / decode),),
        batch=None if batch is None else Batch(rows=4, step_s=1 / batch),
        when="2026-11-22T03:00:00Z",
    )


class TestMeasured:
    """FACTS of one CPU: one runtime prefills faster, another decodes faster."""

    FORMS = (replace(ONNX, id="o"), replace(IR, id="i"))
    BOTH = (
        measured("o", "onnxruntime", prefill=400, decode=100, batch=20),
        measured("i", "openvino", prefill=1600, decode=75, batch=60),
    )

    @pytest.mark.parametrize(
        ("optimize", "first"),
        [("latency", "onnxruntime"), ("prefill", "openvino"), ("throughput", "openvino")],
    )
    def test_the_workload_decides(self, optimize: Optimize, first):
        records = (CPU, record("openvino", "cpu"))
        plan = plan_of(*records, forms=self.FORMS, measurements=self.BOTH, optimize=optimize)
        assert plan.chosen is not None
        assert plan.chosen.backend == first
        assert plan.chosen.reason.startswith("the fastest that was measured: ")

    def test_what_was_measured_goes_before_what_was_not(self):
        records = (CPU, record("openvino", "cpu"))
        plan = plan_of(*records, forms=self.FORMS, measurements=self.BOTH[1:])
        assert order(plan) == ["openvino on cpu", "onnxruntime on cpu"]

    def test_a_gpu_that_was_not_measured_still_goes_first(self):
        plan = plan_of(
            record("onnxruntime", "cpu", "cuda"), forms=self.FORMS, measurements=self.BOTH
        )
        assert order(plan)[0] == "onnxruntime on cuda"

    def test_what_another_version_did_says_nothing(self):
        plan = plan_of(replace(CPU, version="another"), forms=self.FORMS, measurements=self.BOTH)
        assert plan.candidates[0].speed is None

    def test_the_speed_is_told_with_its_setting(self):
        speed = plan_of(CPU, forms=self.FORMS, measurements=self.BOTH).candidates[0].speed
        assert speed is not None
        assert speed.prefill_tokens_per_s == pytest.approx(400)
        assert speed.decode_tokens_per_s == pytest.approx(100)
        assert speed.setting == Setting(threads=2, spinning=True)


class TestQuality:
    FAST = replace(ONNX, precision="int4", kl=0.4, id="fast", path=Path("fast"))
    GOOD = replace(ONNX, id="good")
    SPEEDS = (
        measured("fast", "onnxruntime", prefill=900, decode=200),
        measured("good", "onnxruntime", prefill=400, decode=100),
    )

    def plan(self, **given: Any) -> Plan:
        return plan_of(CPU, forms=(self.FAST, self.GOOD), measurements=self.SPEEDS, **given)

    def test_worse_numbers_never_go_first_and_the_reason_says_so(self):
        first, second = self.plan().candidates
        assert (first.artifact, second.artifact) == (self.GOOD, self.FAST)
        assert "KL divergence of 0.400" in second.reason
        assert "only where its precision is named" in second.reason

    def test_unless_that_precision_is_named(self):
        assert self.plan(precision="int4").candidates[0].artifact == self.FAST

    def test_a_distance_that_nobody_measured_is_not_trusted_in_4_bits(self):
        unknown = replace(self.FAST, kl=None)
        plan = plan_of(CPU, forms=(unknown, self.GOOD), measurements=self.SPEEDS)
        assert plan.candidates[0].artifact == self.GOOD

    def test_what_is_still_to_be_made_is_no_better_than_what_was_made_alike(self):
        here = replace(ONNX, kl=0.05)
        to_convert = replace(IR, state="to convert", path=None, kl=None)
        plan = plan_of(CPU, record("openvino", "cpu"), forms=(here, to_convert))
        assert order(plan) == ["onnxruntime on cpu", "openvino on cpu"]

    def test_a_small_difference_is_none(self):
        close = replace(self.FAST, kl=0.0139)
        plan = plan_of(CPU, forms=(close, self.GOOD), measurements=self.SPEEDS)
        assert plan.candidates[0].artifact == close

    def test_where_there_is_nothing_better_it_is_used(self):
        assert plan_of(CPU, forms=(self.FAST,)).chosen is not None


class TestRejected:
    @pytest.mark.parametrize("status", ["broken", "no device"])
    def test_what_the_probe_said(self, status):
        told = replace(offer("cpu", status=status), fix="Do this.")
        found = row(plan_of(record("openvino", told)), "openvino")
        assert (found.stage, found.reason, found.fix) == ("runtime", f"cpu is {status}", "Do this.")

    @pytest.mark.parametrize(
        ("backend", "device", "reason", "extra"),
        [
            ("openvino", "auto", "its runtime is not installed", "openvino"),
            ("openvino", "npu", "its runtime is not installed", "openvino"),
            ("onnxruntime", "auto", "its runtime is not installed", "cpu"),
            ("onnxruntime", "coreml", "its runtime is not installed", "cpu"),
            ("onnxruntime", "cuda:1", "its runtime is not installed", "cuda"),
            ("openvino", "cuda", "it is not installed, and would not serve 'cuda' by itself", None),
            (
                "onnxruntime",
                "directml",
                "it is not installed, and would not serve 'directml'",
                None,
            ),
        ],
    )
    def test_what_would_bring_the_device_where_a_runtime_is_missing(
        self, backend, device, reason, extra
    ):
        missing = record(backend, offer("cpu", status="missing"))
        found = row(plan_of(missing, device=device), backend, "cpu" if device == "auto" else device)
        assert found.stage == "runtime"
        assert found.reason.startswith(reason)
        assert found.fix == (extra and f'python -m pip install "phirt[{extra}]"')

    def test_what_has_no_version_for_the_processor(self):
        missing = record("openvino", offer("cpu", status="missing"))
        here = machine(missing)
        windows = replace(here, system="windows", cpu=replace(here.cpu, architecture="arm64"))
        (found,) = make_plan(windows, FORMS, PlanRequest(model="m")).candidates
        assert (found.reason, found.fix) == ("it has no version for Windows on arm64", None)

    def test_a_plugin_knows_what_it_needs(self):
        told = replace(offer("cpu", status="missing"), fix="Install zeta.")
        found = row(plan_of(record("zeta", told), backend="zeta"), "zeta")
        assert (found.reason, found.fix) == ("cpu is missing", "Install zeta.")

    @pytest.mark.parametrize("outcome", ["crashed", "raised", "timed out"])
    def test_a_runtime_that_could_not_be_asked(self, outcome):
        crashed = record("openvino", outcome=outcome, reason="died of SIGILL", fix="Update it.")
        found = row(plan_of(crashed), "openvino")
        assert (found.stage, found.reason, found.fix) == ("runtime", "died of SIGILL", "Update it.")

    @pytest.mark.parametrize(
        "outcome", ["raised", "elsewhere", "wrong numbers", "crashed", "timed out", "no device"]
    )
    def test_a_trial_that_failed(self, outcome):
        trial = Trial(device="cpu", outcome=outcome, reason="it did not work", fix="Mend it.")
        found = row(plan_of(replace(CPU, trials=(trial,))), "onnxruntime")
        assert (found.stage, found.reason, found.fix) == ("device", "it did not work", "Mend it.")

    def test_a_quarantined_device_until_its_driver_changes(self):
        entry = Quarantine(
            backend="onnxruntime",
            device="cuda",
            version="onnxruntime 1",
            driver="550",
            reason="KL 3",
            when="2026-11-22T03:00:00Z",
        )
        for driver, status in (("550", "rejected"), ("560", "chosen")):
            listed = record("onnxruntime", offer("cuda", driver=driver))
            found = row(plan_of(listed, quarantine=(entry,)), "onnxruntime", "cuda")
            assert found.status == status

    def test_a_form_that_the_backend_does_not_read(self):
        found = row(plan_of(CPU, forms=(IR,)), "onnxruntime")
        assert found.reason == "it reads onnx-genai or onnx, and the model is there as openvino"
        assert found.stage == "model"

    def test_a_form_for_another_device(self):
        found = row(plan_of(CPU, forms=(replace(ONNX, devices=("cuda",)),)), "onnxruntime")
        assert found.reason.endswith("the model is there as onnx-genai for cuda")

    def test_why_there_is_no_form_where_that_is_known(self):
        refusals = {"onnxruntime": "its architecture is not supported"}
        found = row(plan_of(CPU, forms=(IR,), refusals=refusals), "onnxruntime")
        assert found.reason == "its architecture is not supported"

    def test_what_the_adapter_says(self):
        def accepts(artifact, backend, device):
            return Reject("no such decoder.", "Take another.") if backend == "mlx" else Accept()

        forms = (replace(CHECKPOINT, state="here", path=Path("s")),)
        plan = plan_of(
            record("mlx", "cpu"), record("transformers", "cpu"), forms=forms, accepts=accepts
        )
        found = row(plan, "mlx")
        assert (found.stage, found.reason, found.fix) == (
            "model",
            "no such decoder",
            "Take another.",
        )
        assert row(plan, "transformers").status == "chosen"

    def test_auto_does_not_fetch_what_is_here_in_another_form(self):
        fetched = replace(IR, state="to fetch", path=None)
        plan = plan_of(CPU, record("openvino", "cpu"), forms=(ONNX, fetched))
        held = [e for e in plan.candidates if e.artifact == fetched]
        assert order(plan)[0] == "onnxruntime on cpu"
        assert all(e.status == "usable" or "is here as" in e.reason for e in held)


class TestWhatIsAllToBeDownloaded:
    INT4 = replace(ONNX, state="to fetch", path=None, precision="int4", kl=None)
    BF16 = replace(CHECKPOINT, state="to fetch", precision="bf16", backends=("transformers",))

    def plan_of(self, **request):
        forms = (self.INT4, self.BF16)
        return plan_of(CPU, record("transformers", "cpu"), forms=forms, **request)

    def test_the_build_for_the_first_backend_is_taken_and_what_it_costs_is_said(self):
        plan = self.plan_of()
        assert order(plan) == ["onnxruntime on cpu", "transformers on cpu"]
        assert (
            "its weights are int4, and nobody measured what that costs"
            in row(plan, "onnxruntime").reason
        )

    def test_what_is_named_needs_no_excuse(self):
        plan = self.plan_of(precision="int4")
        assert "nobody measured" not in row(plan, "onnxruntime").reason


class TestMemory:
    SHAPE = ModelShape(
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_size=128,
        hidden_size=4096,
        intermediate_size=11008,
        vocab_size=32000,
        context_length=8192,
        num_weights=7_000_000_000,
    )

    def test_what_does_not_fit_is_refused_with_the_numbers(self):
        large = replace(ONNX, bytes=7 * GIB)
        found = row(plan_of(CPU, forms=(large,), shape=self.SHAPE, free=4 * GIB), "onnxruntime")
        assert (found.status, found.stage) == ("rejected", "memory")
        assert found.memory is not None
        assert not found.memory.fits
        assert "2,048 tokens" in found.reason or "2048 tokens" in found.reason

    def test_what_fits_says_what_it_takes(self):
        need = row(
            plan_of(CPU, forms=(replace(ONNX, bytes=GIB),), shape=self.SHAPE), "onnxruntime"
        ).memory
        assert need is not None
        assert need.weights >= GIB
        assert need.kv > 0
        assert need.free == 16 * GIB

    def test_a_form_that_is_still_to_be_made_is_reckoned_from_its_precision(self):
        wanted = replace(ONNX, state="to convert", path=None)
        found = row(plan_of(CPU, forms=(wanted,), shape=self.SHAPE), "onnxruntime")
        assert found.memory is not None
        assert found.memory.weights > 6 * GIB

    def test_a_graphics_card_has_memory_of_its_own(self):
        card = offer("cuda", discrete=True, memory_bytes=24 * GIB)
        found = row(
            plan_of(
                record("onnxruntime", card), forms=(replace(ONNX, bytes=GIB),), shape=self.SHAPE
            ),
            "onnxruntime",
            "cuda",
        )
        assert found.memory is not None
        assert found.memory.free == 24 * GIB


class TestNamed:
    def test_only_the_named_backends_rows_are_candidates(self):
        plan = plan_of(CPU, record("openvino", "cpu"), backend="openvino")
        assert order(plan) == ["openvino on cpu"]
        assert row(plan, "onnxruntime").reason == "backend 'openvino' was asked for"

    def test_only_the_named_devices_rows_are_candidates(self):
        plan = plan_of(record("onnxruntime", "cpu", "cuda:0", "cuda:1"), device="cuda:1")
        assert order(plan) == ["onnxruntime on cuda:1"]
        assert row(plan, "onnxruntime").reason == "device 'cuda:1' was asked for"

    def test_a_kind_is_listed_without_numbers(self):
        """onnxruntime says "cuda": whether there is a second one shows at the load."""
        assert order(plan_of(record("onnxruntime", "cpu", "cuda"), device="cuda:1")) == [
            "onnxruntime on cuda:1"
        ]

    def test_a_device_that_the_backend_does_not_offer(self):
        found = row(plan_of(CPU, device="cuda"), "onnxruntime", "cuda")
        assert (found.stage, found.status) == ("runtime", "rejected")
        assert found.reason == "it offers only cpu"

    def test_what_would_let_an_installed_runtime_offer_it(self):
        wheels = {"onnxruntime": "1.31.1"}
        here = machine(CPU, record("openvino", "cpu"), distributions=wheels)
        plan = make_plan(here, FORMS, PlanRequest(model="m", device="cuda"))
        rows = [each.fix for each in plan.candidates if each.stage == "runtime"]
        assert rows == [
            'python -m pip uninstall -y onnxruntime && python -m pip install "phirt[cuda]"',
            'Pass one of these, or device="auto".',
        ]

    def test_a_runtime_that_looked_and_found_none_is_quoted_once(self):
        listed = record("openvino", "cpu", offer("gpu", status="no device"))
        found = row(plan_of(listed, device="gpu"), "openvino", "gpu")
        assert found.reason == "gpu is no device"

    @pytest.mark.parametrize("backend", ["auto", "onnxruntime"])
    def test_a_named_device_may_be_used_though_it_computed_wrong_numbers(self, backend):
        wrong = Trial(device="cuda", outcome="wrong numbers", reason="KL 3")
        listed = replace(record("onnxruntime", "cpu", "cuda"), trials=(wrong,))
        assert row(plan_of(listed, backend=backend), "onnxruntime", "cuda").status == "rejected"
        named = row(plan_of(listed, backend=backend, device="cuda"), "onnxruntime", "cuda")
        assert named.status == "chosen"
        assert named.reason.startswith("KL 3 (it was named, so it may be used)")

    def test_a_malformed_device(self):
        with pytest.raises(ValueError, match="not a device name"):
            plan_of(CPU, device="cuda:")


def test_what_could_not_be_asked_is_a_candidate_of_which_nothing_is_known():
    unknown = record("openvino", outcome="not run", reason="no process could be started")
    found = row(plan_of(unknown), "openvino")
    assert found.status == "chosen"
    assert "nothing is known of it yet: no process could be started" in found.reason


def test_a_plan_as_json_is_all_of_it():
    forms = (replace(ONNX, bytes=GIB),)
    plan = plan_of(CPU, forms=forms, shape=TestMemory.SHAPE, pci=(PciDevice(kind="gpu"),))
    document = json.loads(json.dumps(plan.to_json()))
    (candidate,) = document["candidates"]
    assert candidate["status"] == "chosen"
    assert candidate["artifact"]["path"] == "somewhere"
    need = plan.candidates[0].memory
    assert need is not None
    assert candidate["memory"]["total"] == need.total
    assert candidate["memory"]["fits"] is True
