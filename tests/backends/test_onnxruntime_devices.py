"""Devices: which provider a name means, proof of placement, and memory that is not the host's."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from phirt.backends import ort_plugins
from phirt.backends.onnxruntime import adapter, providers
from phirt.backends.onnxruntime import cache as onnxruntime_cache
from phirt.backends.onnxruntime.adapter import OnnxRuntimeBackend, OrtModel
from phirt.backends.onnxruntime.memory import ELEMENTS, DeviceMemory
from phirt.backends.onnxruntime.options import Settings
from phirt.backends.onnxruntime.providers import (
    Provider,
    add_to,
    find_provider,
    installed,
    read_placement,
)
from phirt.build.convert import convert
from phirt.errors import BackendBrokenError, DeviceNotAvailableError, DevicePlacementError
from phirt.models.folder import read_folder
from phirt.protocols import LoadOptions, Reject
from phirt.testing import write_tiny_checkpoint
from phirt.testing.subject import random_ids

_CPU = "CPUExecutionProvider"


@dataclass
class FakeRuntime:
    """What of the onnxruntime module chooses a provider."""

    built_in: list[str]
    devices: list[Any] = field(default_factory=list)
    registered: list[tuple[str, str]] = field(default_factory=list)
    __version__ = "0"

    def get_available_providers(self) -> list[str]:
        return self.built_in

    def get_ep_devices(self) -> list[Any]:
        return self.devices if self.registered else []

    def register_execution_provider_library(self, name: str, path: str) -> None:
        self.registered.append((name, path))


def ep_device(name: str, hardware: str) -> Any:
    return SimpleNamespace(
        ep_name=name, device=SimpleNamespace(type=SimpleNamespace(name=hardware))
    )


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Plugin modules that are installed, by the provider that each brings."""
    found: dict[str, str] = {}

    def load(name: str) -> ModuleType:
        module = ModuleType(name)
        module.get_library_path = lambda: f"/{name}.so"  # type: ignore[attr-defined]
        module.get_ep_names = lambda: [found[name]]  # type: ignore[attr-defined]
        return module

    monkeypatch.setattr(providers, "_is_installed", lambda module: module in found)
    monkeypatch.setattr(providers, "_module_names", lambda: list(found))
    monkeypatch.setattr(ort_plugins, "_import_plugin", load)
    monkeypatch.setattr(ort_plugins, "_registered", {})
    return found


class TestNames:
    @pytest.mark.parametrize(
        ("provider", "devices"),
        [
            (_CPU, ["cpu"]),
            ("CUDAExecutionProvider", ["cuda"]),
            ("DmlExecutionProvider", ["directml"]),
            ("WebGpuExecutionProvider", ["webgpu"]),
            ("CoreMLExecutionProvider", ["coreml"]),
            ("NvTensorRTRTXExecutionProvider", ["tensorrt-rtx"]),
            ("QNNExecutionProvider", ["npu"]),
            ("OpenVINOExecutionProvider", ["openvino-cpu", "gpu", "npu"]),
        ],
    )
    def test_of_a_wheel(self, plugins: dict[str, str], provider: str, devices: list[str]) -> None:
        assert [row.device for row in installed(FakeRuntime([provider]))] == devices

    def test_of_plugins(self, plugins: dict[str, str]) -> None:
        plugins.update(
            {
                "onnxruntime_ep_openvino": "OpenVINOExecutionProvider",
                "onnxruntime_qnn": "QNNExecutionProvider",
                "onnxruntime_ep_brand_new": "BrandNewExecutionProvider",
            }
        )
        rows = list(installed(FakeRuntime([_CPU])))
        assert {(row.device, row.name) for row in rows if row.module} == {
            ("openvino-cpu", "OpenVINOExecutionProvider"),
            ("gpu", "OpenVINOExecutionProvider"),
            ("gpu", "QNNExecutionProvider"),
            ("npu", "QNNExecutionProvider"),
            ("npu", "OpenVINOExecutionProvider"),
            ("brand-new", ""),
        }

    def test_an_index(self, plugins: dict[str, str]) -> None:
        ort = FakeRuntime(["CUDAExecutionProvider"])
        provider = find_provider(ort, "cuda:1")
        assert add_to(ort, provider, None, {}) == [("CUDAExecutionProvider", {"device_id": "1"})]
        assert add_to(ort, find_provider(ort, "cuda"), None, {}) == ["CUDAExecutionProvider"]

    def test_an_index_of_a_provider_with_one_device(self, plugins: dict[str, str]) -> None:
        with pytest.raises(DeviceNotAvailableError, match="finds no such device"):
            find_provider(FakeRuntime([_CPU]), "cpu:1")

    def test_a_plugins_devices(self, plugins: dict[str, str]) -> None:
        plugins["onnxruntime_ep_openvino"] = name = "OpenVINOExecutionProvider"
        devices = [ep_device(name, "CPU"), ep_device(name, "GPU"), ep_device(name, "GPU")]
        ort = FakeRuntime([_CPU], devices)
        taken: list[Any] = []
        settings = SimpleNamespace(add_provider_for_devices=lambda *args: taken.append(args))
        for device in ("gpu:1", "openvino-cpu"):
            assert add_to(ort, find_provider(ort, device), settings, {"a": 1}) == []
        assert taken == [([devices[2]], {"a": "1"}), ([devices[0]], {"a": "1"})]
        assert len(ort.registered) == 1  # once per process
        with pytest.raises(DeviceNotAvailableError, match="finds no such device"):
            find_provider(ort, "npu")

    def test_a_plugin_that_the_table_does_not_know(self, plugins: dict[str, str]) -> None:
        plugins["onnxruntime_ep_brand_new"] = name = "BrandNewExecutionProvider"
        ort = FakeRuntime([_CPU], [ep_device(name, "NPU")])
        assert find_provider(ort, "brand-new").name == name

    def test_a_plugin_that_does_not_load(
        self, plugins: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plugins["onnxruntime_qnn"] = "QNNExecutionProvider"

        def fail(module: str) -> None:
            raise OSError("no such symbol")

        monkeypatch.setattr(ort_plugins, "_import_plugin", fail)
        with pytest.raises(BackendBrokenError, match=r"onnxruntime_qnn.*no such symbol"):
            find_provider(FakeRuntime([_CPU]), "npu")

    def test_what_nothing_serves(self, plugins: dict[str, str]) -> None:
        with pytest.raises(DeviceNotAvailableError, match="none of the execution providers"):
            find_provider(FakeRuntime([_CPU]), "cuda")

    def test_rejected_before_a_load(self, tmp_path: Path) -> None:
        artifact = read_folder(write_tiny_checkpoint(tmp_path / "hf", "llama")).artifact
        assert isinstance(OnnxRuntimeBackend().accepts(artifact, "cpu"), Reject)


class TestPlacement:
    """`read_placement`, of what onnxruntime recorded."""

    cuda = Provider(device="cuda", name="CUDAExecutionProvider")

    def read(self, **assigned: list[str]) -> Any:
        recorded = [
            SimpleNamespace(
                ep_name=name + "ExecutionProvider",
                get_nodes=lambda kinds=kinds: [SimpleNamespace(op_type=k, name=k) for k in kinds],
            )
            for name, kinds in assigned.items()
        ]
        inference = SimpleNamespace(get_provider_graph_assignment_info=lambda: recorded)
        return read_placement(inference, self.cuda, "cuda")

    def test_lengths_and_masks_may_stay_on_the_cpu(self) -> None:
        placement = self.read(CUDA=["MatMul", "GroupQueryAttention"], CPU=["Shape", "ReduceSum"])
        assert dict(placement.nodes) == {"CUDAExecutionProvider": 2, _CPU: 2}

    @pytest.mark.parametrize("kind", ["MatMul", "MatMulNBits", "GroupQueryAttention", "Gemm"])
    def test_products_and_attention_may_not(self, kind: str) -> None:
        with pytest.raises(DevicePlacementError, match=kind):
            self.read(CUDA=["MatMul", "GroupQueryAttention"], CPU=[kind])

    def test_a_fallback_is_an_error(self) -> None:
        message = r"2 of 2 nodes \(100\.0%\) elsewhere: 2 on CPUExecutionProvider"
        with pytest.raises(DevicePlacementError, match=message):
            self.read(CPU=["Shape", "Gather"])

    def test_the_share_is_named(self) -> None:
        message = (
            r"runs 4 of 10 nodes \(40\.0%\) elsewhere: 6 on CUDA\w+, 4 on CPU\w+; "
            "off the device are 1 GroupQueryAttention and 2 MatMulNBits, which belong there"
        )
        stray = ["MatMulNBits", "Shape", "GroupQueryAttention", "MatMulNBits"]
        with pytest.raises(DevicePlacementError, match=message):
            self.read(CUDA=["MatMulNBits"] * 6, CPU=stray)

    def test_no_record_is_no_proof(self) -> None:
        with pytest.raises(DevicePlacementError, match="is no proof"):
            self.read()


class TestAFallback:
    """A session that onnxruntime opens on the CPU for a plan that names a GPU."""

    def test_is_refused_with_the_share(self, folder: Path, monkeypatch: Any) -> None:
        cuda = Provider(device="cuda", name="CUDAExecutionProvider", memory="cpu")
        monkeypatch.setattr(adapter, "find_provider", lambda ort, device: cuda)
        monkeypatch.setattr(adapter, "add_to", lambda *args: [_CPU])
        artifact = read_folder(folder).artifact
        message = r"'cuda' .* CUDAExecutionProvider, but .* \(100\.0%\) elsewhere"
        with pytest.raises(DevicePlacementError, match=message):
            OnnxRuntimeBackend().load(artifact, "cuda", LoadOptions())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("llama")
    checkpoint = write_tiny_checkpoint(root / "hf", "llama")
    (root / "onnx").mkdir()
    convert(checkpoint, root / "onnx", layout="onnx-genai", precision="fp32")
    return root / "onnx"


def load(folder: Path) -> OrtModel:
    return OnnxRuntimeBackend().load(read_folder(folder).artifact, "cpu", LoadOptions())


@pytest.fixture
def remote(folder: Path, monkeypatch: pytest.MonkeyPatch) -> OrtModel:
    """A model whose memory is reached as a device's is: by copies that the provider makes."""
    plain = OrtModel._capabilities

    def capabilities(self: OrtModel) -> Any:
        self.memory = DeviceMemory(self.ort, self._open, "cpu", 0)
        return plain(self)

    monkeypatch.setattr(OrtModel, "_capabilities", capabilities)
    return load(folder)


class TestDeviceMemory:
    @pytest.mark.parametrize("shares_buffer", [True, False])
    def test_steps_and_caches(
        self,
        remote: OrtModel,
        folder: Path,
        shares_buffer: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(onnxruntime_cache, "_BUCKET", 16)
        host, ids = load(folder), random_ids(30)
        remote.shares_buffer = host.shares_buffer = shares_buffer
        sessions = [model.new_session(max_length=90, expected_length=9) for model in (remote, host)]
        for session in sessions:
            session.prefill(ids[:20])
            session.truncate(15)
            session.verify(ids[15:29])
        here, there = (session.decode(ids[29]).numpy() for session in sessions)
        assert np.array_equal(here, there)
        moved = remote.new_session(max_length=90, expected_length=9)
        moved.import_kv(sessions[1].export_kv())
        assert np.array_equal(moved.decode(7).numpy(), sessions[0].decode(7).numpy())
        for _ in range(50):  # several buckets
            logits = moved.decode(7)
        assert np.isfinite(logits.numpy()).all()

    def test_top_is_chosen_by_the_provider(self, remote: OrtModel) -> None:
        assert remote.capabilities.topk
        session = remote.new_session(max_length=30, expected_length=30)
        logits = session.prefill(random_ids(20))
        top, row = logits.top(4), logits.numpy()[0]
        assert top.ids.tolist() == [np.argsort(-row, kind="stable")[:4].tolist()]
        assert np.array_equal(top.values[0], row[top.ids[0]])
        assert top.logsumexp == pytest.approx(
            np.log(np.exp(row.astype(np.float64)).sum()), abs=1e-4
        )
        kinds = [
            node.op_type
            for part in remote.selection.get_provider_graph_assignment_info()
            for node in part.get_nodes()
        ]
        assert sorted(kinds) == ["ReduceLogSumExp", "TopK"]

    def test_every_position(self, remote: OrtModel, folder: Path) -> None:
        ids = random_ids(20)
        rows = [
            model.new_session(max_length=20, expected_length=20).verify(ids)
            for model in (remote, load(folder))
        ]
        assert np.array_equal(rows[0].numpy(), rows[1].numpy())
        assert np.array_equal(rows[0].top(2).ids, rows[1].top(2).ids)


class TestElements:
    def test_bfloat16_rounds_to_the_nearest_even(self) -> None:
        element = ELEMENTS["tensor(bfloat16)"]
        # 1 + 2**-8 lies halfway between 1 and 1 + 2**-7; the even one is 1.
        values = np.array([1, 1 + 2**-8, 1 + 3 * 2**-8, -3.5, np.inf], np.float32)
        stored = element.from_float32(values)
        assert stored.dtype == np.uint16
        expected = np.array([1, 1, 1 + 2**-6, -3.5, np.inf], np.float32)
        assert np.array_equal(element.to_float32(stored), expected)

    def test_float32_is_not_copied(self) -> None:
        values = np.ones(3, np.float32)
        assert ELEMENTS["tensor(float)"].to_float32(values) is values


class TestSettings:
    @pytest.mark.parametrize(
        "extra", [{"tokens_per_run": 0}, {"tokens_per_run": "8"}, {"provider_options": ["a"]}]
    )
    def test_values_of_another_kind(self, extra: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="must be"):
            Settings.of(LoadOptions(extra=extra))

    def test_the_rest_is_onnxruntimes(self) -> None:
        settings = Settings.of(LoadOptions(extra={"session.a": 1, "tokens_per_run": 4}))
        assert (settings.config, settings.tokens_per_run) == ({"session.a": "1"}, 4)
