from __future__ import annotations

from typing import Any

import pytest

from phirt.errors import ModelFormatError, UnsafeModelError, UnsupportedModelError
from phirt.models.genai_config import read_genai_config
from tests.models.model_files import genai_config, write_json


@pytest.fixture
def read(tmp_path):
    def read(config: dict[str, Any]):
        path = tmp_path / "genai_config.json"
        write_json(path, config)
        return read_genai_config(path)

    return read


def replaced(path: str, value: object) -> dict[str, Any]:
    """The well-formed configuration with one field, by dotted path, set or (None) removed."""
    config = genai_config()
    *parents, last = path.split(".")
    section = config
    for key in parents:
        section = section.setdefault(key, {})
    if value is None:
        section.pop(last, None)
    else:
        section[last] = value
    return config


def test_a_model_builder_configuration(read):
    spec = read(genai_config())
    assert spec.architecture == "llama"
    assert spec.filename == "model.onnx"
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_size) == (3, 2, 1, 4)
    assert (spec.vocab_size, spec.context_length, spec.window) == (16, 64, None)
    assert (spec.input_ids, spec.attention_mask) == ("input_ids", "attention_mask")
    assert (spec.position_ids, spec.logits) == (None, "logits")
    assert spec.past_names(2) == ("past_key_values.2.key", "past_key_values.2.value")
    assert spec.present_names(0) == ("present.0.key", "present.0.value")
    assert spec.eos_token_ids == {2}
    assert (spec.bos_token_id, spec.pad_token_id) == (1, 2)
    assert spec.search == {"do_sample": False, "top_k": 50}


def test_onnxruntime_genais_own_names_where_the_configuration_gives_none(read):
    spec = read(replaced("model.decoder.inputs", {}))
    assert spec.input_ids == "input_ids"
    assert spec.past_names(1) == ("past_key_values.1.key", "past_key_values.1.value")
    assert spec.position_ids is None


@pytest.mark.parametrize(
    ("value", "ids"), [(2, {2}), ([2, 3, 2], {2, 3}), ([], set()), (None, set())]
)
def test_end_of_sequence_ids(read, value, ids):
    assert read(replaced("model.eos_token_id", value)).eos_token_ids == ids


@pytest.mark.parametrize(
    "path",
    [
        "model.vocab_size",
        "model.context_length",
        "model.decoder.num_hidden_layers",
        "model.decoder.num_key_value_heads",
        "model.decoder.num_attention_heads",
        "model.decoder.head_size",
        "model.decoder.sliding_window.window_size",
    ],
)
@pytest.mark.parametrize("value", [10**12, 10**39, 0, -1, 1.5, "8", True, [8]])
def test_m12_sizes_beyond_any_decoder_are_refused(read, path, value):
    with pytest.raises(ModelFormatError, match=path):
        read(replaced(path, value))


@pytest.mark.parametrize(
    "path",
    [
        "model",
        "model.type",
        "model.vocab_size",
        "model.context_length",
        "model.decoder",
        "model.decoder.filename",
        "model.decoder.head_size",
        "model.decoder.num_hidden_layers",
    ],
)
def test_what_is_missing_is_named(read, path):
    with pytest.raises(ModelFormatError, match=f"lacks the field '{path}"):
        read(replaced(path, None))


@pytest.mark.parametrize("ids", [16, -1, [2, 16], [2, "3"], [[2]], 2.0, "2"])
def test_token_ids_outside_the_vocabulary_are_refused(read, ids):
    with pytest.raises(ModelFormatError, match="eos_token_id"):
        read(replaced("model.eos_token_id", ids))


@pytest.mark.parametrize("pattern", ["past.key", "past.%s.key", "past.%d.%d", "%d%%", "past.%.9d"])
def test_name_patterns_hold_the_layer_once(read, pattern):
    with pytest.raises(ModelFormatError, match="'past_key_names' must hold '%d' once"):
        read(replaced("model.decoder.inputs.past_key_names", pattern))


def test_two_patterns_that_are_the_same_are_refused(read):
    with pytest.raises(ModelFormatError, match="are the same"):
        read(replaced("model.decoder.inputs.past_key_names", "past_key_values.%d.value"))


def test_key_value_heads_divide_the_query_heads(read):
    with pytest.raises(ModelFormatError, match="must divide"):
        read(replaced("model.decoder.num_key_value_heads", 2) | {"search": {}} | odd_heads())


def odd_heads() -> dict[str, Any]:
    return {"model": genai_config(num_attention_heads=3, num_key_value_heads=2)["model"]}


@pytest.mark.parametrize("name", ["../model.onnx", "/m.onnx", "a/m.onnx", "C:m.onnx", "nul.onnx"])
def test_m1_the_graph_lies_in_the_folder(read, name):
    with pytest.raises(UnsafeModelError, match="plain name inside the model folder"):
        read(replaced("model.decoder.filename", name))


def test_runtime_formats_that_are_not_checked_are_refused(read):
    with pytest.raises(UnsupportedModelError, match=r"reads \.onnx"):
        read(replaced("model.decoder.filename", "model.ort"))


@pytest.mark.parametrize(
    "path",
    [
        "model.decoder.session_options.custom_ops_library",
        "model.decoder.session_options.config_entries.custom_ops_library",
        "model.decoder.run_options.custom_ops_library",
    ],
)
def test_m1_a_native_library_is_refused(read, path):
    with pytest.raises(UnsafeModelError, match=r"native library 'evil\.so'"):
        read(replaced(path, "evil.so"))


@pytest.mark.parametrize("target", ["/profile", "../profile", "profile"])
def test_m1_a_profile_is_refused(read, target):
    with pytest.raises(UnsafeModelError, match="write a profile"):
        read(replaced("model.decoder.session_options.enable_profiling", target))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.encoder", {"filename": "encoder.onnx"}),
        ("model.vision", {"filename": "vision.onnx"}),
        ("model.decoder.pipeline", [{"embeddings": {}}]),
        ("model.decoder.inputs.block_table", "block_table"),
        ("model.decoder.inputs.past_conv_names", "past.%d.conv"),
        ("model.decoder.outputs.present_key_scale_names", "present.%d.key_scale"),
    ],
)
def test_graphs_of_another_kind_are_unsupported(read, path, value):
    with pytest.raises(UnsupportedModelError, match=path.rpartition(".")[2]):
        read(replaced(path, value))
