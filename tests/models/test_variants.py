"""Which build of a repository is taken; the file lists are shaped as published ones are."""

from __future__ import annotations

import pytest

from phirt.errors import ModelNotFoundError, UnsafeModelError, UnsupportedModelError
from phirt.models.layouts import ONNX_NAMES
from phirt.models.variants import GGUF, Variant, choose_variant, list_variants

GENAI = ("onnx-genai", "onnx")
CHECKPOINTS = ("safetensors", GGUF)

_TEXTS = {"config.json": 900, "tokenizer.json": 1_800_000, "tokenizer_config.json": 3_000}


def beside(folder: str, files: dict[str, int]) -> dict[str, int]:
    """Files in a folder, with the small ones that every build has."""
    return {f"{folder}/{name}".lstrip("/"): size for name, size in (_TEXTS | files).items()}


def graph(size: int) -> dict[str, int]:
    return {"genai_config.json": 1_600, "model.onnx": 52_000_000, "model.onnx.data": size}


PHI = {
    "README.md": 10_000,
    "config.json": 900,
    "configuration_phi3.py": 10_400,
    **beside("cpu_and_mobile/cpu-int4-rtn-block-32", graph(2_650_000_000)),
    **beside("cpu_and_mobile/cpu-int4-rtn-block-32-acc-level-4", graph(2_660_000_000)),
    **beside("cuda/cuda-fp16", graph(7_600_000_000)),
    **beside("cuda/cuda-int4-rtn-block-32", graph(2_280_000_000)),
    **beside("directml/directml-int4-awq-block-128", graph(2_130_000_000)),
}
SMOL = {
    **beside("", {"model.safetensors": 720_000_000, "generation_config.json": 130}),
    "training_args.bin": 5_000,
    "adapter_model.safetensors": 9_000_000,
    "onnx/model.onnx": 300_000,
    "onnx/model.onnx_data": 1_640_000_000,
    "onnx/model_q4.onnx": 417_000_000,
    "onnx/model_fp16.onnx": 819_000_000,
}
OPENVINO = {
    **beside("", {"openvino_model.xml": 2_600_000, "openvino_model.bin": 2_150_000_000}),
    "openvino_tokenizer.xml": 23_000,
    "openvino_tokenizer.bin": 1_260_000,
    "configuration_phi3.py": 11_000,
}
SHARDS = {
    **beside("", {"model.safetensors.index.json": 24_000}),
    "model-00001-of-00002.safetensors": 5_000_000_000,
    "model-00002-of-00002.safetensors": 2_670_000_000,
    "consolidated.safetensors": 7_670_000_000,
}
GGUFS = {
    "Qwen-Q2_K.gguf": 339_000_000,
    "Qwen-Q4_K_M.gguf": 398_000_000,
    "Qwen-Q8_0.gguf": 531_000_000,
    "Qwen-F16.gguf": 994_000_000,
    "big-00001-of-00002.gguf": 10,
    "mmproj-F16.gguf": 20,
}


def choose(files, formats, device="cpu", repository="org/name", path=None):
    return choose_variant(files, formats=formats, device=device, repository=repository, path=path)


@pytest.mark.parametrize(
    ("device", "folder"),
    [
        ("cpu", "cpu_and_mobile/cpu-int4-rtn-block-32-acc-level-4"),
        ("cuda", "cuda/cuda-int4-rtn-block-32"),
        ("directml", "directml/directml-int4-awq-block-128"),
    ],
)
def test_a_graph_is_taken_for_the_device_that_it_was_exported_for(device, folder):
    variant = choose(PHI, GENAI, device)
    assert (variant.format, variant.folder, variant.precision) == ("onnx-genai", folder, "int4")
    assert variant.size == sum(PHI[name] for name in variant.files)


def test_only_the_files_of_the_build_are_taken_and_no_code():
    variant = choose(PHI, GENAI)
    assert {name.rpartition("/")[0] for name in variant.files} == {variant.folder}
    assert {name.rpartition("/")[2] for name in variant.files} == {
        *_TEXTS,
        "genai_config.json",
        "model.onnx",
        "model.onnx.data",
    }


def test_a_build_for_gpus_serves_any_gpu_but_not_the_cpu():
    files = beside("gpu/gpu-int4-rtn-block-32", graph(3_400_000_000))
    assert choose(files, GENAI, "cuda").folder == "gpu/gpu-int4-rtn-block-32"
    assert choose(files, GENAI, "webgpu").devices == {"gpu"}
    with pytest.raises(UnsupportedModelError, match=r"nothing that fits onnx-genai .* on cpu"):
        choose(files, GENAI)


@pytest.mark.parametrize("device", ["npu", "openvino-cpu"])
def test_what_was_exported_for_the_cpu_serves_devices_that_take_any_graph(device):
    assert choose(PHI, GENAI, device).devices == {"cpu"}


def test_a_backend_gets_the_layout_that_it_likes_best():
    assert choose(SMOL, (*GENAI, *CHECKPOINTS)).format == "onnx"
    assert choose(SMOL, ("mlx", "safetensors")).format == "safetensors"
    assert choose(OPENVINO, ("openvino", *GENAI)).format == "openvino"
    assert choose(SMOL, ("openvino", *CHECKPOINTS)).format == "safetensors"


def test_of_several_graphs_one_is_taken_with_its_data():
    variant = choose(SMOL, GENAI)
    assert variant.files[-2:] == ("onnx/model.onnx", "onnx/model.onnx_data")
    assert not any("q4" in name or "fp16" in name for name in variant.files)
    assert choose(SMOL, GENAI, path="onnx/model_q4.onnx").files[-1] == "onnx/model_q4.onnx"


@pytest.mark.parametrize("name", ONNX_NAMES)
def test_every_graph_that_a_folder_may_hold_is_known(name):
    assert choose(beside("", {name: 1}), GENAI).precision == ONNX_NAMES[name]


def test_openvino_weights_are_no_pickle_and_its_tokenizer_is_not_wanted():
    variant = choose(OPENVINO, ("openvino",))
    assert set(variant.files) == {*_TEXTS, "openvino_model.xml", "openvino_model.bin"}


def test_safetensors_are_those_that_the_index_names():
    files = choose(SHARDS, CHECKPOINTS).files
    assert [name for name in files if name.endswith(".safetensors")] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert "model.safetensors.index.json" in files


def test_adapters_and_pickles_are_left():
    files = choose(SMOL, ("safetensors",)).files
    assert set(files) == {*_TEXTS, "generation_config.json", "model.safetensors"}


def test_safetensors_of_mlx_are_not_taken_for_plain_ones():
    with pytest.raises(UnsupportedModelError, match="It holds: mlx"):
        choose(SHARDS, CHECKPOINTS, repository="mlx-community/name-4bit")
    variant = choose(SHARDS, ("mlx",), repository="mlx-community/name-4bit")
    assert variant.format == "mlx"


def test_of_gguf_files_the_one_that_loses_least_at_a_reasonable_size_is_taken():
    assert choose(GGUFS, CHECKPOINTS).files == ("Qwen-Q8_0.gguf",)
    assert choose(GGUFS, CHECKPOINTS, path="Qwen-Q4_K_M.gguf").files == ("Qwen-Q4_K_M.gguf",)
    assert not any("mmproj" in v.files[0] for v in list_variants(GGUFS, repository="x"))


def test_a_folder_narrows_the_choice():
    variant = choose(PHI, GENAI, "cuda", path="cuda/cuda-fp16/")
    assert (variant.folder, variant.precision) == ("cuda/cuda-fp16", "fp16")
    with pytest.raises(ModelNotFoundError, match=r"no file or folder 'cude'.*cuda/cuda-fp16"):
        choose(PHI, GENAI, "cuda", path="cude")


def test_a_build_without_a_tokenizer_is_none():
    files = {name: size for name, size in OPENVINO.items() if name != "tokenizer.json"}
    with pytest.raises(UnsupportedModelError, match=r"no model in a form.*tokenizer\.json"):
        choose(files, ("openvino",))


def test_pickles_alone_are_refused():
    with pytest.raises(UnsafeModelError, match=r"pickle \(pytorch_model\.bin\)"):
        choose(beside("", {"pytorch_model.bin": 500}), CHECKPOINTS)


def test_an_empty_repository_is_unsupported():
    with pytest.raises(UnsupportedModelError, match="end in: nothing"):
        choose({}, CHECKPOINTS)


def test_a_variant_describes_itself():
    assert choose(PHI, GENAI, "cuda").described == (
        "onnx-genai, int4, 2,334 MB, in cuda/cuda-int4-rtn-block-32"
    )
    assert choose(GGUFS, CHECKPOINTS).described == "gguf, q8_0, 531 MB, in Qwen-Q8_0.gguf"


_TEXT_SIZES = {"config.json": 1, "tokenizer.json": 1}


def _choose(sizes: dict[str, int], *, device: str = "cpu", path: str | None = None) -> Variant:
    formats = ("onnx-genai", "onnx", "safetensors", GGUF)
    return choose_variant(sizes, formats=formats, device=device, repository="o/r", path=path)


def test_a_build_for_cuda_among_those_for_gpus_is_for_cuda_alone():
    build = {"genai_config.json": 1, "tokenizer.json": 1, "model.onnx": 5}
    folders = ("gpu/cuda-fp16", "gpu/gpu-int4")
    sizes = {f"{folder}/{name}": size for folder in folders for name, size in build.items()}
    assert _choose(sizes, device="directml").folder == "gpu/gpu-int4"
    assert _choose(sizes, device="cuda").folder == "gpu/cuda-fp16"


def test_statistics_for_quantizing_are_no_model():
    assert _choose({"a-imatrix.gguf": 1, "a-Q3_K_S.gguf": 5}).files == ("a-Q3_K_S.gguf",)


def test_of_two_sets_of_shards_the_one_that_the_index_names_is_taken():
    shards = {f"model-0000{part}-of-00002.safetensors": 5 for part in (1, 2)}
    other = {"model.fp16-00001-of-00001.safetensors": 5}
    sizes = {**_TEXT_SIZES, "model.safetensors.index.json": 1, **shards, **other}
    assert not set(other) & set(_choose(sizes).files)
    assert set(shards) <= set(_choose(sizes).files)


def test_a_folder_of_graphs_alone_may_be_named():
    sizes = {**_TEXT_SIZES, "onnx/model.onnx": 5, "model.safetensors": 9}
    files = _choose(sizes, path="onnx").files
    assert set(files) == {"config.json", "tokenizer.json", "onnx/model.onnx"}


def test_a_gguf_file_in_parts_is_said_to_be_what_it_is():
    with pytest.raises(UnsupportedModelError, match="in several parts"):
        _choose({"a-q8_0-00001-of-00002.gguf": 5, "a-q8_0-00002-of-00002.gguf": 5})
