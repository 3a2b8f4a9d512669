"""The engines themselves, on tiny models: what they write loads, and says what it should."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import phirt
from phirt.build.engines.environments import find_engine
from phirt.build.engines.mlx import build_with_mlx
from phirt.build.engines.model_builder import build_with_model_builder, supported_architectures
from phirt.errors import EngineFailedError
from phirt.testing import write_tiny_checkpoint
from phirt.testing.checkpoints import safetensors_bytes
from phirt.types import FloatArray
from tests.installed import require
from tests.tiny_gguf import write_tiny_llama_gguf

pytestmark = [pytest.mark.slow, pytest.mark.oracle]

# Longer than the tiny phi3's short LongRoPE (32), and than the windows of mistral and gemma3.
PROMPT = [int(token) for token in np.random.default_rng(0).integers(5, 300, 48)]


def scores(folder: Path, backend: str) -> FloatArray:
    with phirt.load(folder, backend=backend, device="cpu") as model:
        return model.score(PROMPT)


def generated(folder: Path, backend: str) -> int:
    with phirt.load(folder, backend=backend, device="cpu") as model:
        return len(model.generate(PROMPT, max_new_tokens=4, ignore_eos=True).token_ids)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def out_dir(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


class TestModelBuilder:
    @pytest.fixture(autouse=True)
    def installed(self):
        require("onnxruntime_genai", "torch", "transformers", "onnx", "onnx_ir")

    @pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3"])
    def test_fp32_computes_what_the_reference_does(self, architecture, tmp_path, out_dir):
        source = write_tiny_checkpoint(tmp_path / architecture, architecture)
        built = build_with_model_builder(source, out_dir, precision="fp32")
        assert built.architecture == architecture
        assert {"onnxruntime-genai", "torch", "onnx-ir"} <= built.versions.keys()
        assert np.abs(scores(out_dir, "onnxruntime") - scores(source, "reference")).max() < 1e-3

    @pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3"])
    def test_int4_loads_and_generates(self, architecture, tmp_path, out_dir):
        source = write_tiny_checkpoint(tmp_path / architecture, architecture)
        build_with_model_builder(source, out_dir, precision="int4", options={"block_size": "16"})
        assert generated(out_dir, "onnxruntime") == 4

    def test_a_gguf_file(self, tmp_path, out_dir):
        source = write_tiny_llama_gguf(tmp_path / "tiny.gguf", encoding="Q4_1")
        build_with_model_builder(source, out_dir, precision="fp32")
        with phirt.load(source, backend="onnxruntime", device="cpu", precision="fp32") as model:
            expected = model.score(PROMPT)
        assert np.abs(scores(out_dir, "onnxruntime") - expected).max() < 1e-3

    def test_the_language_model_of_phi_3_vision(self, tmp_path, out_dir):
        """Its tensors, those of a vision tower beside them, and code that is not run."""
        plain = write_tiny_checkpoint(tmp_path / "phi3", "phi3")
        source = tmp_path / "phi3v"
        shutil.copytree(plain, source)
        first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
        (source / "model.safetensors").rename(source / first)
        tower = {"model.vision_embed_tokens.glb_GN": np.ones((1, 1, 64), np.float32)}
        (source / second).write_bytes(safetensors_bytes(tower))
        places = dict.fromkeys(tensor_names(source / first), first) | dict.fromkeys(tower, second)
        index = {"metadata": {}, "weight_map": places}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
        edit(
            source / "config.json",
            architectures=["Phi3VForCausalLM"],
            model_type="phi3_v",
            auto_map={"AutoConfig": "configuration_phi3_v.Phi3VConfig"},
            img_processor={"name": "clip_vision_model"},
            embd_layer={"embedding_cls": "image"},
            _attn_implementation="flash_attention_2",
        )
        (source / "configuration_phi3_v.py").write_text("raise SystemExit('run')")
        assert build_with_model_builder(source, out_dir, precision="fp32").architecture == "phi3"
        assert np.abs(scores(out_dir, "onnxruntime") - scores(plain, "reference")).max() < 1e-3

    def test_the_moe_is_what_this_version_cannot_build(self, tmp_path, out_dir):
        """0.18 names the architecture, and refuses its LongRoPE; docs/engines.md says so."""
        source = write_tiny_checkpoint(tmp_path / "phimoe", "phimoe")
        phi3 = write_tiny_checkpoint(tmp_path / "phi3", "phi3")
        longrope = json.loads((phi3 / "config.json").read_text())["rope_scaling"]
        edit(
            source / "config.json",
            max_position_embeddings=128,
            original_max_position_embeddings=32,
            rope_scaling={
                **longrope,
                "short_mscale": 1.2,
                "long_mscale": 1.2,
                "original_max_position_embeddings": 32,
            },
        )
        assert "PhiMoEForCausalLM" in supported_architectures(find_engine("model-builder"))
        with pytest.raises(EngineFailedError, match="The longrope RoPE style is not currently"):
            build_with_model_builder(source, out_dir, precision="int4", device="cuda")

    @pytest.mark.parametrize(("device", "precision"), [("cuda", "fp16"), ("directml", "int4")])
    def test_a_graph_for_another_machine_is_written_here(
        self, device, precision, tmp_path, out_dir
    ):
        source = write_tiny_checkpoint(tmp_path / "phi3", "phi3")
        build_with_model_builder(source, out_dir, precision=precision, device=device)
        document = json.loads((out_dir / "genai_config.json").read_text())
        (provider,) = document["model"]["decoder"]["session_options"]["provider_options"]
        assert list(provider) == [{"cuda": "cuda", "directml": "dml"}[device]]


def tensor_names(file: Path) -> list[str]:
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return [name for name in header if name != "__metadata__"]


class TestMlx:
    @pytest.fixture(autouse=True)
    def installed(self):
        require("mlx", "mlx_lm")

    @pytest.mark.parametrize(
        "architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3"]
    )
    @pytest.mark.parametrize(("precision", "group_size"), [("int4", "32"), ("int8", "64")])
    def test_mlx_computes_what_the_quantized_weights_say(
        self, architecture, precision, group_size, tmp_path, out_dir
    ):
        source = write_tiny_checkpoint(tmp_path / architecture, architecture)
        options = {"group_size": group_size, "dtype": "float32"}
        build_with_mlx(source, out_dir, precision=precision, options=options)
        assert json.loads((out_dir / "config.json").read_text())["quantization"] == {
            "bits": int(precision.removeprefix("int")),
            "group_size": int(group_size),
            "mode": "affine",
        }
        rounded = dequantize(out_dir, source, tmp_path / "rounded")
        difference = np.abs(scores(out_dir, "mlx") - scores(rounded, "reference"))
        assert difference.max() < 1e-3
        assert generated(out_dir, "mlx") == 4

    @pytest.mark.parametrize(
        ("precision", "tolerance"), [("fp32", 1e-3), ("fp16", 0.1), ("bf16", 1.0)]
    )
    @pytest.mark.parametrize("architecture", ["llama", "phi3"])
    def test_what_is_not_quantized(self, architecture, precision, tolerance, tmp_path, out_dir):
        source = write_tiny_checkpoint(tmp_path / architecture, architecture)
        build_with_mlx(source, out_dir, precision=precision)
        difference = np.abs(scores(out_dir, "mlx") - scores(source, "reference"))
        assert difference.max() < tolerance


def dequantize(quantized: Path, source: Path, folder: Path) -> Path:
    """A folder of float32 with the values that mlx-lm's integers, scales and offsets stand for."""
    import mlx.core as mx

    settings = json.loads((quantized / "config.json").read_text())["quantization"]
    # What it returns depends on the kind of file, and is Any where mlx is not installed.
    weights = cast("dict[str, Any]", mx.load(str(quantized / "model.safetensors")))
    plain = {}
    for name, values in weights.items():
        if name.endswith((".scales", ".biases")):
            continue
        stem = name.removesuffix(".weight")
        if f"{stem}.scales" in weights:
            values = mx.dequantize(  # noqa: PLW2901
                values,
                weights[f"{stem}.scales"],
                weights[f"{stem}.biases"],
                settings["group_size"],
                settings["bits"],
            )
        plain[name] = np.array(values.astype(mx.float32))
    shutil.copytree(source, folder)
    (folder / "model.safetensors").write_bytes(safetensors_bytes(plain))
    return folder
