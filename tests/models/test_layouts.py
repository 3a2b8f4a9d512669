"""Every layout of a model folder, alone, beside another, damaged, and in Hugging Face's cache."""

from __future__ import annotations

import logging
import shutil

import pytest

from phirt.errors import (
    ModelFormatError,
    ModelNotFoundError,
    UnsafeModelError,
    UnsupportedModelError,
)
from phirt.models.folder import FORMATS, held_formats, read_folder
from phirt.models.manifest import write_manifest
from phirt.models.onnx_safety import check_onnx_files
from tests.models.model_files import (
    WEIGHTS,
    WRITERS,
    hub_config,
    write_hub_folder,
    write_json,
    write_model_folder,
    write_onnx_folder,
    write_openvino_folder,
    write_safetensors_folder,
    write_snapshot,
)

GRAPHS = {
    "onnx-genai": "model.onnx",
    "openvino": "openvino_model.xml",
    "onnx": "onnx/model.onnx",
    "mlx": None,
    "safetensors": None,
}
WEIGHT_FILES = {
    "onnx-genai": "model.onnx.data",
    "openvino": "openvino_model.bin",
    "onnx": "onnx/model.onnx_data",
    "mlx": "model.safetensors",
    "safetensors": "model.safetensors",
}


@pytest.fixture(params=FORMATS)
def layout(request):
    """Each layout's name."""
    return request.param


@pytest.fixture
def model(layout, tmp_path):
    """A folder of it."""
    return WRITERS[layout](tmp_path / "model")


class TestEveryLayout:
    def test_says_the_same_about_the_model(self, layout, model):
        folder = read_folder(model, name="mine")
        assert (folder.artifact.name, folder.artifact.path) == ("mine", model)
        assert (folder.artifact.format, folder.artifact.architecture) == (layout, "llama")
        facts = folder.facts
        assert (facts.vocab_size, facts.context_length) == (16, 64)
        assert (facts.num_layers, facts.num_kv_heads, facts.head_size) == (3, 1, 4)
        assert (facts.bos_token_id, facts.pad_token_id) == (1, 2)
        assert facts.eos_token_ids == {2}
        assert folder.tokenizer_path == model / "tokenizer.json"
        assert folder.chat_template == "{{ messages }}"
        assert folder.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
        graph = GRAPHS[layout]
        assert folder.model_path == (None if graph is None else model / graph)
        assert (folder.decoder is None) == (layout != "onnx-genai")

    def test_is_held_and_found_by_name(self, layout, model):
        assert held_formats(model) == (layout,)
        assert read_folder(model, formats=[layout]).artifact.format == layout

    def test_is_refused_where_others_were_asked_for(self, layout, model):
        others = [name for name in FORMATS if name != layout]
        with pytest.raises(UnsupportedModelError, match=f"holds the layout '{layout}'"):
            read_folder(model, formats=others)

    def test_unites_the_stop_ids(self, model):
        write_json(model / "generation_config.json", {"eos_token_id": [3, 4], "temperature": 0.6})
        folder = read_folder(model)
        assert folder.facts.eos_token_ids == {2, 3, 4}
        assert folder.generation_defaults["temperature"] == 0.6

    def test_has_the_identity_that_its_converter_recorded(self, model):
        write_manifest(
            model,
            weights_id="sha256:abc",
            architecture="llama",
            precision="fp32",
            source={},
            versions={},
        )
        artifact = read_folder(model).artifact
        assert (artifact.weights_id, artifact.precision) == ("sha256:abc", "fp32")

    def test_has_a_fingerprint_of_its_weights(self, layout, model):
        first = read_folder(model).artifact.weights_id
        (model / "chat_template.jinja").write_text("another")
        assert read_folder(model).artifact.weights_id == first
        weights = model / WEIGHT_FILES[layout]
        # The last bytes: of a tensor's values in every layout.
        weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
        assert read_folder(model).artifact.weights_id != first

    def test_m10_is_read_through_the_links_of_a_hugging_face_cache(self, model, tmp_path, link):
        snapshot = write_snapshot(model, tmp_path / "hub", link)
        there, here = read_folder(snapshot), read_folder(model)
        assert there.facts == here.facts
        assert there.decoder == here.decoder
        assert (there.artifact.format, there.chat_template) == (
            here.artifact.format,
            here.chat_template,
        )

    def test_m10_a_link_that_leaves_the_cached_repository_is_refused(
        self, layout, model, tmp_path, link
    ):
        snapshot = write_snapshot(model, tmp_path / "hub", link)
        outside = tmp_path / "hub" / "models--other--repository" / "blobs" / "x"
        outside.parent.mkdir(parents=True)
        shutil.copy(snapshot / WEIGHT_FILES[layout], outside)
        (snapshot / WEIGHT_FILES[layout]).unlink()
        link(snapshot / WEIGHT_FILES[layout], outside)
        with pytest.raises(UnsafeModelError, match="leads out of the model folder"):
            read_folder(snapshot)

    def test_m14_hostile_json_is_a_typed_error(self, model):
        for file in sorted(model.glob("*config.json")):
            intact = file.read_bytes()
            file.write_text('{"a":' + "[" * 100_000)
            with pytest.raises(ModelFormatError, match=file.name):
                read_folder(model)
            file.write_bytes(intact)

    def test_m2_code_that_it_names_is_not_run_and_not_needed(self, model, tmp_path, caplog):
        plant(model, tmp_path / "ran")
        auto_map = {"AutoConfig": "planted.Config", "AutoModelForCausalLM": "planted.Model"}
        write_json(model / "config.json", hub_config(auto_map=auto_map) | kept_quantization(model))
        tokenizer = {
            "tokenizer_class": "Planted",
            "auto_map": {"AutoTokenizer": ["planted.T", None]},
        }
        write_json(model / "tokenizer_config.json", tokenizer)
        with caplog.at_level(logging.INFO, logger="phirt"):
            read_folder(model)
        assert "config.json names code of the model's own" in caplog.text
        assert "tokenizer_config.json names code of the model's own" in caplog.text
        assert not (tmp_path / "ran").exists()

    def test_m2_code_that_is_the_model_is_refused(self, model, tmp_path):
        plant(model, tmp_path / "ran")
        write_json(model / "config.json", hub_config(model_file="planted.py"))
        with pytest.raises(UnsafeModelError, match=r"model_file = 'planted\.py'"):
            read_folder(model)
        assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        *((layout, "tokenizer.json") for layout in FORMATS),
        *((layout, "config.json") for layout in FORMATS if layout != "onnx-genai"),
        ("onnx-genai", "model.onnx"),
        ("openvino", "openvino_model.bin"),
    ],
)
def test_a_file_that_is_missing_is_named(tmp_path, layout, name):
    model = WRITERS[layout](tmp_path / "model")
    (model / name).unlink()
    with pytest.raises(ModelNotFoundError, match=f"lacks {name}|is not a model folder"):
        read_folder(model)


def plant(model, proof):
    """Put a module into the folder that leaves a proof if it is ever run."""
    source = f"import pathlib\npathlib.Path({str(proof)!r}).touch()\n"
    (model / "planted.py").write_text(source)


def kept_quantization(model):
    from phirt.models.safe_json import read_json

    file = model / "config.json"
    document = read_json(file) if file.exists() else {}
    return {key: document[key] for key in ("quantization",) if key in document}


class TestSeveralLayouts:
    def test_the_first_that_is_asked_for_is_taken(self, tmp_path):
        model = write_openvino_folder(write_safetensors_folder(tmp_path / "model"))
        assert held_formats(model) == ("openvino", "safetensors")
        assert read_folder(model).artifact.format == "openvino"
        for formats in (["safetensors", "openvino"], ["mlx", "safetensors"]):
            assert read_folder(model, formats=formats).artifact.format == "safetensors"

    def test_a_layout_that_does_not_exist_is_a_mistake_of_the_caller(self, tmp_path):
        model = write_safetensors_folder(tmp_path / "model")
        with pytest.raises(ValueError, match="'tensorrt' is not one of onnx-genai"):
            read_folder(model, formats=["tensorrt"])

    def test_facts_that_a_genai_configuration_has_no_field_for(self, tmp_path):
        model = write_model_folder(tmp_path / "model")
        rope = {"type": "longrope", "short_factor": [1, 1], "long_factor": [2, 2]}
        config = hub_config(
            rope_scaling=rope, original_max_position_embeddings=32, sliding_window=24
        ) | {"model_type": "phi3", "eos_token_id": [2, 7], "vocab_size": 17}
        write_json(model / "config.json", config)
        facts = read_folder(model).facts
        assert (facts.rope_boundary, facts.window) == (32, 24)
        assert facts.eos_token_ids == {2, 7}
        assert (facts.vocab_size, facts.architecture) == (16, "llama")  # of the graph

    def test_a_folder_of_adapters_is_no_model(self, tmp_path):
        model = write_hub_folder(tmp_path / "model")
        (model / "adapter_model.safetensors").write_bytes(b"")
        with pytest.raises(ModelNotFoundError, match=r"it holds adapter_model\.safetensors"):
            read_folder(model)

    def test_m3_a_pickle_beside_a_layout_is_passed_over(self, tmp_path):
        for name in ("safetensors", "openvino"):
            model = WRITERS[name](tmp_path / name)
            (model / "pytorch_model.bin").write_bytes(b"never opened")
            assert read_folder(model).artifact.format == name


class TestOnnx:
    @pytest.mark.parametrize(
        ("names", "chosen", "precision"),
        [
            (["onnx/model_q4.onnx", "onnx/model_fp16.onnx", "onnx/model.onnx"], 2, None),
            (["onnx/model_q4.onnx", "onnx/model_fp16.onnx"], 1, "fp16"),
            (["onnx/model_q4.onnx", "onnx/model_quantized.onnx"], 1, "int8"),
            (["onnx/model_q4.onnx", "onnx/model_q4f16.onnx"], 0, "int4"),
            (["decoder_model_merged.onnx"], 0, None),
            (["model.onnx", "onnx/model.onnx"], 1, None),
        ],
    )
    def test_of_several_graphs_the_most_precise_is_taken(self, tmp_path, names, chosen, precision):
        model = write_onnx_folder(tmp_path / "model", *names)
        folder = read_folder(model)
        assert folder.model_path == model / names[chosen]
        assert folder.artifact.precision == precision

    def test_another_graph_is_another_identity(self, tmp_path):
        ids = set()
        for name in ("onnx/model.onnx", "onnx/model_fp16.onnx"):
            model = write_onnx_folder(tmp_path / name.replace("/", "-"), name)
            ids.add(read_folder(model).artifact.weights_id)
        assert len(ids) == 2

    def test_m10_its_files_are_checked_where_they_lie(self, tmp_path, link):
        model = write_onnx_folder(tmp_path / "model")
        for folder in (model, write_snapshot(model, tmp_path / "hub", link)):
            graph = read_folder(folder).model_path
            assert graph is not None
            check_onnx_files(graph.parent, graph.name)
            (folder / "onnx" / "model.onnx_data").unlink()
            with pytest.raises(ModelNotFoundError, match=r"model\.onnx_data"):
                check_onnx_files(graph.parent, graph.name)

    def test_the_graph_of_a_genai_folder_is_not_in_this_layout(self, tmp_path):
        model = write_model_folder(write_hub_folder(tmp_path / "model"))
        assert held_formats(model) == ("onnx-genai",)
        write_onnx_folder(model)
        assert held_formats(model) == ("onnx-genai", "onnx")
        assert read_folder(model, formats=["onnx"]).model_path == model / "onnx" / "model.onnx"


@pytest.mark.parametrize(
    ("config", "precision"),
    [
        ({"dtype": "float16"}, "fp16"),
        ({"dtype": None, "torch_dtype": "bfloat16"}, "bf16"),
        ({"dtype": "float8_e4m3fn"}, None),
        ({"quantization_config": {"quant_method": "gptq"}}, None),
        ({"quantization": {"bits": 8}}, "int8"),
        ({"quantization": {"bits": []}}, None),
    ],
)
def test_the_precision_of_safetensors_is_what_the_configuration_says(tmp_path, config, precision):
    model = write_safetensors_folder(tmp_path / "model")
    write_json(model / "config.json", hub_config(**config))
    assert read_folder(model).artifact.precision == precision


def test_an_index_that_leads_out_of_the_folder_is_a_typed_error(tmp_path):
    model = write_safetensors_folder(tmp_path / "model")
    (tmp_path / "outside.safetensors").write_bytes(WEIGHTS.tobytes())
    for name in ("../outside.safetensors", "absent.safetensors"):
        write_json(model / "model.safetensors.index.json", {"weight_map": {"weight": name}})
        with pytest.raises((ModelFormatError, ModelNotFoundError)):
            read_folder(model)
