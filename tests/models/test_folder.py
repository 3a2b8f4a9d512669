from __future__ import annotations

import os
import pickle

import pytest

from phirt.errors import ModelFormatError, ModelNotFoundError, UnsafeModelError
from phirt.models.folder import read_folder
from phirt.models.manifest import write_manifest
from tests.models.model_files import WEIGHTS, write_json, write_model_folder


def test_a_genai_folder(folder):
    model = read_folder(folder)
    assert model.artifact.name == "model"
    assert model.artifact.path == folder
    assert (model.artifact.format, model.artifact.architecture) == ("onnx-genai", "llama")
    assert model.artifact.precision is None
    assert model.model_path == folder / "model.onnx"
    assert model.tokenizer_path == folder / "tokenizer.json"
    assert model.chat_template == "{{ messages }}"
    assert model.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert model.generation_defaults == {"do_sample": False, "top_k": 50}
    assert model.decoder is not None
    assert model.decoder.eos_token_ids == {2}
    assert model.manifest is None


def test_the_special_tokens_are_those_that_a_template_may_write(folder):
    texts = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<p>", "unk_token": "<u>"}
    write_json(folder / "tokenizer_config.json", {**texts, "mask_token": "<m>"})
    assert read_folder(folder).special_tokens == texts


def test_the_name_that_the_user_gave(folder):
    assert read_folder(folder, name="my-model").artifact.name == "my-model"


def test_what_the_converter_recorded(folder):
    write_manifest(
        folder,
        weights_id="abc:int8",
        architecture="llama",
        precision="int8",
        source={},
        versions={},
    )
    artifact = read_folder(folder).artifact
    assert (artifact.precision, artifact.weights_id) == ("int8", "abc:int8")
    (folder / "model.onnx.data").write_bytes(b"")
    with pytest.raises(ModelFormatError, match=r"phirt\.json says 96"):
        read_folder(folder)


def test_generation_config_adds_stop_ids_and_replaces_the_search_section(folder):
    write_json(folder / "generation_config.json", {"eos_token_id": [3, 4], "temperature": 0.6})
    model = read_folder(folder)
    assert model.decoder is not None
    assert model.decoder.eos_token_ids == {2, 3, 4}
    assert model.generation_defaults == {"eos_token_id": [3, 4], "temperature": 0.6}


def test_a_stop_id_outside_the_vocabulary_is_a_typed_error(folder):
    write_json(folder / "generation_config.json", {"eos_token_id": 16})
    with pytest.raises(ModelFormatError, match=r"generation_config\.json.*eos_token_id"):
        read_folder(folder)


@pytest.mark.parametrize(
    ("template", "source"),
    [
        ("a", "a"),
        ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        ([{"name": "tool_use", "template": "t"}], None),
        (None, None),
    ],
)
def test_a_chat_template_in_the_tokenizers_configuration(folder, template, source):
    (folder / "chat_template.jinja").unlink()
    write_json(folder / "tokenizer_config.json", {"chat_template": template})
    assert read_folder(folder).chat_template == source


def test_a_chat_template_in_a_file_of_its_own_wins(folder):
    write_json(folder / "tokenizer_config.json", {"chat_template": "from the configuration"})
    assert read_folder(folder).chat_template == "{{ messages }}"


@pytest.mark.parametrize(
    ("text", "message"), [(b"\xff", "not UTF-8"), (b"x" * (1 << 21), "is larger than")]
)
def test_a_damaged_chat_template_is_a_typed_error(folder, text, message):
    (folder / "chat_template.jinja").write_bytes(text)
    with pytest.raises(ModelFormatError, match=message):
        read_folder(folder)


def test_a_folder_without_a_tokenizer_configuration(folder):
    (folder / "tokenizer_config.json").unlink()
    model = read_folder(folder)
    assert model.special_tokens == {}


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("genai_config.json", "not a model folder: it holds chat_template.jinja, model.onnx"),
        ("model.onnx", "lacks model.onnx, the graph"),
        ("tokenizer.json", "lacks tokenizer.json, the tokenizer"),
    ],
)
def test_what_is_missing_is_named_with_the_layouts_that_are_read(folder, missing, message):
    (folder / missing).unlink()
    with pytest.raises(ModelNotFoundError, match=message) as caught:
        read_folder(folder)
    assert "phirt reads folders with genai_config.json, openvino_model.xml" in str(caught.value)


def test_a_folder_that_is_not_there_or_is_a_file(folder):
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        read_folder(folder / "nothing")
    with pytest.raises(ModelNotFoundError, match="is a file"):
        read_folder(folder / "tokenizer.json")


def test_a_folder_around_a_gguf_file_points_to_it(tmp_path):
    (tmp_path / "x.Q4_1.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelNotFoundError, match=r"holds x\.Q4_1\.gguf: name that file"):
        read_folder(tmp_path)


class Planted:
    def __reduce__(self):
        return (os._exit, (66,))  # nothing after this line would run


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.PTH", "model.ckpt"])
def test_m3_a_folder_of_pickles_is_refused_unopened(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(Planted()))
    with pytest.raises(UnsafeModelError, match="does not open it"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "genai_config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "phirt.json",
        "model.onnx",
        "model.onnx.data",
        "README.md",
    ],
)
def test_m10_a_file_that_is_a_link_out_of_the_folder_is_refused(folder, tmp_path, link, name):
    outside = tmp_path / "outside"
    if (folder / name).exists():
        (folder / name).rename(outside)
    else:
        outside.write_text("{}")
    link(folder / name, outside)
    with pytest.raises(UnsafeModelError, match="leads out of the model folder"):
        read_folder(folder)


@pytest.mark.parametrize(
    "name", ["genai_config.json", "generation_config.json", "tokenizer_config.json", "phirt.json"]
)
def test_m14_hostile_json_in_any_file_is_a_typed_error(folder, name):
    (folder / name).write_text('{"a":' + "[" * 100_000)
    with pytest.raises(ModelFormatError, match=name):
        read_folder(folder)


def weights_id(folder) -> str:
    return read_folder(folder).artifact.weights_id


def test_the_fingerprint_of_a_folder_made_elsewhere(folder, tmp_path):
    first = weights_id(folder)
    assert first == weights_id(folder)
    (folder / "chat_template.jinja").write_text("another")
    assert weights_id(folder) == first
    os.utime(folder / "model.onnx.data", ns=(1, 1))
    touched = weights_id(folder)
    assert touched != first
    # Same names, sizes and times, other weights: as archives with normalized times make them.
    (folder / "model.onnx.data").write_bytes((WEIGHTS + 1).tobytes())
    os.utime(folder / "model.onnx.data", ns=(1, 1))
    assert weights_id(folder) != touched


def test_the_fingerprint_reads_samples_of_large_weights(tmp_path):
    folder = write_model_folder(tmp_path / "large")
    with (folder / "model.onnx.data").open("r+b") as file:
        file.truncate(1 << 40)  # sparse: reading it whole would take minutes
    assert weights_id(folder).startswith("fingerprint:")
