"""onnxruntime-genai, held against transformers, and its own ways kept out of the numbers."""

from __future__ import annotations

import json
import shutil
import tempfile
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from phirt.backends import ort_devices
from phirt.backends.onnxruntime_genai import OnnxRuntimeGenaiBackend, adapter
from phirt.backends.onnxruntime_genai import config as genai_config
from phirt.backends.onnxruntime_genai import session as genai_session
from phirt.backends.onnxruntime_genai.config import PROVIDERS
from phirt.backends.onnxruntime_genai.session import translate
from phirt.backends.probing import disposable_process
from phirt.build.convert import convert
from phirt.errors import (
    BackendNotInstalledError,
    BackendRuntimeError,
    DeviceNotAvailableError,
    DevicePlacementError,
    OutOfMemoryError,
    SessionClosedError,
)
from phirt.models.folder import read_folder
from phirt.protocols import LoadOptions, Reject
from phirt.testing import DENSE_ARCHITECTURES, write_tiny_checkpoint
from phirt.types import Hardware
from tests.installed import require

require("onnxruntime_genai")
genai = import_module("onnxruntime_genai")

WINDOW = 16  # of the tiny mistral
TOLERANCE = 1e-3


def random_ids(count: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, 310, count)]


def load(folder: Path, device: str = "cpu", **options: Any) -> Any:
    backend = OnnxRuntimeGenaiBackend()
    artifact = read_folder(folder, formats=backend.formats).artifact
    return backend.load(artifact, device, LoadOptions(**options))


def open_session(model: Any, *, max_length: int = 100, expected_length: int | None = None) -> Any:
    return model.new_session(max_length=max_length, expected_length=expected_length or max_length)


def greedy(session: Any, prompt: list[int], steps: int) -> tuple[list[int], np.ndarray]:
    """Prompt and continuation, and the logits of every step."""
    ids, rows = list(prompt), [session.prefill(prompt).numpy()[0]]
    for _ in range(steps - 1):
        ids.append(int(rows[-1].argmax()))
        rows.append(session.decode(ids[-1]).numpy()[0])
    return ids, np.stack(rows)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Tiny checkpoints by architecture, written when asked for."""
    root: Path = tmp_path_factory.mktemp("checkpoints")

    def write(architecture: str) -> Path:
        folder = root / architecture
        if not folder.exists():
            write_tiny_checkpoint(folder, architecture)
        return folder

    return write


@pytest.fixture(scope="session")
def written(checkpoints, tmp_path_factory):
    """Genai folders that phirt writes, in fp32."""
    root: Path = tmp_path_factory.mktemp("written")

    def write(architecture: str) -> Path:
        folder = root / architecture
        if not folder.exists():
            folder.mkdir()
            convert(checkpoints(architecture), folder, layout="onnx-genai", precision="fp32")
        return folder

    return write


@pytest.fixture(scope="session")
def built(checkpoints, tmp_path_factory):
    """Genai folders of Microsoft's Model Builder, in fp32."""
    require("torch", "onnx_ir")
    builder = import_module("onnxruntime_genai.models.builder")
    root: Path = tmp_path_factory.mktemp("built")

    def build(architecture: str, **config: Any) -> Path:
        folder = root / "-".join([architecture, *config])
        if not folder.exists():
            source = shutil.copytree(checkpoints(architecture), root / "sources" / folder.name)
            path = source / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | config))
            what = ("x", str(source), str(folder), "fp32", "cpu", str(root / "cache"))
            builder.create_model(*what, **builder.parse_extra_options(*what, []))
        return folder

    return build


@pytest.fixture(scope="session")
def llama(written):
    model = load(written("llama"))
    yield model
    model.close()


@pytest.fixture(scope="session")
def llama_once(written):
    model = load(written("llama"), extra={"append_once": True})
    yield model
    model.close()


def edited(source: Path, target: Path, **session_options: Any) -> Path:
    """A copy of a folder whose genai_config.json has further session options."""
    shutil.copytree(source, target)
    (target / "phirt.json").unlink(missing_ok=True)  # It records the files' sizes.
    path = target / "genai_config.json"
    document = json.loads(path.read_text())
    document["model"]["decoder"]["session_options"] |= session_options
    path.write_text(json.dumps(document))
    return target


@pytest.fixture
def configurations(monkeypatch):
    """The texts of the configurations that genai is given."""
    seen: list[dict[str, Any]] = []
    original = genai.Config

    def config(path: str) -> Any:
        seen.append(json.loads((Path(path) / "genai_config.json").read_text(encoding="utf-8")))
        return original(path)

    monkeypatch.setattr(genai, "Config", config)
    return seen


@pytest.fixture
def no_device(monkeypatch):
    """genai as it is without any device but the CPU, on every machine."""

    def refuse(config: Any) -> None:
        raise RuntimeError("X execution provider is not supported in this build.")

    monkeypatch.setattr(genai, "Model", refuse)


@pytest.mark.oracle
class TestAgainstTransformers:
    @staticmethod
    def expected(folder: Path, ids: list[int]) -> np.ndarray:
        """Logits of every position, from one forward without a cache."""
        import torch
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        with torch.no_grad():
            logits: np.ndarray = model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
        return logits

    @pytest.mark.parametrize("architecture", DENSE_ARCHITECTURES)
    def test_48_greedy_steps(self, written, checkpoints, architecture):
        prompt = random_ids(40)  # past the windows, and past phi3's boundary
        session = open_session(load(written(architecture)), max_length=88)
        ids, logits = greedy(session, prompt, 48)
        expected = self.expected(checkpoints(architecture), ids)[len(prompt) - 1 :]
        np.testing.assert_allclose(logits, expected, atol=TOLERANCE)

    @pytest.mark.parametrize("prompt_length", [8, 40])
    @pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "phi3"])
    def test_folders_of_model_builder(self, built, checkpoints, architecture, prompt_length):
        model = load(built(architecture))
        steps = 24 if prompt_length == 8 else 48  # 8 + 24: up to the boundary
        session = open_session(model, max_length=prompt_length + steps)
        ids, logits = greedy(session, random_ids(prompt_length), steps)
        expected = self.expected(checkpoints(architecture), ids)[prompt_length - 1 :]
        np.testing.assert_allclose(logits, expected, atol=TOLERANCE)

    def test_a_rolling_cache_that_never_has_to_roll(self, built, checkpoints):
        # Model Builder marks such layers; with room for all positions one can go back, too.
        layers = ["sliding_attention"] * 2
        model = load(built("mistral", layer_types=layers))
        assert (model.info.window, model.info.context_length) == (WINDOW, 256)
        ids = random_ids(60)
        expected = self.expected(checkpoints("mistral"), ids)
        session = open_session(model)
        np.testing.assert_allclose(session.verify(ids).numpy(), expected, atol=TOLERANCE)
        session.truncate(30)
        rest = session.verify(ids[30:]).numpy()
        np.testing.assert_allclose(rest, expected[30:], atol=TOLERANCE)

    def test_a_window_that_the_graph_does_not_mask(self, built, checkpoints):
        # Without layer_types Model Builder leaves the window to genai, which gets it wrong.
        model = load(built("mistral"))
        assert (model.info.window, model.info.context_length) == (WINDOW, WINDOW)
        ids = random_ids(WINDOW)
        logits = open_session(model, max_length=WINDOW).verify(ids).numpy()
        np.testing.assert_allclose(
            logits, self.expected(checkpoints("mistral"), ids), atol=TOLERANCE
        )


class TestConfiguration:
    """genai is given facts; nothing else of the folder's configuration reaches it."""

    def test_session_options_stay_behind(self, written, tmp_path, configurations):
        folder = edited(
            written("llama"),
            tmp_path / "hostile",
            **{
                "log_severity_level": 0,
                "optimized_model_filepath": "../dumped.onnx",
                "ep.context_enable": "1",
                "provider_options": [{"VitisAI": {"external_ep_libray": "evil.dll"}}],
            },
        )
        model = load(folder)
        assert model.placement().nodes.keys() == {"CPUExecutionProvider"}
        assert configurations[0]["model"]["decoder"]["session_options"] == {
            "log_severity_level": 4,
            "provider_options": [],
            "session.model_external_initializers_file_folder_path": configurations[0]["model"][
                "decoder"
            ]["session_options"]["session.model_external_initializers_file_folder_path"],
        }
        assert sorted(path.name for path in tmp_path.iterdir()) == ["hostile"]

    def test_rules_of_generation_stay_behind(self, written, llama, tmp_path):
        folder = edited(written("llama"), tmp_path / "biased")
        path = folder / "genai_config.json"
        document = json.loads(path.read_text())
        document["search"] |= {
            "repetition_penalty": 5.0,
            "min_length": 90,
            "no_repeat_ngram_size": 1,
            "num_beams": 4,
            "do_sample": True,
            "chunk_size": 2,
        }
        document["speculative"] = {"ngram_size": 3}
        path.write_text(json.dumps(document))
        expected, _ = greedy(open_session(llama), random_ids(20), 24)
        for extra in ({}, {"append_once": True}):
            ids, _ = greedy(open_session(load(folder, extra=extra)), random_ids(20), 24)
            assert ids == expected

    def test_no_token_counts_as_padding(self, llama, written):
        # By itself genai gives the logits of the last token that is not padding, and masks it.
        pad = json.loads((written("llama") / "genai_config.json").read_text())["model"][
            "pad_token_id"
        ]
        ids = [*random_ids(10), pad, *random_ids(3, 1), pad, pad]
        whole = open_session(llama).prefill(ids).numpy().copy()
        session = open_session(llama)
        for token in ids[:-1]:
            session.prefill([token])
        np.testing.assert_allclose(session.decode(pad).numpy(), whole, atol=TOLERANCE)

    def test_threads_spinning_and_extra_settings(self, written, configurations):
        load(
            written("llama"),
            threads=2,
            spinning=False,
            extra={"session_options": {"inter_op_num_threads": 1}},
        )
        options = configurations[0]["model"]["decoder"]["session_options"]
        assert options["intra_op_num_threads"] == 2
        assert options["session.intra_op.allow_spinning"] == "0"
        assert options["inter_op_num_threads"] == 1

    @pytest.mark.parametrize(
        ("extra", "message"),
        [
            ({"append_onze": True}, "no setting 'append_onze'"),
            ({"provider": "cuda"}, "does not drive 'cpu'"),
            ({"tokens_per_run": 0}, "must be a positive integer, not 0"),
            ({"tokens_per_run": 8, "append_once": True}, "cannot be had"),
            ({"append_once": "no"}, "True, False or None, not 'no'"),
            ({"provider": 3}, "the name of a provider, not 3"),
            ({"provider_options": ["x"]}, "must be a mapping"),
            ({"session_options": 3}, "must be a mapping, not 3"),
        ],
    )
    def test_settings_that_do_not_exist(self, written, extra, message):
        with pytest.raises(ValueError, match=message):
            load(written("llama"), extra=extra)

    def test_nothing_is_left_in_the_temporary_folder(self, written, tmp_path, monkeypatch):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        open_session(load(written("llama"))).prefill([1, 2, 3])
        assert list(tmp_path.iterdir()) == []


class TestSession:
    def test_the_cache_is_sized_to_the_request(self, llama):
        session = open_session(llama, max_length=250, expected_length=40)
        assert session._generator.get_input("past_key_values.0.key").shape[2] == 250
        session = open_session(llama, max_length=30)
        assert session._generator.get_input("past_key_values.0.key").shape[2] == 30

    @pytest.mark.parametrize("name", ["llama", "llama_once"])
    def test_a_sequence_that_outgrows_its_cache(self, request, monkeypatch, name):
        model = request.getfixturevalue(name)
        expected, logits = greedy(open_session(model), random_ids(20), 60)
        monkeypatch.setattr(genai_session, "BUCKET", 16)
        session = open_session(model, max_length=100, expected_length=24)
        ids, grown = greedy(session, random_ids(20), 60)
        assert ids == expected
        np.testing.assert_allclose(grown, logits, atol=TOLERANCE)
        assert session._capacity == 100

    def test_verify_in_chunks_and_while_growing(self, built, monkeypatch):
        ids = random_ids(60)
        whole = open_session(load(built("llama"))).verify(ids).numpy()
        monkeypatch.setattr(genai_session, "BUCKET", 16)
        chunked = load(built("llama"), extra={"tokens_per_run": 7})
        session = open_session(chunked, expected_length=20)
        first = session.verify(ids[:20]).numpy()
        rest = session.verify(ids[20:]).numpy()
        np.testing.assert_allclose(np.concatenate([first, rest]), whole, atol=TOLERANCE)

    def test_a_long_sessions_first_chunk_passes_the_boundary(self, written):
        ids = random_ids(60)
        whole = open_session(load(written("phi3"))).prefill(ids).numpy().copy()
        chunked = load(written("phi3"), extra={"tokens_per_run": 8})
        logits = open_session(chunked).prefill(ids).numpy()
        np.testing.assert_allclose(logits, whole, atol=TOLERANCE)

    def test_an_interrupted_prefill_ends_behind_its_chunk(self, written):
        session = open_session(load(written("llama"), extra={"tokens_per_run": 8}))
        generator = session._generator
        calls = []

        def append(tokens: Any) -> None:
            calls.append(len(tokens))
            generator.append_tokens(tokens)
            session.interrupt()

        session._generator = SimpleNamespace(append_tokens=append, token_count=lambda: 0)
        with pytest.raises(SessionClosedError, match="interrupted"):
            session.prefill(random_ids(40))
        assert calls == [8]

    def test_logits_of_a_type_that_numpy_does_not_have(self, written, monkeypatch):
        def refuse(generator: Any, name: str) -> None:
            raise RuntimeError("Unsupported onnx type: 16")

        monkeypatch.setattr(genai.Generator, "get_output", refuse)
        model = load(written("llama"))
        lack = model.capabilities.lacks["verify"]
        assert (lack.kind, "Unsupported onnx type: 16" in lack.reason) == ("this version", True)
        assert open_session(model).prefill([5, 6]).numpy().shape == (1, model.info.vocab_size)


class TestAppendOnce:
    """DirectML's way, forced on the CPU."""

    def test_where_it_is_the_only_way(self):
        names = {p.name for providers in PROVIDERS.values() for p in providers if p.append_once}
        assert names == {"DML", "QNN"}

    def test_it_prefills_once(self, llama_once):
        session = open_session(llama_once)
        assert session.can_extend
        session.prefill([5, 6, 7])
        assert not session.can_extend
        session.truncate(0)
        assert session.can_extend
        assert not llama_once.capabilities.verify

    def test_the_same_logits(self, llama, llama_once):
        ids, expected = greedy(open_session(llama), random_ids(20), 48)
        same, logits = greedy(open_session(llama_once), random_ids(20), 48)
        assert same == ids
        np.testing.assert_allclose(logits, expected, atol=TOLERANCE)

    def test_going_back(self, llama, llama_once):
        ids = random_ids(30)
        expected = open_session(llama).prefill([*ids[:22], 9]).numpy().copy()
        session = open_session(llama_once)
        session.prefill(ids[:20])
        for token in ids[20:]:
            session.decode(token)
        session.truncate(22)
        np.testing.assert_allclose(session.decode(9).numpy(), expected, atol=TOLERANCE)
        assert session.length == 23

    def test_going_back_into_the_prompt(self, llama, llama_once):
        ids = random_ids(20)
        expected = open_session(llama).prefill([*ids[:5], 9]).numpy().copy()
        session = open_session(llama_once)
        session.prefill(ids)
        session.truncate(5)
        np.testing.assert_allclose(session.decode(9).numpy(), expected, atol=TOLERANCE)

    def test_the_end_token_ends_nothing(self, llama, llama_once):
        end = min(llama.info.eos_token_ids)
        ids = [*random_ids(10), end, *random_ids(4, 1)]
        expected = open_session(llama).prefill(ids).numpy().copy()
        session = open_session(llama_once)
        session.prefill(ids[:10])
        for token in ids[10:-1]:
            session.decode(token)
        np.testing.assert_allclose(session.decode(ids[-1]).numpy(), expected, atol=TOLERANCE)


class TestDevices:
    def test_devices_that_genai_does_not_know(self, written):
        artifact = read_folder(written("llama")).artifact
        verdict = OnnxRuntimeGenaiBackend().accepts(artifact, "abacus")
        assert isinstance(verdict, Reject)
        assert "abacus" in verdict.reason
        with pytest.raises(DeviceNotAvailableError, match="abacus"):
            load(written("llama"), "abacus")

    @pytest.mark.parametrize("device", ["cpu:1", "webgpu:2"])
    def test_an_index_that_the_provider_cannot_choose(self, written, device):
        with pytest.raises(DeviceNotAvailableError, match=f"'{device}' .* no choice among several"):
            load(written("llama"), device)

    @pytest.mark.parametrize("device", ["cuda", "cuda:1", "directml", "tensorrt-rtx"])
    def test_devices_that_the_installed_build_does_not_have(self, written, device):
        if genai.__id__ != "onnxruntime-genai":
            pytest.skip(f"{genai.__id__} has it")
        with pytest.raises(DeviceNotAvailableError, match=f"'{device}' is not available") as caught:
            load(written("llama"), device)
        assert caught.value.__cause__ is not None

    @pytest.mark.parametrize(
        ("device", "options"),
        [
            ("cuda:1", [{"cuda": {"device_id": "1"}}]),
            ("directml:1", [{"DML": {"enable_graph_capture": "0", "device_index": "1"}}]),
            ("gpu", [{"OpenVINO": {"device_type": "GPU"}}]),
            ("gpu:1", [{"OpenVINO": {"device_type": "GPU.1"}}]),
            ("openvino-cpu", [{"OpenVINO": {"device_type": "CPU"}}]),
        ],
    )
    def test_what_genai_is_asked_for(self, written, configurations, no_device, device, options):
        with pytest.raises(DeviceNotAvailableError):
            load(written("llama"), device)
        session_options = configurations[0]["model"]["decoder"]["session_options"]
        assert session_options["provider_options"] == options

    def test_another_provider_and_its_options(self, written, configurations, no_device):
        extra = {"provider": "openvino", "provider_options": {"num_of_threads": 2}}
        with pytest.raises(DeviceNotAvailableError):
            load(written("llama"), "npu", extra=extra)
        session_options = configurations[0]["model"]["decoder"]["session_options"]
        assert session_options["provider_options"] == [
            {"OpenVINO": {"device_type": "NPU", "num_of_threads": "2"}}
        ]

    def test_placement_is_of_what_ran(self, llama):
        placement = llama.placement()
        assert (placement.device, placement.provider) == ("cpu", "CPUExecutionProvider")
        assert placement.nodes["CPUExecutionProvider"] > 20

    @pytest.mark.parametrize(
        ("kernels", "message"),
        [
            ([("OtherProvider", "Add")] * 9, r"9 of 9 nodes \(100\.0%\) elsewhere"),
            (
                [("CPUExecutionProvider", "Add"), ("OtherProvider", "FusedMatMul")],
                r"1 of 2 nodes \(50\.0%\) elsewhere.*off the device are 1 FusedMatMul",
            ),
        ],
        ids=["all-of-it", "a-product-of-matrices"],
    )
    def test_a_graph_that_ran_elsewhere(self, written, monkeypatch, kernels, message):
        monkeypatch.setattr(adapter, "_read_profile", lambda folder: kernels)
        with pytest.raises(DevicePlacementError, match=message):
            load(written("llama"))

    @pytest.mark.parametrize("profile", ["its own", "none"])
    def test_a_device_that_genai_leaves_for_the_cpu(self, written, monkeypatch, profile):
        """The plan says CUDA, and genai opens its CPU: by its own profile, and without one."""
        monkeypatch.setattr(genai_config, "_provider_options", lambda *args: [])
        if profile == "none":
            monkeypatch.setattr(adapter, "_read_profile", lambda folder: [])
        message = "CUDAExecutionProvider, but.*(100.0%|is no proof)"
        with pytest.raises(DevicePlacementError, match=message):
            load(written("llama"), "cuda")

    def test_small_things_may_run_elsewhere(self, written, monkeypatch):
        kernels = [("CPUExecutionProvider", "MatMul"), ("OtherProvider", "Shape")]
        monkeypatch.setattr(adapter, "_read_profile", lambda folder: kernels)
        nodes = load(written("llama")).placement().nodes
        assert nodes == {"CPUExecutionProvider": 1, "OtherProvider": 1}

    def test_a_build_with_cuda_offers_it(self, monkeypatch):
        fake = SimpleNamespace(
            __id__="onnxruntime-genai-cuda", __version__="9", disable_telemetry_events=lambda: None
        )
        monkeypatch.setattr(adapter, "import_runtime", lambda *a, **k: fake)
        card = Hardware(native="CUDA 0", name="NVIDIA L4")
        monkeypatch.setattr(ort_devices, "open_driver", lambda: [card])
        monkeypatch.setattr(ort_devices, "cuda_devices", list)
        with disposable_process():
            found = {entry.device: entry for entry in OnnxRuntimeGenaiBackend().probe()}
        assert (found["cuda"].status, found["cuda"].hardware) == ("found", card)
        assert found["cuda"].version == "onnxruntime-genai-cuda 9"
        assert "directml" not in found

    def test_a_build_with_cuda_on_a_machine_without(self, monkeypatch):
        def fail() -> None:
            raise DeviceNotAvailableError("NVIDIA's driver finds no device")

        fake = SimpleNamespace(
            __id__="onnxruntime-genai-cuda", __version__="9", disable_telemetry_events=lambda: None
        )
        monkeypatch.setattr(adapter, "import_runtime", lambda *a, **k: fake)
        monkeypatch.setattr(ort_devices, "open_driver", fail)
        found = {entry.device: entry for entry in OnnxRuntimeGenaiBackend().probe()}
        assert found["cuda"].status == "no device"
        assert "NVIDIA's driver finds no device" in found["cuda"].reason

    def test_a_build_of_onnxruntime_with_webgpu_offers_it(self, monkeypatch):
        monkeypatch.setattr(genai_config, "_has_wheel", bool)
        found = {entry.device for entry in OnnxRuntimeGenaiBackend().probe()}
        assert {"cpu", "webgpu", "openvino-cpu"} <= found

    def test_not_installed(self, monkeypatch):
        def fail(*args: Any, **options: Any) -> None:
            raise BackendNotInstalledError("no genai")

        monkeypatch.setattr(adapter, "import_runtime", fail)
        [found] = OnnxRuntimeGenaiBackend().probe()
        assert (found.status, found.fix) == ("missing", 'pip install "phirt[genai]"')


class TestTelemetry:
    @pytest.mark.parametrize(("setting", "calls"), [(None, 1), ("1", 1), ("0", 0)])
    def test_off_unless_the_user_says_otherwise(self, monkeypatch, setting, calls):
        if setting is None:
            monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
        else:
            monkeypatch.setenv("ORT_DISABLE_TELEMETRY", setting)
        switched: list[bool] = []
        monkeypatch.setattr(genai, "disable_telemetry_events", lambda: switched.append(True))
        OnnxRuntimeGenaiBackend().probe()
        assert len(switched) == calls


class TestErrors:
    @pytest.mark.parametrize(
        "message",
        [
            "std::bad_alloc",
            "Failed to allocate memory for requested buffer of size 8589934592",
            "Could not allocate the key-value cache buffer of shape: [batch_size (1), …]",
            "CUDA failure 2: out of memory",
        ],
    )
    def test_out_of_memory(self, message):
        assert isinstance(translate(RuntimeError(message), "testing"), OutOfMemoryError)

    def test_anything_else(self):
        error = translate(RuntimeError("Non-zero status code\nand more"), "testing")
        assert type(error) is BackendRuntimeError
        assert str(error) == "onnxruntime-genai failed while testing: Non-zero status code"
