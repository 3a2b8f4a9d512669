"""One physical device is one device, whatever the runtimes call it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from phirt.devices.machine import BackendRecord, PciDevice, Quarantine, Trial
from phirt.devices.merge import devices_of, to_try
from phirt.types import Availability, Hardware
from tests.devices.machines import (
    ASPEED,
    INTEL,
    NPU,
    NVIDIA,
    listed,
    make_machine,
    missing,
    names,
    offer,
    ran,
    row_of,
    rows,
)

UUID = "6d1bb8ad6b0c4cbd9c9a6f8c7a1d5e2f"
UUIDS = (UUID, UUID[::-1])
LUID = "000000000000c6f2"


class TestIdentity:
    def test_a_pci_address_joins_the_names_of_all_runtimes_and_the_system(self):
        here = {"name": "NVIDIA GeForce RTX 4090", "pci": "0000:01:00.0", "memory_bytes": 24 << 30}
        machine = make_machine(
            listed("onnxruntime", offer("cuda:0", "CUDA 0", **here)),
            listed("transformers", offer("cuda:0", "cuda:0", **here)),
            listed("openvino", offer("gpu", "GPU.0", pci="0000:00:02.0", vendor="intel")),
            pci=(INTEL, NVIDIA),
        )
        _, intel, nvidia = devices_of(machine)
        assert nvidia.name == "NVIDIA GeForce RTX 4090"
        assert nvidia.memory_bytes == 24 << 30
        assert nvidia.driver == "nvidia 570.1"
        assert [row.native for row in nvidia.backends] == ["CUDA 0", "cuda:0"]
        assert row_of(intel, "openvino").native == "GPU.0"

    @pytest.mark.parametrize("key", [{"luid": LUID}, {"uuid": UUID}])
    def test_so_does_a_luid_or_a_uuid(self, key):
        machine = make_machine(
            listed("onnxruntime", offer("directml:1", "DirectML 1", **key)),
            listed("openvino", offer("gpu:0", "GPU.0", **key)),
            system="windows",
        )
        _, gpu = devices_of(machine)
        assert rows(gpu) == [
            ("onnxruntime", "directml:1", "unverified"),
            ("openvino", "gpu:0", "unverified"),
        ]

    def test_one_runtime_that_knows_both_keys_joins_two_that_know_one_each(self):
        machine = make_machine(
            listed("onnxruntime", offer("directml", "DML 0", luid=LUID)),
            listed("transformers", offer("gpu", "xpu:0", uuid=UUID)),
            listed("openvino", offer("gpu", "GPU", uuid=UUID, luid=LUID)),
            system="windows",
        )
        assert len(devices_of(machine)) == 2

    def test_zeros_identify_nothing(self):
        nothing = {"uuid": "0" * 32, "luid": "0" * 16}
        machine = make_machine(
            listed("openvino", *(offer(f"gpu:{n}", f"GPU.{n}", **nothing) for n in (0, 1))),
            pci=(INTEL, replace(INTEL, pci="0000:03:00.0", name="Arc A770")),
        )
        assert names(devices_of(machine)) == ["Test CPU", "Iris Xe Graphics", "Arc A770"]

    def test_two_equal_cards_are_two_devices(self):
        cards = [
            offer(f"cuda:{n}", f"CUDA {n}", name="RTX 4090", pci=f"0000:0{n + 1}:00.0")
            for n in (0, 1)
        ]
        machine = make_machine(
            listed("onnxruntime", *cards),
            listed("transformers", *reversed(cards)),
            pci=(NVIDIA, replace(NVIDIA, pci="0000:02:00.0")),
        )
        _, first, second = devices_of(machine)
        assert {row.device for row in first.backends} == {"cuda:0"}
        assert {row.device for row in second.backends} == {"cuda:1"}

    def test_the_system_counts_otherwise_than_cuda(self):
        one, other = NVIDIA, replace(NVIDIA, pci="0000:02:00.0")
        first, second = devices_of(
            make_machine(
                # It tells no address, and would be guessed at by the order of the devices.
                listed(
                    "onnxruntime", *(offer(f"cuda:{n}", f"CUDA {n}", uuid=UUIDS[n]) for n in (0, 1))
                ),
                listed(
                    "transformers",
                    offer("cuda:0", "cuda:0", uuid=UUIDS[0], pci=other.pci),
                    offer("cuda:1", "cuda:1", uuid=UUIDS[1], pci=one.pci),
                ),
                listed("mlx", offer("cuda:0", "gpu, 0"), offer("cuda:1", "gpu, 1")),
                pci=(one, other),
            )
        )[1:]
        assert [row.device for row in first.backends] == ["cuda:1"] * 3
        assert [row.device for row in second.backends] == ["cuda:0"] * 3

    def test_two_addresses_are_two_devices_though_a_driver_gives_both_one_uuid(self):
        cards = [replace(INTEL, pci=f"0000:0{n}:00.0") for n in (3, 4)]
        found = devices_of(
            make_machine(
                listed(
                    "openvino",
                    *(
                        offer(f"gpu:{n}", f"GPU.{n}", uuid=UUIDS[0], pci=cards[n].pci)
                        for n in (0, 1)
                    ),
                ),
                listed(
                    "transformers", *(offer(f"gpu:{n}", f"xpu:{n}", uuid=UUIDS[0]) for n in (0, 1))
                ),
                pci=tuple(cards),
            )
        )[1:]
        assert [[row.device for row in device.backends if row.native] for device in found] == [
            ["gpu:0", "gpu:0"],
            ["gpu:1", "gpu:1"],
        ]

    def test_a_slice_of_a_device_is_a_row_of_it(self):
        slices = [
            offer(f"cuda:{n}", f"CUDA {n}", pci="0000:01:00.0", uuid=f"{n + 1}" * 32)
            for n in (0, 1)
        ]
        machine = make_machine(listed("onnxruntime", *slices), pci=(NVIDIA,))
        _, gpu = devices_of(machine)
        assert [row.device for row in gpu.backends] == ["cuda:0", "cuda:1"]


class TestWithoutIdentity:
    def test_the_name_decides(self):
        # Windows' registry has names, and neither addresses nor LUIDs.
        cards = (
            PciDevice(kind="gpu", vendor="intel", name="Intel(R) Arc(TM) A770 Graphics"),
            PciDevice(kind="gpu", vendor="nvidia", name="NVIDIA GeForce RTX 4090"),
        )
        machine = make_machine(
            listed("onnxruntime", offer("directml", "DML 0", name=cards[1].name, luid=LUID)),
            listed("openvino", offer("gpu", "GPU", name="Intel(R) Arc(TM) A770 Graphics (dGPU)")),
            system="windows",
            pci=cards,
        )
        _, intel, nvidia = devices_of(machine)
        assert row_of(nvidia, "onnxruntime").native == "DML 0"
        assert row_of(intel, "openvino").native == "GPU"

    def test_then_the_maker_and_the_number(self):
        machine = make_machine(
            listed("onnxruntime", offer("cuda")),
            listed("onnxruntime-genai", offer("cuda:1")),
            listed("openvino", offer("gpu")),
            pci=(INTEL, NVIDIA, replace(NVIDIA, pci="0000:02:00.0")),
        )
        _, intel, first, second = devices_of(machine)
        assert row_of(first, "onnxruntime").device == "cuda"
        assert row_of(second, "onnxruntime-genai").device == "cuda:1"
        assert row_of(intel, "openvino").device == "gpu"

    def test_then_the_device_name(self):
        # A Mac in a container of which the system tells nothing.
        machine = make_machine(
            listed("mlx", offer("metal")), listed("transformers", offer("metal")), system="macos"
        )
        _, gpu = devices_of(machine)
        assert rows(gpu) == [
            ("mlx", "metal", "unverified"),
            ("transformers", "metal", "unverified"),
        ]

    def test_a_name_beside_its_numbered_self_is_one_row(self):
        machine = make_machine(
            listed("transformers", offer("cuda"), offer("cuda:0"), offer("cuda:1")),
            pci=(NVIDIA, replace(NVIDIA, pci="0000:02:00.0")),
        )
        _, first, second = devices_of(machine)
        assert rows(first) == [("transformers", "cuda:0", "unverified")]
        assert rows(second) == [("transformers", "cuda:1", "unverified")]

    def test_what_is_computed_on_the_cpu_is_no_name_of_a_real_gpu(self):
        software = offer("webgpu", "WebGPU", name="SwiftShader Device", software=True)
        machine = make_machine(listed("onnxruntime", software), pci=(NVIDIA,))
        _, real, swiftshader = devices_of(machine)
        assert not real.software
        assert swiftshader.software
        assert swiftshader.name == "SwiftShader Device"
        assert rows(swiftshader) == [("onnxruntime", "webgpu", "unverified")]


class TestCpu:
    def test_the_cpu_is_one_device_with_every_backend(self):
        machine = make_machine(
            listed("onnxruntime", offer("cpu"), offer("openvino-cpu")),
            listed("openvino", offer("cpu"), offer("openvino-auto")),
            missing("mlx"),
            listed("reference", Availability("cpu", "ran", "NumPy 2")),
        )
        (cpu,) = devices_of(machine)
        assert (cpu.device, cpu.name, cpu.memory_bytes) == ("cpu", "Test CPU", 32_000_000_000)
        assert rows(cpu) == [
            ("onnxruntime", "cpu", "unverified"),
            ("onnxruntime", "openvino-cpu", "unverified"),
            ("openvino", "cpu", "unverified"),
            ("mlx", "cpu", "missing"),
            ("reference", "cpu", "ready"),
        ]
        assert row_of(cpu, "mlx").fix == 'python -m pip install "phirt[mlx]"'

    def test_no_command_installs_what_a_system_does_not_have(self):
        (cpu,) = devices_of(make_machine(missing("mlx"), system="windows"))
        assert row_of(cpu, "mlx").reason == "It has no version for Windows on x86_64."
        assert row_of(cpu, "mlx").fix is None


class TestStatus:
    @pytest.mark.parametrize(
        ("status", "said", "shown"),
        [
            ("found", "fake 1: not tried", ("unverified", "nothing was run there: fake 1.")),
            ("found", "fake 1", ("unverified", "nothing was run there: fake 1.")),
            ("ran", "fake 1", ("ready", "It ran something there: fake 1.")),
        ],
    )
    def test_without_one_it_is_a_sentence_what_the_runtime_said(self, status, said, shown):
        record = listed("fake", Availability("cpu", status, said))
        row = row_of(devices_of(make_machine(record))[0], "fake")
        assert row.status == shown[0]
        assert row.reason.endswith(shown[1])

    @pytest.mark.parametrize(
        ("outcome", "status"),
        [
            ("ran", "ready"),
            ("raised", "broken"),
            ("elsewhere", "broken"),
            ("wrong numbers", "broken"),
            ("crashed", "broken"),
            ("timed out", "broken"),
            ("no device", "no-device"),
            ("not run", "unverified"),
        ],
    )
    def test_a_trial_decides(self, outcome, status):
        trial = Trial(device="cpu", outcome=outcome, reason="Seen.", fix="Mend it.")
        (cpu,) = devices_of(make_machine(listed("openvino", offer("cpu"), trials=(trial,))))
        row = row_of(cpu, "openvino")
        assert (row.status, row.reason, row.fix) == (status, "Seen.", "Mend it.")

    @pytest.mark.parametrize("outcome", ["raised", "crashed", "timed out"])
    def test_a_runtime_that_does_not_answer_is_broken_wherever_it_could_serve(self, outcome):
        record = BackendRecord(backend="openvino", outcome=outcome, reason="Seen.", fix="Mend it.")
        cpu, intel = devices_of(make_machine(record, pci=(INTEL,)))
        for device in (cpu, intel):
            row = row_of(device, "openvino")
            assert (row.status, row.reason, row.fix) == ("broken", "Seen.", "Mend it.")

    def test_a_plugin_that_does_not_answer_is_broken_on_the_cpu(self):
        record = BackendRecord(backend="mine", outcome="crashed", reason="Seen.")
        (cpu,) = devices_of(make_machine(record, pci=(INTEL,)))
        assert rows(cpu) == [("mine", "cpu", "broken")]

    def test_quarantine_outweighs_a_trial_until_a_version_changes(self):
        hardware = Hardware(native="CUDA 0", driver="570.1", pci="0000:01:00.0")
        seen = Availability("cuda:0", "found", "seen", hardware=hardware)
        record = listed("onnxruntime", seen, trials=(ran("cuda:0"),))
        entry = Quarantine(
            backend="onnxruntime",
            device="cuda:0",
            version="onnxruntime 1.0",
            driver="570.1",
            reason="KL 3.",
            when="2026-11-22T03:00:00Z",
        )

        def status(entry: Quarantine) -> str:
            _, gpu = devices_of(make_machine(record, pci=(NVIDIA,), quarantine=(entry,)))
            return row_of(gpu, "onnxruntime").status

        assert status(entry) == "broken"
        assert status(replace(entry, driver="571.0")) == "ready"
        assert status(replace(entry, version="onnxruntime 1.1")) == "ready"

    def test_the_reason_of_a_quarantine_has_the_driver(self):
        entry = Quarantine(
            backend="openvino",
            device="cpu",
            version="openvino 1.0",
            driver=None,
            reason="KL 3.",
            when="2026-11-22T03:00:00Z",
        )
        record = listed("openvino", offer("cpu"))
        (cpu,) = devices_of(make_machine(record, quarantine=(entry,)))
        assert row_of(cpu, "openvino").reason == "Quarantined since 2026-11-22T03:00:00Z: KL 3."


class TestWhatNoRuntimeSees:
    def test_a_gpu_without_a_runtime_says_what_to_install(self):
        machine = make_machine(
            missing("onnxruntime"), missing("onnxruntime-genai"), missing("openvino"), pci=(NVIDIA,)
        )
        _, gpu = devices_of(machine)
        assert (gpu.device, gpu.name, gpu.driver) == ("cuda", "GeForce RTX 4090", "nvidia 570.1")
        assert rows(gpu) == [
            ("onnxruntime", "cuda", "missing"),
            ("onnxruntime-genai", "cuda", "missing"),
        ]
        assert row_of(gpu, "onnxruntime").fix == 'python -m pip install "phirt[cuda]"'

    def test_a_wheel_for_the_cpu_must_go_before_the_one_for_the_gpu_comes(self):
        machine = make_machine(
            listed("onnxruntime", offer("cpu")),
            pci=(NVIDIA,),
            distributions={"onnxruntime": "1.31.1"},
        )
        _, gpu = devices_of(machine)
        row = row_of(gpu, "onnxruntime")
        assert (row.status, row.device) == ("missing", "cuda")
        assert row.fix == (
            'python -m pip uninstall -y onnxruntime && python -m pip install "phirt[cuda]"'
        )

    def test_a_runtime_that_is_there_and_does_not_see_it_needs_a_driver(self):
        machine = make_machine(
            listed("openvino", offer("cpu")), pci=(INTEL, NPU), distributions={"openvino": "2026.4"}
        )
        _, gpu, npu = devices_of(machine)
        assert row_of(gpu, "openvino").status == "no-device"
        assert "intel-opencl-icd" in (row_of(gpu, "openvino").fix or "")
        assert (npu.kind, npu.device) == ("npu", "npu")
        assert "NPU driver" in (row_of(npu, "openvino").fix or "")

    def test_a_torch_for_the_cpu_is_not_one_for_cuda(self):
        def row(version: str) -> str:
            machine = make_machine(
                listed("transformers", offer("cpu")),
                pci=(NVIDIA,),
                distributions={"torch": version},
            )
            return row_of(devices_of(machine)[1], "transformers").status

        assert row("2.13.0+cpu") == "missing"
        assert row("2.13.0") == "no-device"

    def test_a_display_controller_that_computes_nothing_is_no_device(self):
        machine = make_machine(missing("openvino"), pci=(ASPEED,))
        assert names(devices_of(machine)) == ["Test CPU"]

    @pytest.mark.parametrize("fix", [None, "Mend it."])
    def test_a_runtime_that_says_that_it_finds_none_is_asked_first(self, fix):
        found = Availability("gpu", "no device", "Its OpenCL driver is not there.", fix)
        machine = make_machine(listed("openvino", offer("cpu"), found), pci=(INTEL,))
        row = row_of(devices_of(machine)[1], "openvino")
        assert (row.status, row.reason) == ("no-device", "Its OpenCL driver is not there.")
        assert row.fix == fix or "intel-opencl-icd" in (row.fix or "")

    def test_what_neither_the_system_nor_a_runtime_sees_is_no_device(self):
        trial = Trial(device="cuda", outcome="no device", reason="No CUDA device is found.")
        machine = make_machine(
            listed("onnxruntime", offer("cpu"), offer("cuda"), trials=(trial,)),
            listed("openvino", offer("cpu"), Availability("npu", "no device", "None.")),
        )
        assert names(devices_of(machine)) == ["Test CPU"]

    def test_a_provider_that_fails_is_shown_where_the_system_sees_nothing(self):
        # A container, in which there is no /sys/bus/pci.
        found = Availability("cuda", "broken", "libcudnn.so.9 is missing.")
        machine = make_machine(listed("onnxruntime", offer("cpu"), found))
        _, gpu = devices_of(machine)
        assert (gpu.name, rows(gpu)) == ("CUDA GPU", [("onnxruntime", "cuda", "broken")])


class TestOrder:
    def test_the_preferred_name_is_of_what_works(self):
        here = {"pci": "0000:01:00.0"}
        machine = make_machine(
            listed("onnxruntime", offer("webgpu", "WebGPU", **here)),
            listed("transformers", offer("cuda:0", "cuda:0", **here), trials=(ran("cuda:0"),)),
            pci=(NVIDIA,),
        )
        assert [device.device for device in devices_of(machine)] == ["cpu", "cuda:0"]

    def test_gpus_come_before_npus_and_software_last(self):
        software = offer("webgpu", "WebGPU", name="SwiftShader", software=True)
        machine = make_machine(
            listed("onnxruntime", software), missing("openvino"), pci=(NPU, INTEL)
        )
        kinds = [(device.kind, device.software) for device in devices_of(machine)]
        assert kinds == [("cpu", False), ("gpu", False), ("npu", False), ("gpu", True)]


def test_what_is_worth_a_trial():
    record = listed(
        "transformers",
        offer("cpu"),
        offer("cuda"),
        offer("cuda:0"),
        offer("cuda:1"),
        offer("openvino-auto"),
        Availability("gpu", "missing", "is not there"),
        Availability("npu", "ran", "has been tried by its probe"),
        trials=(ran("cuda:1"),),
    )
    assert to_try(record) == ["cpu", "cuda:0"]
