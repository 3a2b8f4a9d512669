"""`phirt.build_model`: what can be built, and what it says of itself."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest

import phirt
from phirt.build.recipe import Quantization
from phirt.building import BuildReport, build_model
from phirt.errors import EngineFailedError, UnsupportedModelError
from phirt.models.canary import read_canary
from phirt.models.hashing import sha256_of
from phirt.models.manifest import read_manifest
from phirt.testing import write_tiny_checkpoint
from phirt.types import FloatArray, Progress
from tests.build.onnx.runtime import OnnxDecoder, mean_kl
from tests.building.folders import content, initializers, is_whole
from tests.installed import require
from tests.tiny_gguf import write_tiny_llama_gguf

for package in ("onnxruntime", "openvino", "onnx"):
    require(package)

_REPOSITORY = Path(__file__).parents[1]
TOKENS = list(range(40, 64))

# What this machine can build and run, by format, and on which backend.
BACKENDS = {"onnx": "onnxruntime", "openvino": "openvino", "safetensors": "transformers"}
PRECISIONS = {
    "onnx": ("fp32", "fp16", "exact", "int8", "int4"),
    "openvino": ("fp32", "fp16", "exact", "int8", "int4"),
    "safetensors": ("fp32", "fp16", "bf16"),
}
BUILDS = [(name, precision) for name, each in PRECISIONS.items() for precision in each]


def nodes(folder: Path, kind: str) -> dict[str, Mapping[str, Any]]:
    """Attributes of the nodes of a kind, by name."""
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    return {
        node.name: {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        for node in model.graph.node
        if node.op_type == kind
    }


def build_section(folder: Path) -> Mapping[str, Any]:
    manifest = read_manifest(folder)
    assert manifest is not None
    return manifest.build


# What can be built.


@pytest.mark.parametrize(("kind", "precision"), BUILDS)
def test_what_is_built_loads_where_it_was_built_for_and_generates(llama, place, kind, precision):
    if kind == "safetensors":
        require("torch", "transformers")
    out = place / "out"
    told: list[Progress] = []
    report = build_model(
        llama, out, format=kind, precision=precision, offline=True, progress=told.append
    )
    assert [path.name for path in place.iterdir()] == ["out"]
    assert is_whole(out)
    assert told[-1].completed == told[-1].total
    with phirt.load(out, device="cpu", backend=BACKENDS[kind], offline=True) as model:
        assert (model.backend, model.device) == (BACKENDS[kind], "cpu")
        generation = model.generate(TOKENS, max_new_tokens=4, temperature=0, ignore_eos=True)
    assert len(generation.token_ids) == 4
    manifest, canary = read_manifest(out), read_canary(out)
    assert manifest is not None
    assert canary is not None
    assert report == BuildReport(
        path=out,
        format=kind,
        device="cpu",
        precision=precision,
        engine="phirt",
        architecture="llama",
        source=llama.name,
        source_id=manifest.source["id"],
        bytes=sum(path.stat().st_size for path in out.iterdir()),
        seconds=report.seconds,
        own_kl=canary.own_kl,
        quality=None,
    )
    is_lossless = precision in ("fp32", "exact")
    assert canary.own_kl == 0 if is_lossless else 0 < (canary.own_kl or 0) < 1
    assert json.loads(json.dumps(report.to_json()))["path"] == str(out)


@pytest.mark.slow  # engines, each in a process of its own
@pytest.mark.parametrize(
    "build",
    [
        ("mlx", "fp16", "mlx", "phirt"),  # which writes floats as mlx-lm would
        ("mlx", "int4", "mlx", "mlx-lm"),
        ("onnx", "int4", "model-builder", "onnxruntime-genai"),
        ("onnx", "fp32", "model-builder", "onnxruntime-genai"),
    ],
)
def test_what_others_engines_build_is_as_complete(llama, place, build):
    kind, precision, engine, package = build
    require("mlx", "mlx_lm") if engine == "mlx" else require("onnxruntime_genai", "torch")
    out = place / "out"
    chosen = "auto" if kind == "mlx" else engine
    report = build_model(llama, out, format=kind, precision=precision, engine=chosen)
    assert (report.engine, report.own_kl) == (engine, None)
    assert [path.name for path in place.iterdir()] == ["out"]
    assert is_whole(out)
    assert read_canary(out) is not None, "of the original weights"
    manifest = read_manifest(out)
    assert manifest is not None
    assert dict(manifest.build) == {
        "engine": engine,
        "options": {},
        "format": kind,
        "device": "cpu",
    }
    assert manifest.precision == precision
    assert {"phirt", package} <= set(manifest.versions)
    backend = "mlx" if kind == "mlx" else "onnxruntime-genai"
    with phirt.load(out, device="cpu", backend=backend) as model:
        generation = model.generate(TOKENS, max_new_tokens=4, temperature=0, ignore_eos=True)
    assert len(generation.token_ids) == 4


@pytest.mark.slow
def test_an_architecture_that_only_model_builder_knows_is_its_to_refuse(tmp_path, place):
    require("onnxruntime_genai", "torch")
    source = write_tiny_checkpoint(tmp_path / "source", "phimoe")
    with pytest.raises(UnsupportedModelError, match="builds for cuda in int4 alone"):
        build_model(source, place / "out", precision="fp32")
    assert not any(place.iterdir())
    # It reads what LongRoPE needs, which this tiny one has not, and ends with an exception.
    with pytest.raises(EngineFailedError, match="original_max_position_embeddings"):
        build_model(source, place / "a" / "out", device="cuda", precision="int4")
    assert not any(place.iterdir())


def test_what_a_folder_says_of_itself(tiny_gguf, place):
    out = place / "out"
    build_model(tiny_gguf, out, precision="int4", device="cpu")
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.source == {"name": tiny_gguf.name, "id": f"sha256:{sha256_of(tiny_gguf)}"}
    assert (manifest.architecture, manifest.precision) == ("llama", "int4")
    assert manifest.name == tiny_gguf.stem
    assert dict(manifest.build) == {
        "engine": "phirt",
        "recipe": "int4",
        "format": "onnx",
        "device": "cpu",
    }
    assert manifest.versions["phirt"] == phirt.__version__
    assert {"phirt", "converter", "gguf", "onnx"} <= set(manifest.versions)
    assert manifest.chat_template is not None


def test_a_build_for_a_device_is_another_model_than_for_another(llama, place):
    identities = set()
    for device in ("cpu", "cuda"):
        build_model(llama, place / device, precision="int4", device=device)
        manifest = read_manifest(place / device)
        assert manifest is not None
        assert manifest.build["device"] == device
        identities.add(manifest.weights_id)
    assert len(identities) == 2


@pytest.mark.parametrize(
    ("kind", "device", "precision"),
    [
        ("onnx", "cpu", "int8"),
        ("onnx", "cuda:1", "fp16"),
        ("openvino", "npu", "int8"),
        ("openvino", "gpu", "fp16"),
        ("safetensors", "cpu", "fp16"),
    ],
)
def test_the_precision_where_none_is_asked_for(llama, place, kind, device, precision):
    report = build_model(llama, place / "out", format=kind, device=device)
    assert report.precision == precision
    assert report.device == device.partition(":")[0]


@pytest.mark.slow  # Three runtimes are imported by a process of its own.
def test_phirt_run_answers_from_it_in_another_process(tiny_gguf, place):
    build_model(tiny_gguf, place / "out")
    done = subprocess.run(
        [sys.executable, "-m", "phirt", "run", "-m", "out", "Hello", "--max-new-tokens", "4"],
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(_REPOSITORY)},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_a_build_of_what_another_build_made(llama, place):
    build_model(llama, place / "floats", format="safetensors", precision="fp32")
    build_model(place / "floats", place / "out", precision="fp32")
    build_model(llama, place / "direct", precision="fp32")
    assert content(place / "out")["model.onnx.data"] == content(place / "direct")["model.onnx.data"]


# How int4 rounds.


def built_int4(source: Path, out: Path, *, device: str = "cpu", **quantization: Any) -> Path:
    chosen = Quantization(**quantization) if quantization else None
    return build_model(source, out, precision="int4", device=device, quantization=chosen).path


def test_zero_points_unless_they_are_not_wanted(llama, place):
    with_them = initializers(built_int4(llama, place / "asymmetric"))
    assert any(name.endswith("mlp/down_proj.zero_points") for name in with_them)
    without = initializers(built_int4(llama, place / "symmetric", symmetric=True))
    assert not any("zero_points" in name for name in without)
    assert without.keys() == {name for name in with_them if "zero_points" not in name}


@pytest.mark.parametrize("size", [16, 64])
def test_the_block_size_reaches_the_graph(llama, place, size):
    matrices = nodes(built_int4(llama, place / "out", block_size=size), "MatMulNBits")
    sizes = {each["block_size"] for each in matrices.values() if each["bits"] == 4}
    assert sizes == {size}


@pytest.mark.parametrize(
    ("patterns", "eight"),
    [
        ((), set()),
        (("lm_head",), {"/lm_head"}),
        (
            ("layers.0.mlp.*", "o_proj"),
            {
                "/model/layers.0/mlp/gate_up_proj",
                "/model/layers.0/mlp/down_proj",
                "/model/layers.0/attn/o_proj",
                "/model/layers.1/attn/o_proj",
            },
        ),
    ],
)
def test_the_patterns_say_what_keeps_8_bits(llama, place, patterns, eight):
    out = built_int4(llama, place / "out", int8_layers=patterns)
    matrices = nodes(out, "MatMulNBits")
    assert {name for name, each in matrices.items() if each["bits"] == 8} == eight
    assert len(matrices) == 9
    (embedding,) = nodes(out, "GatherBlockQuantized").values()
    assert embedding["bits"] == 4
    with phirt.load(out) as model:
        model.generate(TOKENS, max_new_tokens=2)
    assert build_section(out)["recipe"] == f"int4-b32-asym-{'+'.join(patterns) or 'none'}"


@pytest.mark.parametrize(
    ("patterns", "bits"), [((), 4), (("lm_head",), 8), (("embed_tokens",), 8), (("v_proj",), 4)]
)
def test_a_tied_lm_head_and_the_embedding_are_one_table(qwen, place, patterns, bits):
    out = built_int4(qwen, place / "out", int8_layers=patterns)
    (embedding,) = nodes(out, "GatherBlockQuantized").values()
    assert embedding["bits"] == nodes(out, "MatMulNBits")["/lm_head"]["bits"] == bits
    found = initializers(out)
    tables = [
        {each.key: each.value for each in found[name].external_data}
        for name in ("/model/embed_tokens.quantized", "/lm_head.quantized")
    ]
    assert tables[0] == tables[1], "the same bytes"
    with phirt.load(out) as model:
        model.generate(TOKENS, max_new_tokens=2)


def test_a_calibrated_build_is_another_and_leaves_nothing_beside_it(llama, place):
    own_kl: dict[bool, float] = {}
    for calibrate in (False, True):
        report = build_model(
            llama,
            place / f"{calibrate}",
            precision="int4",
            quantization=Quantization(calibrate=calibrate, symmetric=True, int8_layers=()),
        )
        assert report.own_kl is not None
        own_kl[calibrate] = report.own_kl
    # That it is closer is told by more than eight positions of a random model: test_calibration.
    assert own_kl[True] != own_kl[False]
    assert sorted(path.name for path in place.iterdir()) == ["False", "True"]
    assert is_whole(place / "True")
    assert build_section(place / "True")["recipe"] == "int4-b32-sym-none-calibrated"
    assert initializers(place / "True").keys() == initializers(place / "False").keys()


def test_an_npu_gets_what_its_compiler_takes(tmp_path, place):
    source = write_tiny_llama_gguf(tmp_path / "wide.gguf", hidden=128, heads=4)
    build_model(source, place / "npu", format="openvino", precision="int4", device="npu")
    assert build_section(place / "npu")["recipe"].startswith("int4-b128-sym")
    own = Quantization(block_size=64)
    build_model(
        source,
        place / "own",
        format="openvino",
        precision="int4",
        device="npu",
        quantization=own,
    )
    assert build_section(place / "own")["recipe"].startswith("int4-b64-asym")


# Graphs for GPUs, which compute in float16.


def logits_of(folder: Path, *, keep: int = len(TOKENS)) -> FloatArray:
    return OnnxDecoder(folder / "model.onnx").run(TOKENS, keep=keep)


@pytest.mark.parametrize(
    ("device", "precision"),
    [
        ("cuda", "fp16"),
        ("cuda", "int8"),
        ("cuda", "int4"),
        ("webgpu", "int4"),
        ("directml", "fp16"),
        ("directml", "int4"),
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "phi3", "gemma3_text"])
def test_a_graph_for_a_gpu_computes_in_float16(tmp_path, architecture, device, precision):
    source = write_tiny_checkpoint(tmp_path / "source", architecture)
    gpu, cpu, fp32 = (tmp_path / name for name in ("gpu", "cpu", "fp32"))
    build_model(source, gpu, precision=precision, device=device)
    build_model(source, cpu, precision=precision)
    build_model(source, fp32, precision="fp32")
    model = onnx.load(str(gpu / "model.onnx"), load_external_data=False)
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in (*model.graph.input, *model.graph.output)
        if "ids" not in value.name and "mask" not in value.name and "num_logits" not in value.name
    }
    assert {"logits", "past_key_values.0.key", "present.1.value"} <= types.keys()
    assert set(types.values()) == {onnx.TensorProto.FLOAT16}
    wide = [tensor.name for tensor in model.graph.initializer if _is_wide(tensor)]
    assert wide == [], "nothing in float32 but small constants"
    original = logits_of(fp32)
    # What float16 costs is little beside what rounding the weights does.
    most = 1.25 * mean_kl(original, logits_of(cpu)) + 1e-4
    assert 0 < mean_kl(original, logits_of(gpu)) < most
    assert build_section(gpu)["recipe"].startswith(f"{precision}-half")


def _is_wide(tensor: onnx.TensorProto) -> bool:
    return bool(tensor.data_type == onnx.TensorProto.FLOAT and math.prod(tensor.dims) > 64)
