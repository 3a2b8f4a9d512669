"""What each probe says of hardware that is not here, from doubles of what the runtimes return.

The values are in the form that each runtime gives them in: onnxruntime's
core/platform/*/device_discovery.cc, OpenVINO's properties.hpp, torch's and MLX's properties.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from phirt.backends import ort_devices, ort_plugins
from phirt.backends.mlx.listing import list_devices as list_mlx
from phirt.backends.onnxruntime import providers
from phirt.backends.onnxruntime.listing import list_devices as list_onnxruntime
from phirt.backends.openvino.listing import list_devices as list_openvino
from phirt.backends.probing import disposable_process
from phirt.backends.transformers import listing as torch_listing
from phirt.errors import BackendBrokenError, DeviceNotAvailableError
from phirt.types import Availability, Hardware

UUID = "6d1bb8ad4c2e8a3f9d100123456789ab"


def by_device(entries: list[Availability]) -> dict[str, Availability]:
    return {entry.device: entry for entry in entries}


def ep_device(
    provider: str,
    kind: str,
    *,
    vendor_id: int = 0,
    vendor: str = "",
    metadata: Mapping[str, str] | None = None,
    options: Mapping[str, str] | None = None,
) -> Any:
    """An ``OrtEpDevice``."""
    hardware = SimpleNamespace(
        type=SimpleNamespace(name=kind),
        vendor_id=vendor_id,
        vendor=vendor,
        metadata=metadata or {},
    )
    return SimpleNamespace(
        ep_name=provider, ep_options=options or {}, ep_metadata={}, device=hardware
    )


def onnxruntime(built_in: list[str], devices: list[Any] | None = None) -> Any:
    return SimpleNamespace(
        __version__="1.31.1",
        get_available_providers=lambda: built_in,
        get_ep_devices=lambda: devices or [],
    )


class TestOnnxRuntime:
    @pytest.fixture(autouse=True)
    def _no_plugins(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(providers, "_is_installed", lambda module: False)
        monkeypatch.setattr(providers, "_module_names", list)
        for variable in ("VK_DRIVER_FILES", "VK_ICD_FILENAMES", "VK_ADD_DRIVER_FILES"):
            monkeypatch.delenv(variable, raising=False)

    def test_directml_has_the_numbers_of_dxgi(self) -> None:
        """As it lists a laptop: an integrated GPU, and a discrete one with number 1."""
        integrated = ep_device(
            "DmlExecutionProvider",
            "GPU",
            vendor_id=0x8086,
            metadata={
                "Description": "Intel(R) Iris(R) Xe Graphics  ",
                "LUID": str(0xD3A7),
                "DxgiAdapterNumber": "0",
                "DxgiVideoMemory": "128 MB",
                "Discrete": "0",
            },
            options={"device_id": "0"},
        )
        discrete = ep_device(
            "DmlExecutionProvider",
            "GPU",
            vendor_id=0x10DE,
            metadata={
                "Description": "NVIDIA GeForce RTX 4060 Laptop GPU",
                "LUID": str(0x1_0000_E01C),
                "DxgiAdapterNumber": "1",
                "DxgiVideoMemory": "7957 MB",
                "Discrete": "1",
            },
            options={"device_id": "1"},
        )
        ort = onnxruntime(["DmlExecutionProvider"], [discrete, integrated])
        found = by_device(list_onnxruntime(ort))
        assert list(found) == ["directml:0", "directml:1"]
        assert found["directml:0"].hardware == Hardware(
            native="Dml 0",
            name="Intel(R) Iris(R) Xe Graphics",
            vendor="intel",
            memory_bytes=128 << 20,
            luid="000000000000d3a7",
            discrete=False,
        )
        assert found["directml:1"].hardware == Hardware(
            native="Dml 1",
            name="NVIDIA GeForce RTX 4060 Laptop GPU",
            vendor="nvidia",
            memory_bytes=7957 << 20,
            luid="000000010000e01c",
            discrete=True,
        )
        assert found["directml:1"].version == "onnxruntime 1.31.1"

    def test_one_device_has_no_number_unless_it_is_not_the_first(self) -> None:
        for number, name in (("0", "directml"), ("1", "directml:1")):
            device = ep_device("DmlExecutionProvider", "GPU", options={"device_id": number})
            [entry] = list_onnxruntime(onnxruntime(["DmlExecutionProvider"], [device]))
            assert (entry.device, entry.status) == (name, "found")

    def test_webgpu_on_linux(self) -> None:
        metadata = {"card_idx": "0", "Discrete": "1", "pci_bus_id": "0000:C1:00.0"}
        device = ep_device("WebGpuExecutionProvider", "GPU", vendor_id=0x1002, metadata=metadata)
        [entry] = list_onnxruntime(onnxruntime(["WebGpuExecutionProvider"], [device]))
        assert (entry.device, entry.status) == ("webgpu", "found")
        assert entry.hardware == Hardware(
            native="WebGpu 0", vendor="amd", pci="0000:c1:00.0", discrete=True
        )

    @pytest.mark.parametrize("provider", ["DmlExecutionProvider", "WebGpuExecutionProvider"])
    def test_a_provider_without_a_gpu(self, provider: str) -> None:
        cpu = ep_device("CPUExecutionProvider", "CPU", vendor_id=0x1022, vendor="AMD")
        found = list_onnxruntime(onnxruntime([provider, "CPUExecutionProvider"], [cpu]))
        assert [(entry.device, entry.status) for entry in found if entry.device != "cpu"] == [
            (found[1].device, "no device")
        ]
        assert found[0].hardware == Hardware(native="CPU", vendor="amd")

    def test_webgpu_with_a_driver_in_software(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("VK_DRIVER_FILES", "/usr/lib/chromium/vk_swiftshader_icd.json")
        [entry] = list_onnxruntime(onnxruntime(["WebGpuExecutionProvider"]))
        assert (entry.status, entry.hardware) == (
            "found",
            Hardware(native="WebGpu", software=True),
        )

    def test_a_device_whose_texts_fail(self) -> None:
        device = ep_device("WebGpuExecutionProvider", "GPU", metadata={"Description": "x"})
        device.device.metadata = None
        [entry] = list_onnxruntime(onnxruntime(["WebGpuExecutionProvider"], [device]))
        assert (entry.status, entry.hardware) == ("found", Hardware(native="WebGpu 0"))

    def test_an_onnxruntime_that_lists_nothing(self) -> None:
        """Before 1.23, or where reading the system's devices fails."""

        def fail() -> None:
            raise RuntimeError("GPU device discovery failed")

        ort = onnxruntime(["CPUExecutionProvider"])
        ort.get_ep_devices = fail
        [entry] = list_onnxruntime(ort)
        assert (entry.status, entry.hardware) == ("found", Hardware(native="CPU"))

    @pytest.fixture
    def driver(self, monkeypatch: pytest.MonkeyPatch) -> list[Hardware]:
        """NVIDIA's driver is installed, and lists this."""
        cards: list[Hardware] = []
        monkeypatch.setattr(ort_devices, "open_driver", lambda: cards)
        monkeypatch.setattr(ort_devices, "cuda_devices", list)
        return cards

    def test_cuda_is_what_the_driver_lists(self, driver: list[Hardware]) -> None:
        driver += [Hardware(native=f"CUDA {n}", pci=f"0000:0{n}:00.0") for n in range(2)]
        with disposable_process():
            found = list_onnxruntime(onnxruntime(["CUDAExecutionProvider"]))
        assert [(entry.device, entry.hardware) for entry in found] == [
            ("cuda:0", driver[0]),
            ("cuda:1", driver[1]),
        ]

    def test_in_an_application_the_driver_is_not_started(
        self, driver: list[Hardware], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ort_devices, "cuda_devices", pytest.fail)
        [entry] = list_onnxruntime(onnxruntime(["CUDAExecutionProvider"]))
        assert (entry.device, entry.status, entry.hardware) == ("cuda", "found", None)
        assert entry.version == "onnxruntime 1.31.1"

    @pytest.mark.parametrize(
        ("error", "status"),
        [(DeviceNotAvailableError, "no device"), (BackendBrokenError, "broken")],
    )
    def test_cuda_without_a_device(
        self,
        driver: list[Hardware],
        monkeypatch: pytest.MonkeyPatch,
        error: type[Exception],
        status: str,
    ) -> None:
        def fail(library: Any) -> None:
            raise error("cuInit says no")

        monkeypatch.setattr(ort_devices, "cuda_devices", fail)
        with disposable_process():
            [entry] = list_onnxruntime(onnxruntime(["CUDAExecutionProvider"]))
        assert (entry.device, entry.status) == ("cuda", status)
        assert "CUDAExecutionProvider: cuInit says no" in entry.reason

    def test_cuda_without_a_driver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """That much is known in an application, too."""

        def fail() -> None:
            raise DeviceNotAvailableError("libcuda.so.1: no such file")

        monkeypatch.setattr(ort_devices, "open_driver", fail)
        [entry] = list_onnxruntime(onnxruntime(["CUDAExecutionProvider"]))
        assert (entry.device, entry.status) == ("cuda", "no device")

    def plugin(self, monkeypatch: pytest.MonkeyPatch, devices: list[Any]) -> Any:
        """An onnxruntime with the OpenVINO plugin beside it, which has these devices."""
        name, module = "OpenVINOExecutionProvider", "onnxruntime_ep_openvino"
        monkeypatch.setattr(providers, "_is_installed", lambda wanted: wanted == module)
        monkeypatch.setattr(ort_plugins, "_registered", {})
        library = SimpleNamespace(get_library_path=lambda: "/x.so", get_ep_names=lambda: [name])
        monkeypatch.setattr(ort_plugins, "_import_plugin", lambda module: library)
        ort = onnxruntime([], devices)
        ort.register_execution_provider_library = lambda name, path: None
        return ort

    def test_a_plugin_is_loaded_where_that_may_crash(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gpu = ep_device("OpenVINOExecutionProvider", "GPU", vendor_id=0x8086)
        ort = self.plugin(monkeypatch, [gpu])
        before = list_onnxruntime(ort)
        assert [(entry.device, entry.status, entry.hardware) for entry in before] == [
            (name, "found", None) for name in ("openvino-cpu", "gpu", "npu")
        ]
        with disposable_process():
            after = by_device(list_onnxruntime(ort))
        assert {name: entry.status for name, entry in after.items()} == {
            "openvino-cpu": "no device",
            "gpu": "found",
            "npu": "no device",
        }
        assert after["gpu"].hardware == Hardware(native="OpenVINO 0", vendor="intel")
        # Once it is there, it may be asked anywhere.
        assert by_device(list_onnxruntime(ort)) == after

    def test_several_devices_of_a_plugin(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gpu = ep_device("OpenVINOExecutionProvider", "GPU", vendor_id=0x8086)
        with disposable_process():
            found = by_device(list_onnxruntime(self.plugin(monkeypatch, [gpu, gpu])))
        assert {"gpu:0", "gpu:1"} < set(found)

    def test_a_plugin_that_does_not_load(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ort = self.plugin(monkeypatch, [])

        def fail(name: str, path: str) -> None:
            raise RuntimeError("undefined symbol")

        ort.register_execution_provider_library = fail
        with disposable_process():
            found = list_onnxruntime(ort)
        assert {entry.status for entry in found} == {"broken"}
        assert "undefined symbol" in found[0].reason


class FakeCore:
    """An ``openvino.Core`` with these properties of each device."""

    def __init__(self, devices: dict[str, dict[str, Any]]) -> None:
        self._devices = devices

    @property
    def available_devices(self) -> list[str]:
        return list(self._devices)

    def get_property(self, device: str, key: str) -> Any:
        value = self._devices[device].get(key)
        if value is None:
            raise RuntimeError(f"Unsupported property {key}")
        return value


class TestOpenVino:
    openvino = SimpleNamespace(get_version=lambda: "2026.4.1-22982-e213a147257-releases/2026/4")

    @pytest.mark.parametrize(("system", "luid"), [("win32", "000000010000d3a7"), ("linux", None)])
    def test_devices(self, system: str, luid: str | None, monkeypatch: Any) -> None:
        monkeypatch.setattr("sys.platform", system)
        core = FakeCore(
            {
                "CPU": {"FULL_DEVICE_NAME": "Intel(R) Core(TM) Ultra 7 155H"},
                "GPU": {
                    "FULL_DEVICE_NAME": "Intel(R) Arc(TM) Graphics (iGPU)",
                    "DEVICE_TYPE": SimpleNamespace(name="INTEGRATED"),
                    "DEVICE_UUID": UUID,
                    "DEVICE_LUID": "a7d3000001000000",
                    "DEVICE_PCI_INFO": SimpleNamespace(domain=0, bus=0, device=2, function=0),
                    "GPU_DEVICE_TOTAL_MEM_SIZE": 15_473_831_936,
                    "GPU_DRIVER_VERSION": "25.18.33578",
                },
                "NPU": {
                    "FULL_DEVICE_NAME": "Intel(R) AI Boost",
                    "NPU_DRIVER_VERSION": 2020509,
                    "NPU_DEVICE_TOTAL_MEM_SIZE": 4_294_967_296,
                },
            }
        )
        found = by_device(list_openvino(self.openvino, core))
        assert list(found) == ["cpu", "gpu", "npu", "openvino-auto"]
        assert {entry.version for entry in found.values()} == {"openvino 2026.4.1"}
        assert found["gpu"].hardware == Hardware(
            native="GPU",
            name="Intel(R) Arc(TM) Graphics (iGPU)",
            vendor="intel",
            memory_bytes=15_473_831_936,
            driver="25.18.33578",
            pci="0000:00:02.0",
            luid=luid,
            uuid=UUID,
            discrete=False,
        )
        assert found["npu"].hardware == Hardware(
            native="NPU",
            name="Intel(R) AI Boost",
            vendor="intel",
            memory_bytes=4_294_967_296,
            driver="2020509",
        )

    def test_a_device_whose_properties_fail_is_listed(self) -> None:
        found = by_device(list_openvino(self.openvino, FakeCore({"CPU": {}, "GPU.0": {}})))
        assert found["gpu:0"].status == "found"
        assert found["gpu:0"].hardware == Hardware(native="GPU.0")

    def test_kinds_that_no_plugin_finds(self) -> None:
        found = by_device(list_openvino(self.openvino, FakeCore({"CPU": {}})))
        assert {name: found[name].status for name in ("gpu", "npu")} == {
            "gpu": "no device",
            "npu": "no device",
        }
        assert "Intel GPU with its OpenCL driver" in found["gpu"].reason


def torch_module(count: int, properties: Any = None) -> SimpleNamespace:
    return SimpleNamespace(
        is_available=lambda: count > 0,
        device_count=lambda: count,
        get_device_properties=lambda index: properties,
    )


def fake_torch(**parts: Any) -> SimpleNamespace:
    none = torch_module(0)
    return SimpleNamespace(
        __version__="2.13.0",
        version=SimpleNamespace(cuda=None, hip=None, xpu=None),
        **({"cuda": none, "xpu": none, "mps": SimpleNamespace()} | parts),
        backends=SimpleNamespace(
            mps=SimpleNamespace(is_available=lambda: "mps" in parts, get_name=lambda: "Apple M4")
        ),
    )


class TestTransformers:
    @pytest.fixture(autouse=True)
    def _versions(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch_listing, "find_versions", lambda: "transformers 5, torch 2.13")

    def listed(self, monkeypatch: pytest.MonkeyPatch, fake: SimpleNamespace) -> Any:
        monkeypatch.setitem(sys.modules, "torch", fake)
        monkeypatch.setattr(torch_listing, "import_runtime", lambda *args, **options: fake)
        return by_device(torch_listing.list_devices())

    def test_a_cuda_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        properties = SimpleNamespace(
            name="NVIDIA H100 80GB HBM3",
            total_memory=85_045_870_592,
            is_integrated=0,
            pci_domain_id=0,
            pci_bus_id=0xC1,
            pci_device_id=0,
            uuid="6d1bb8ad-4c2e-8a3f-9d10-0123456789ab",
        )
        found = self.listed(monkeypatch, fake_torch(cuda=torch_module(1, properties)))
        assert list(found) == ["cpu", "cuda"]
        assert found["cuda"].version == "transformers 5, torch 2.13"
        assert found["cuda"].hardware == Hardware(
            native="cuda:0",
            name="NVIDIA H100 80GB HBM3",
            vendor="nvidia",
            memory_bytes=85_045_870_592,
            pci="0000:c1:00.0",
            uuid=UUID,
            discrete=True,
        )

    def test_an_amd_device_has_no_uuid(self, monkeypatch: pytest.MonkeyPatch) -> None:
        properties = SimpleNamespace(
            name="AMD Radeon(TM) 8060S Graphics",
            total_memory=1 << 36,
            is_integrated=1,
            uuid="30303030-3031-3936-3030-303030303030",
        )
        fake = fake_torch(cuda=torch_module(1, properties))
        fake.version.hip = "7.1"
        hardware = self.listed(monkeypatch, fake)["cuda"].hardware
        assert (hardware.vendor, hardware.uuid, hardware.discrete) == ("amd", None, False)

    def test_an_intel_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        properties = SimpleNamespace(
            name="Intel(R) Arc(TM) B580 Graphics",
            total_memory=12 << 30,
            driver_version="1.6.33578+11",
            is_integrated_gpu=False,
            uuid="6d1bb8ad-4c2e-8a3f-9d10-0123456789ab",
        )
        found = self.listed(monkeypatch, fake_torch(xpu=torch_module(1, properties)))
        assert found["gpu"].hardware == Hardware(
            native="xpu:0",
            name="Intel(R) Arc(TM) B580 Graphics",
            vendor="intel",
            memory_bytes=12 << 30,
            driver="1.6.33578+11",
            uuid=UUID,
            discrete=True,
        )

    def test_a_mac(self, monkeypatch: pytest.MonkeyPatch) -> None:
        mps = SimpleNamespace(recommended_max_memory=lambda: 12 << 30)
        found = self.listed(monkeypatch, fake_torch(mps=mps))
        assert found["metal"].hardware == Hardware(
            native="mps",
            name="Apple M4",
            vendor="apple",
            memory_bytes=12 << 30,
            discrete=False,
        )

    def test_properties_that_fail(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = self.listed(monkeypatch, fake_torch(cuda=torch_module(2)))
        assert [found[name].hardware for name in ("cuda:0", "cuda:1")] == [
            Hardware(native="cuda:0"),
            Hardware(native="cuda:1"),
        ]

    def test_what_torch_was_built_for_and_does_not_find(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fake = fake_torch()
        fake.version.cuda = "13.0"
        monkeypatch.setattr(torch_listing, "_missing_library", lambda build: None)
        entry = self.listed(monkeypatch, fake)["cuda"]
        assert (entry.status, entry.reason) == (
            "no device",
            "transformers 5, torch 2.13 is built for cuda; torch finds none",
        )

    @pytest.mark.skipif(sys.platform == "darwin", reason="there, torch is always asked")
    def test_without_a_driver_torch_is_not_imported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(sys.modules, "torch", raising=False)
        monkeypatch.setattr(torch_listing, "_builds", lambda: ["cuda", "xpu"])
        monkeypatch.setattr(torch_listing, "_missing_library", lambda build: f"lib{build}.so")
        monkeypatch.setattr(torch_listing, "import_runtime", pytest.fail)
        found = by_device(torch_listing.list_devices())
        assert {name: entry.status for name, entry in found.items()} == {
            "cpu": "found",
            "cuda": "no device",
            "gpu": "no device",
        }
        assert "libcuda.so is not here" in found["cuda"].reason


class TestMlx:
    def fake(self, *, metal: bool = False, cuda: int | None = None, **info: Any) -> Any:
        return SimpleNamespace(
            __version__="0.32.4",
            cpu="cpu",
            gpu="gpu",
            Device=lambda kind, index: f"Device({kind}, {index})",
            metal=SimpleNamespace(is_available=lambda: metal),
            cuda=SimpleNamespace(is_available=lambda: cuda is not None),
            device_count=lambda kind: cuda,
            device_info=lambda device: info,
        )

    def test_metal(self) -> None:
        mx = self.fake(
            metal=True, device_name="Apple M4 Pro", max_recommended_working_set_size=36 << 30
        )
        found = by_device(list_mlx(mx))
        assert found["metal"].version == "mlx 0.32.4"
        assert found["metal"].hardware == Hardware(
            native="Device(gpu, 0)",
            name="Apple M4 Pro",
            vendor="apple",
            memory_bytes=36 << 30,
            discrete=False,
        )

    def test_cuda(self) -> None:
        mx = self.fake(
            cuda=1,
            device_name="NVIDIA L4",
            uuid="GPU-6d1bb8ad-4c2e-8a3f-9d10-0123456789ab",
            pci_bus_id="0000:c1:00.0",
            total_memory=24 << 30,
        )
        assert by_device(list_mlx(mx))["cuda"].hardware == Hardware(
            native="Device(gpu, 0)",
            name="NVIDIA L4",
            vendor="nvidia",
            memory_bytes=24 << 30,
            pci="0000:c1:00.0",
            uuid=UUID,
        )

    def test_a_build_for_cuda_without_a_device(self) -> None:
        found = by_device(list_mlx(self.fake(cuda=0)))
        assert (found["cpu"].status, found["cuda"].status) == ("found", "no device")

    def test_cuda_that_does_not_start(self) -> None:
        def fail(kind: str) -> None:
            raise RuntimeError("cudaGetDeviceCount failed: CUDA driver version is insufficient")

        mx = self.fake(cuda=1)
        mx.device_count = fail
        found = by_device(list_mlx(mx))
        assert (found["cpu"].status, found["cuda"].status) == ("found", "no device")

    def test_an_mlx_that_tells_nothing(self) -> None:
        mx = self.fake(metal=True)
        del mx.device_info
        assert by_device(list_mlx(mx))["metal"].hardware == Hardware(native="Device(gpu, 0)")
