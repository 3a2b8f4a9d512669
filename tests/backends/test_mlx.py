"""The MLX backend on the CPU: what mlx-lm does otherwise, phimoe, packed weights, the device.

What every backend must do is in tests/conformance; here is what only this one can get wrong.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from phirt.backends.base import HostLogits
from phirt.backends.mlx import MlxBackend
from phirt.backends.mlx import adapter as mlx_adapter
from phirt.backends.mlx import session as mlx_session
from phirt.backends.mlx.decoder import Decoder
from phirt.backends.mlx.model import MlxModel, MlxTarget
from phirt.backends.transformers import TransformersBackend
from phirt.errors import (
    BackendRuntimeError,
    DeviceNotAvailableError,
    DevicePlacementError,
    ModelError,
    ModelFormatError,
    OutOfMemoryError,
    SessionClosedError,
    UnsafeModelError,
    UnsupportedModelError,
)
from phirt.models.folder import read_folder
from phirt.protocols import Accept, KVCache, LoadOptions, Reject
from phirt.testing import TINY_ARCHITECTURES, write_tiny_checkpoint
from phirt.types import FloatArray
from tests.build.decoders import DECODERS, numpy_logits, random_decoder
from tests.build.onnx.checkpoints import MemoryCheckpoint
from tests.build.test_huggingface_config import write_folder
from tests.installed import require

require("mlx", "mlx_lm")

BOUNDARY = 32  # of the tiny phi3's LongRoPE; its context is 128
TOLERANCE = 1e-3


def load(folder: Path, device: str = "cpu", **options: Any) -> MlxModel:
    artifact = read_folder(folder, formats=MlxBackend.formats).artifact
    return MlxBackend().load(artifact, device, LoadOptions(**options))


def edit_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def random_ids(count: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(2, 300, count)]


def apart(tensors: dict[str, Any]) -> dict[str, Any]:
    """Experts one by one, as transformers reads them; mlx-lm keeps a layer's in one tensor."""
    names = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    found = {}
    for name, tensor in tensors.items():
        scope, _, part = name.partition("switch_mlp.")
        if not part:
            found[name] = tensor
            continue
        for index, expert in enumerate(tensor):
            found[f"{scope}experts.{index}.{names[part.removesuffix('.weight')]}.weight"] = expert
    return found


def nearest(values: FloatArray, precision: str) -> FloatArray:
    """The nearest numbers of 16 bits; neither rounding meets a tie here."""
    if precision == "fp16":
        return values.astype(np.float16).astype(np.float32)
    bits = values.view(np.uint32)
    return np.asarray((bits + np.uint32(0x8000)) & np.uint32(0xFFFF0000)).view(np.float32)


def verify(model: MlxModel, ids: list[int]) -> FloatArray:
    session = model.new_session(max_length=len(ids), expected_length=len(ids))
    logits = session.verify(ids).numpy()
    session.close()
    return logits


def oracle(folder: Path) -> Callable[[list[int]], FloatArray]:
    """Full forwards of transformers, without a cache."""
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def logits(ids: list[int]) -> FloatArray:
        with torch.inference_mode():
            rows: FloatArray = network(torch.tensor([ids]), use_cache=False).logits[0].numpy()
        return rows

    return logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {name: write_tiny_checkpoint(root / name, name) for name in TINY_ARCHITECTURES}


@pytest.fixture
def llama(folders: dict[str, Path]) -> Iterator[MlxModel]:
    model = load(folders["llama"])
    yield model
    model.close()


class TestMeansWhatTransformersMeans:
    @pytest.mark.oracle
    @pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
    def test_whole_prompts_and_steps(self, folders: dict[str, Path], architecture: str) -> None:
        """Beyond windows of 16 tokens, and on both sides of LongRoPE's boundary."""
        model, full_forward = load(folders[architecture]), oracle(folders[architecture])
        for count in (20, 31, BOUNDARY, BOUNDARY + 1, 60):
            ids = random_ids(count)  # In others phimoe's router meets ties of two experts.
            expected = full_forward(ids)
            np.testing.assert_allclose(verify(model, ids), expected, atol=TOLERANCE)
            session = model.new_session(max_length=count, expected_length=count)
            is_long = model.info.regime(count) == "long"
            first = BOUNDARY + 1 if is_long else count // 2
            rows = [session.prefill(ids[:first]).numpy()]
            rows += [session.decode(token).numpy() for token in ids[first:]]
            np.testing.assert_allclose(np.concatenate(rows), expected[first - 1 :], atol=TOLERANCE)
        model.close()

    @pytest.mark.parametrize("name", DECODERS)
    def test_constants_that_no_tiny_checkpoint_has(self, tmp_path: Path, name: str) -> None:
        """Divisors of frequencies, biases, windows in some layers, scales without exact roots."""
        checkpoint = random_decoder(DECODERS[name])
        model = load(with_tokenizer(write_folder(checkpoint, tmp_path)))
        ids = [token % 96 for token in random_ids(60)]
        np.testing.assert_allclose(verify(model, ids), numpy_logits(checkpoint, ids), atol=1e-4)
        model.close()

    def test_a_prompt_is_the_same_in_chunks(
        self, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ids = random_ids(60)
        for architecture in ("mistral", "gemma3_text", "phi3"):
            model = load(folders[architecture])
            whole = verify(model, ids)
            with monkeypatch.context() as patch:
                patch.setattr(mlx_session, "_CHUNK", 7)
                np.testing.assert_allclose(verify(model, ids), whole, atol=1e-4)
            model.close()

    @pytest.mark.parametrize("precision", ["fp16", "bf16"])
    def test_16_bits_are_computed_with_in_32(self, tmp_path: Path, precision: str) -> None:
        exact = random_decoder(DECODERS["llama"])
        folder = with_tokenizer(write_folder(exact, tmp_path, precision=precision))
        rounded = MemoryCheckpoint(exact.config)
        for name in exact.names():
            values = exact.tensor(name).float32()
            rounded.put(name, nearest(values, precision), "F32")
        model = load(folder)
        ids = list(range(3, 40))
        np.testing.assert_allclose(verify(model, ids), numpy_logits(rounded, ids), atol=1e-4)
        model.close()


class TestPhimoe:
    SCALING: ClassVar[dict[str, Any]] = {
        "type": "longrope",
        "rope_type": "longrope",
        "short_factor": [1.0] * 7 + [2.0],
        "long_factor": [4.0] * 8,
        "short_mscale": 1.25,
        "long_mscale": 1.25,
        "original_max_position_embeddings": BOUNDARY,
    }

    @pytest.mark.oracle
    def test_longrope(self, tmp_path: Path) -> None:
        """transformers 5.23 takes the short factors at every length, mlx-lm the long ones.

        phirt's transformers backend puts that right, and within the boundary is transformers.
        """
        folder = write_tiny_checkpoint(tmp_path, "phimoe")
        edit_config(folder, rope_scaling=self.SCALING)
        model, full_forward = load(folder), oracle(folder)
        assert model.info.rope_boundary == BOUNDARY
        artifact = read_folder(folder, formats=TransformersBackend.formats).artifact
        other = TransformersBackend().load(artifact, "cpu", LoadOptions())
        for count in (20, BOUNDARY, BOUNDARY + 1, 60):
            ids = random_ids(count)
            session = other.new_session(max_length=count, expected_length=count)
            expected = session.verify(ids).numpy()
            np.testing.assert_allclose(verify(model, ids), expected, atol=TOLERANCE)
            if count <= BOUNDARY:
                np.testing.assert_allclose(expected, full_forward(ids), atol=TOLERANCE)
            session.close()
        other.close()
        model.close()

    def test_two_scales_are_refused(self, tmp_path: Path) -> None:
        folder = write_tiny_checkpoint(tmp_path, "phimoe")
        edit_config(folder, rope_scaling=self.SCALING | {"long_mscale": 1.5})
        with pytest.raises(UnsupportedModelError, match="mscale"):
            load(folder)

    @pytest.mark.oracle
    def test_biases_may_be_missing(self, tmp_path: Path) -> None:
        """mlx-lm's classes always have them."""
        from safetensors.numpy import load_file, save_file

        folder = write_tiny_checkpoint(tmp_path, "phimoe")
        edit_config(folder, attention_bias=False, lm_head_bias=False)
        weights = load_file(folder / "model.safetensors")
        kept = {n: w for n, w in weights.items() if "proj.bias" not in n and n != "lm_head.bias"}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        model = load(folder)
        ids = random_ids(20)
        np.testing.assert_allclose(verify(model, ids), oracle(folder)(ids), atol=TOLERANCE)
        model.close()


class TestPackedWeights:
    @pytest.fixture(scope="class", params=["qwen3", "phimoe"])
    @classmethod
    def packed(
        cls, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
    ) -> tuple[Path, Path]:
        """What mlx-lm made of a checkpoint in 4 bits, and the checkpoint."""
        root = tmp_path_factory.mktemp("packed")
        source, target = write_tiny_checkpoint(root / "hf", request.param), root / "mlx"
        command = [sys.executable, "-m", "mlx_lm", "convert", "--hf-path", str(source)]
        command += ["--mlx-path", str(target), "-q", "--q-bits", "4", "--q-group-size", "32"]
        subprocess.run([*command, "--dtype", "float32"], check=True, capture_output=True)
        return target, source

    @pytest.mark.oracle
    def test_they_are_computed_as_transformers_computes_what_they_stand_for(
        self, packed: tuple[Path, Path]
    ) -> None:
        import mlx.core as mx
        from safetensors.numpy import load_file, save_file

        folder, plain = packed
        tensors = load_file(folder / "model.safetensors")
        decoded = {}
        for name, tensor in tensors.items():
            if tensor.dtype == np.uint32:
                scales, biases = (
                    mx.array(tensors[f"{name[:-6]}{p}"]) for p in ("scales", "biases")
                )
                values = mx.dequantize(mx.array(tensor), scales, biases, group_size=32, bits=4)
                decoded[name] = np.array(values)
            elif not name.endswith((".scales", ".biases")):
                decoded[name] = tensor
        save_file(apart(decoded), plain / "model.safetensors", metadata={"format": "pt"})
        assert read_folder(folder).artifact.format == "mlx"
        model = load(folder)
        ids = random_ids(40)
        np.testing.assert_allclose(verify(model, ids), oracle(plain)(ids), atol=TOLERANCE)
        model.close()

    @pytest.mark.oracle
    def test_a_packing_that_mlx_does_not_know_is_refused(
        self, packed: tuple[Path, Path], tmp_path: Path
    ) -> None:
        from safetensors.numpy import load_file, save_file

        for file in packed[0].iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        tensors = load_file(tmp_path / "model.safetensors")
        name = next(name for name in tensors if name.endswith("up_proj.scales"))
        tensors[name] = np.ascontiguousarray(tensors[name][..., :1])
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "model.safetensors.index.json").unlink(missing_ok=True)
        with pytest.raises(ModelFormatError, match="up_proj"):
            load(tmp_path)

    @pytest.mark.parametrize(
        ("changes", "complaint"),
        [
            ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
            ({"quantization": {"bits": 4, "group_size": 32, "mode": "mxfp4"}}, "mxfp4"),
        ],
    )
    def test_other_packings_are_refused(self, tmp_path, changes, complaint):
        write_tiny_checkpoint(tmp_path, "llama")
        artifact = read_folder(tmp_path, formats=MlxBackend.formats).artifact
        edit_config(tmp_path, **changes)
        verdict = MlxBackend().accepts(artifact, "cpu")
        assert isinstance(verdict, Reject)
        assert complaint in verdict.reason


class TestWork:
    def test_only_the_last_position_of_a_prompt_reaches_the_head(self, llama: MlxModel) -> None:
        assert llama.decoder is not None
        shapes: list[tuple[int, ...]] = []
        head = llama.decoder._head

        def watched(x: Any) -> Any:
            shapes.append(x.shape)
            return head(x)

        llama.decoder._head = watched
        session = llama.new_session(max_length=100, expected_length=50)
        session.prefill(random_ids(50))
        assert shapes == [(1, 1, 64)]

    def test_windows_leave_every_length_to_go_back_to(self, folders: dict[str, Path]) -> None:
        model = load(folders["mistral"])
        assert model.info.window == 16
        ids = random_ids(60)
        session = model.new_session(max_length=60, expected_length=60)
        session.prefill(ids)
        assert session.floor == 0
        session.truncate(3)
        rows = session.verify(ids[3:30]).numpy()
        np.testing.assert_allclose(rows, verify(model, ids)[3:30], atol=1e-4)
        model.close()

    def test_top_chooses_what_the_host_would(self, llama: MlxModel) -> None:
        session = llama.new_session(max_length=20, expected_length=20)
        logits = session.verify(random_ids(20))
        for k in (1, 5, llama.info.vocab_size):
            found, expected = logits.top(k), HostLogits(logits.numpy()).top(k)
            assert np.array_equal(found.ids, expected.ids)
            assert np.array_equal(found.values, expected.values)
            np.testing.assert_allclose(found.logsumexp, expected.logsumexp, rtol=1e-6)
        with pytest.raises(ValueError, match="vocabulary"):
            logits.top(0)

    def test_token_ids_outside_the_embedding_are_refused(self, llama: MlxModel) -> None:
        for token in (-1, llama.info.vocab_size):
            session = llama.new_session(max_length=4, expected_length=4)
            with pytest.raises(ValueError, match="Token ids"):
                session.prefill([1, token])

    def test_a_prompt_ends_between_two_layers_when_it_is_interrupted(self, llama: MlxModel) -> None:
        decoder = llama.decoder
        assert decoder is not None
        running, interrupted = threading.Event(), threading.Event()
        first, layers = decoder._layers[0], list(decoder._layers)

        def slow(*args: Any) -> Any:
            running.set()
            assert interrupted.wait(30)
            return first(*args)

        decoder._layers = [slow, lambda *args: pytest.fail("a layer ran after the interruption")]
        session = llama.new_session(max_length=100, expected_length=50)
        ended: list[type[BaseException]] = []

        def prefill() -> None:
            try:
                session.prefill(random_ids(50))
            except SessionClosedError as error:
                ended.append(type(error))

        thread = threading.Thread(target=prefill)
        thread.start()
        assert running.wait(30)
        session.interrupt()
        interrupted.set()
        thread.join(30)
        assert ended == [SessionClosedError]
        decoder._layers = layers
        assert llama.new_session(max_length=9, expected_length=9).prefill([1, 2]).numpy().any()

    def test_a_cache_of_another_shape_leaves_the_session_empty(self, llama: MlxModel) -> None:
        session = llama.new_session(max_length=20, expected_length=20)
        session.prefill(random_ids(10))
        cache = session.export_kv()
        other = llama.new_session(max_length=20, expected_length=20)
        with pytest.raises(ValueError, match="1 layers"):
            other.import_kv(KVCache(cache.layers[:1], 10, cache.weights_id))
        with pytest.raises(ValueError, match="this session needs"):
            other.import_kv(KVCache(cache.layers, 9, cache.weights_id))
        other.import_kv(cache)
        assert np.array_equal(other.decode(5).numpy(), session.decode(5).numpy())

    def test_closing_ends_the_threads(self, folders: dict[str, Path]) -> None:
        before = set(threading.enumerate())
        model = load(folders["llama"])
        session = model.new_session(max_length=9, expected_length=9)
        session.prefill([1, 2, 3])
        assert set(threading.enumerate()) - before
        model.close()
        session.close()
        assert not set(threading.enumerate()) - before


class TestDevices:
    def test_the_cpu_is_read_back(self, llama: MlxModel) -> None:
        assert llama.placement().device == "cpu"
        assert llama.placement().provider == "Device(cpu, 0)"

    def test_a_device_that_mlx_leaves_for_the_cpu(
        self, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Elsewhere(MlxTarget):
            """The GPU by name, whose operations go to the CPU."""

            def active(self) -> Any:
                return nullcontext()

        mx = import_module("mlx.core")
        target = Elsewhere(mx, "metal", mx.Device(mx.gpu, 0))
        monkeypatch.setattr(mlx_adapter, "_find_device", lambda mx, device: target)
        message = r"'metal' .* Device\(gpu, 0\), but .* 100% .* Device\(cpu, 0\)"
        with pytest.raises(DevicePlacementError, match=message):
            load(folders["llama"], "metal")

    def test_off_the_cpu_a_first_result_is_computed(
        self, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Which may be the first thing that fails."""
        monkeypatch.setattr(MlxTarget, "is_host", False)
        load(folders["llama"]).close()

        def fail(self: Decoder, *args: Any, **options: Any) -> None:
            raise RuntimeError("[metal::Device] Unable to load kernel")

        monkeypatch.setattr(Decoder, "forward", fail)
        with pytest.raises(BackendRuntimeError, match=r"trying the model out .* load kernel"):
            load(folders["llama"])

    def test_the_probe_names_the_cpu(self) -> None:
        found = {entry.device: entry.status for entry in MlxBackend().probe()}
        assert found["cpu"] == "found"

    @pytest.mark.parametrize("device", ["npu", "directml", "cuda:7"])
    def test_devices_that_mlx_has_not(self, folders: dict[str, Path], device: str) -> None:
        artifact = read_folder(folders["llama"], formats=MlxBackend.formats).artifact
        verdict = MlxBackend().accepts(artifact, device)
        assert isinstance(verdict, Reject)
        assert device in verdict.reason
        assert verdict.fix is not None
        with pytest.raises(DeviceNotAvailableError, match=device):
            load(folders["llama"], device)

    def test_there_are_no_settings(self, folders: dict[str, Path]) -> None:
        with pytest.raises(ValueError, match="wired_limit"):
            load(folders["llama"], extra={"wired_limit": 1})


class TestAFolderIsData:
    def test_a_file_of_code_is_refused(self, tmp_path: Path) -> None:
        folder = write_tiny_checkpoint(tmp_path, "llama")
        artifact = read_folder(folder, formats=MlxBackend.formats).artifact
        (folder / "custom.py").write_text("raise SystemExit('the planted code ran')")
        edit_config(folder, model_file="custom.py")
        verdict = MlxBackend().accepts(artifact, "cpu")
        assert isinstance(verdict, Reject)
        assert "custom.py" in verdict.reason
        with pytest.raises(UnsafeModelError):
            MlxBackend().load(artifact, "cpu", LoadOptions())

    def test_code_that_auto_map_names_is_not_looked_for(self, tmp_path: Path) -> None:
        folder = write_tiny_checkpoint(tmp_path, "llama")
        (folder / "modeling.py").write_text("raise SystemExit('the planted code ran')")
        edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling.Model"})
        load(folder).close()

    def test_a_folder_called_like_a_module_of_mlx_lm(self, tmp_path, monkeypatch) -> None:
        """mlx-lm imports whatever ``model_type`` names."""
        folder = write_tiny_checkpoint(tmp_path, "llama")
        edit_config(folder, model_type="../../evil")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UnsupportedModelError):
            load(folder)

    @pytest.mark.parametrize(
        ("name", "shape"),
        [
            ("model.layers.1.mlp.up_proj.weight", None),
            ("model.layers.1.mlp.up_proj.weight", (64, 64)),
            ("model.layers.9.mlp.up_proj.weight", (128, 64)),
        ],
        ids=["missing", "of another shape", "one too many"],
    )
    def test_tensors_that_are_not_those_of_the_model(self, tmp_path, name, shape) -> None:
        require("safetensors")
        numpy = import_module("safetensors.numpy")
        folder = write_tiny_checkpoint(tmp_path, "llama")
        weights = numpy.load_file(folder / "model.safetensors")
        weights.pop(name, None)
        if shape is not None:
            weights[name] = np.zeros(shape, np.float32)
        numpy.save_file(weights, folder / "model.safetensors")
        with pytest.raises(ModelFormatError):
            load(folder)

    def test_a_missing_head_is_not_taken_for_a_tied_one(self, tmp_path: Path) -> None:
        folder = write_tiny_checkpoint(tmp_path, "gemma3_text")
        with pytest.raises(ModelFormatError, match="lm_head"):
            load(edit_config(folder, tie_word_embeddings=False))

    def test_integers_are_no_weights_of_a_plain_folder(self, tmp_path: Path) -> None:
        require("safetensors")
        numpy = import_module("safetensors.numpy")
        folder = write_tiny_checkpoint(tmp_path, "llama")
        weights = numpy.load_file(folder / "model.safetensors")
        weights["model.norm.weight"] = np.zeros(64, np.uint32)
        numpy.save_file(weights, folder / "model.safetensors")
        with pytest.raises(UnsupportedModelError, match="U32"):
            load(folder)

    def test_an_architecture_that_was_not_compared(self, tmp_path: Path) -> None:
        folder = edit_config(write_tiny_checkpoint(tmp_path, "llama"), model_type="gpt_neox")
        with pytest.raises(ModelError, match="gpt_neox"):
            load(folder)


_QUESTION = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
    "<|im_start|>assistant\n"
)

_LOAD_ALONE = """
import resource, sys
before = resource.getrlimit(resource.RLIMIT_NOFILE)
from pathlib import Path
from phirt.backends.mlx import MlxBackend
from phirt.models.folder import read_folder
from phirt.protocols import LoadOptions
artifact = read_folder(Path(sys.argv[1]), formats=MlxBackend.formats).artifact
model = MlxBackend().load(artifact, "cpu", LoadOptions())
model.new_session(max_length=9, expected_length=9).prefill([1, 2, 3])
assert resource.getrlimit(resource.RLIMIT_NOFILE) == before
print(sorted({"torch", "transformers", "mlx_lm", "huggingface_hub"} & sys.modules.keys()))
"""

_DROPPED_AT_THE_END = """
import sys
from pathlib import Path
from phirt.backends.mlx import MlxBackend
from phirt.models.folder import read_folder
from phirt.protocols import LoadOptions
def main():
    artifact = read_folder(Path(sys.argv[1]), formats=MlxBackend.formats).artifact
    model = MlxBackend().load(artifact, "cpu", LoadOptions())
    model.new_session(max_length=9, expected_length=9).prefill([1, 2, 3])
main()
"""

_OUT_OF_MEMORY = """
import resource, sys
from pathlib import Path
from phirt.backends.mlx import MlxBackend
from phirt.errors import OutOfMemoryError
from phirt.models.folder import read_folder
from phirt.protocols import LoadOptions
artifact = read_folder(Path(sys.argv[1]), formats=MlxBackend.formats).artifact
model = MlxBackend().load(artifact, "cpu", LoadOptions())
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
try:
    model.new_session(max_length=1 << 20, expected_length=1 << 20)
except OutOfMemoryError as error:
    print("caught", end=" ")
session = model.new_session(max_length=1 << 20, expected_length=1)
try:
    session.prefill([5] * 20000)
except OutOfMemoryError as error:
    print("caught", end=" ")
session.close()
print(model.new_session(max_length=9, expected_length=9).prefill([1, 2, 3]).numpy().shape)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are POSIX")
class TestInAProcessOfItsOwn:
    def test_neither_mlx_lm_nor_what_it_imports_is_imported(self, folders: dict[str, Path]) -> None:
        """Importing it takes seconds and lowers the limit of open files for good."""
        assert run(_LOAD_ALONE, folders["llama"]) == "[]"

    def test_a_model_that_is_dropped_just_before_the_end(self, folders: dict[str, Path]) -> None:
        """Its thread has been told to end, and Python waits for that: MLX would abort."""
        for _ in range(3):
            assert run(_DROPPED_AT_THE_END, folders["llama"]) == ""

    @pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS binds on Linux")
    def test_no_memory_is_an_error_and_not_the_end(self, tmp_path: Path) -> None:
        """Row L9. MLX itself would die of a segmentation fault."""
        folder = write_tiny_checkpoint(tmp_path, "llama")
        edit_config(folder, max_position_embeddings=1 << 20)
        assert run(_OUT_OF_MEMORY, folder) == "caught caught (1, 320)"


def test_weights_that_do_not_fit_are_refused_before_they_are_read(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("phirt.backends.mlx.memory.mmap", SimpleNamespace(mmap=full))
    with pytest.raises(OutOfMemoryError, match="loading"):
        load(folders["llama"])


@pytest.mark.model
@pytest.mark.oracle
@pytest.mark.slow
def test_the_default_model_answers_as_transformers_does(
    tmp_path: Path, smollm2_gguf: Path, smollm2_oracle: Any
) -> None:
    import torch
    from tokenizers import Tokenizer

    from phirt.build.convert import convert

    convert(smollm2_gguf, tmp_path, layout="safetensors", precision="fp32")
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids: list[int] = tokenizer.encode(_QUESTION, add_special_tokens=False).ids
    model = load(tmp_path)
    session = model.new_session(max_length=100, expected_length=60)
    rows, count = [session.prefill(ids).numpy()], len(ids)
    while (token := int(rows[-1][0].argmax())) not in model.info.eos_token_ids:
        rows.append(session.decode(token).numpy())
        ids.append(token)
    assert tokenizer.decode(ids[count:]) == "The capital of France is Paris."
    with torch.inference_mode():
        expected = smollm2_oracle(torch.tensor([ids])).logits[0, count - 1 :].numpy()
    np.testing.assert_allclose(np.concatenate(rows), expected, atol=TOLERANCE)
    session.close()
    model.close()


def test_a_damaged_model_is_not_a_rejected_one(folders: dict[str, Path], tmp_path: Path) -> None:
    """Under "auto" no other backend is tried on it, and the error is the model's."""
    folder = shutil.copytree(folders["llama"], tmp_path / "damaged")
    artifact = read_folder(edit_config(folder, num_key_value_heads=3)).artifact
    assert MlxBackend().accepts(artifact, "cpu") == Accept()
    with pytest.raises(ModelFormatError, match="cannot share"):
        MlxBackend().load(artifact, "cpu", LoadOptions())


def test_a_process_exits_with_a_stream_open(folders: dict[str, Path]) -> None:
    """The destructor of the stream must not wake the model's thread, which would abort."""
    program = """
import sys, phirt
stream = phirt.load(sys.argv[1], backend="mlx").stream([1, 2, 3], max_new_tokens=9)
next(stream)
print("open")
"""
    assert run(program, folders["llama"]) == "open"


def test_a_process_exits_right_after_a_load_that_failed(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["llama"], tmp_path / "damaged")
    edit_config(folder, num_hidden_layers=3)
    program = """
import sys, phirt
for _ in range(3):
    try:
        phirt.load(sys.argv[1], backend="mlx")
    except phirt.ModelFormatError:
        print("damaged")
"""
    for _ in range(3):  # It is a race, lost every third time.
        assert run(program, folder).split() == ["damaged"] * 3


def run(program: str, folder: Path) -> str:
    result = subprocess.run(
        [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def with_tokenizer(folder: Path) -> Path:
    """A folder needs a tokenizer to be read, and not to be computed with."""
    (folder / "tokenizer.json").write_text("{}")
    return folder
