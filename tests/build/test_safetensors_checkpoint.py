"""Hugging Face folders as checkpoints: what is read, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from phirt.build.safetensors_checkpoint import SafetensorsCheckpoint
from phirt.errors import ModelFormatError, ModelNotFoundError, UnsupportedModelError
from phirt.models.huggingface_config import DECODER_ARCHITECTURES
from phirt.testing import write_tiny_checkpoint

NORM = "model.norm.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


@dataclass
class Stored:
    """A tensor as its file holds it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, values: NDArray[Any], dtype: str = "F32") -> Stored:
        return cls(dtype, values.shape, values.tobytes())

    def float32(self) -> NDArray[np.float32]:
        assert self.dtype == "F32"
        return np.frombuffer(self.data, "<f4").reshape(self.shape)


Tensors = dict[str, Stored]


def read_tensors(folder: Path) -> Tensors:
    file = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:start])
    header.pop("__metadata__", None)
    return {
        name: Stored(
            entry["dtype"],
            tuple(entry["shape"]),
            file[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]],
        )
        for name, entry in header.items()
    }


def write_tensors(folder: Path, tensors: Tensors, *, padding: int = 0) -> None:
    header: dict[str, Any] = {}
    data = b""
    for name, tensor in tensors.items():
        end = len(data) + len(tensor.data)
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [len(data), end],
        }
        data += tensor.data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + padding)
    file = len(text).to_bytes(8, "little") + text + data
    (folder / "model.safetensors").write_bytes(file)


@pytest.fixture
def folder(request, tmp_path):
    """A tiny llama, or the architecture that a test asks for."""
    return write_tiny_checkpoint(tmp_path / "tiny", getattr(request, "param", "llama"))


def change(folder: Path, edit: Callable[[Tensors], object]) -> None:
    tensors = read_tensors(folder)
    edit(tensors)
    write_tensors(folder, tensors)


def refused(folder: Path, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        SafetensorsCheckpoint(folder)


class TestTensors:
    @pytest.mark.parametrize("folder", DECODER_ARCHITECTURES, indirect=True)
    def test_every_weight_is_there_once_and_unchanged(self, folder):
        stored = read_tensors(folder)
        with SafetensorsCheckpoint(folder) as checkpoint:
            apart = {name: checkpoint.tensor(name).float32() for name in checkpoint.names()}
            assert {checkpoint.tensor(name).encoding for name in apart} == {"F32"}
            for name, values in apart.items():
                tensor = checkpoint.tensor(name)
                assert tensor.name == name
                assert tensor.shape == values.shape
                assert tensor.blocks().tobytes() == values.tobytes()
        for name in [name for name in stored if name not in apart]:
            parts = {"qkv_proj": "qkv", "gate_up_proj": ("gate", "up")}
            fused = name.split(".")[-2]
            whole = [apart.pop(name.replace(fused, f"{part}_proj")) for part in parts[fused]]
            apart[name] = np.concatenate(whole)
        assert apart.keys() == stored.keys()
        for name, values in apart.items():
            np.testing.assert_array_equal(values, stored[name].float32())

    def test_phi3s_fused_projections_are_presented_apart(self, tmp_path):
        folder = write_tiny_checkpoint(tmp_path, "phi3")
        with SafetensorsCheckpoint(folder) as checkpoint:
            block = "model.layers.0.self_attn"
            shapes = {
                part: checkpoint.tensor(f"{block}.{part}_proj.weight").shape for part in "qkvo"
            }
            assert shapes == {"q": (64, 64), "k": (32, 64), "v": (32, 64), "o": (64, 64)}
            assert not [name for name in checkpoint.names() if "qkv" in name or "gate_up" in name]

    @pytest.mark.parametrize("encoding", ["F16", "BF16"])
    @pytest.mark.parametrize("padding", [0, 1])
    def test_half_precisions_are_decoded_exactly(self, folder, encoding, padding):
        """Every value of 16 bits that is finite; with the padding, at odd addresses."""
        tensors = read_tensors(folder)
        words = np.arange(1 << 16, dtype="<u2")
        if encoding == "F16":
            values = words.view("<f2").astype(np.float32)
        else:
            values = (words.astype("<u4") << 16).view("<f4")
        words = words[np.isfinite(values)]
        shape = tensors[DOWN].shape
        words = np.resize(words, prod(shape)).reshape(shape)
        tensors[DOWN] = Stored.of(words, encoding)
        write_tensors(folder, tensors, padding=padding)
        with SafetensorsCheckpoint(folder) as checkpoint:
            tensor = checkpoint.tensor(DOWN)
            assert tensor.encoding == encoding
            assert tensor.blocks().shape == (shape[0], 2 * shape[1])
            assert tensor.blocks().tobytes() == words.tobytes()
            found = tensor.float32()
        expected = np.resize(values[np.isfinite(values)], prod(shape)).reshape(shape)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_what_is_not_finite_is_found_when_it_is_read(self, folder, bad):
        def spoil(tensors: Tensors) -> None:
            values = tensors[DOWN].float32().copy()
            values[17, 3] = bad
            tensors[DOWN] = Stored.of(values)

        change(folder, spoil)
        with SafetensorsCheckpoint(folder) as checkpoint:
            for read in (checkpoint.tensor(DOWN).float32, checkpoint.tensor(DOWN).blocks):
                with pytest.raises(ModelFormatError, match=r"down_proj.*NaN or infinity in row 17"):
                    read()

    def test_an_unknown_name(self, folder):
        with (
            SafetensorsCheckpoint(folder) as checkpoint,
            pytest.raises(ModelFormatError, match=r"no tensor 'model\.bias'"),
        ):
            checkpoint.tensor("model.bias")


class TestNames:
    def test_rotary_frequencies_of_old_checkpoints_are_ignored(self, folder):
        name = "model.layers.0.self_attn.rotary_emb.inv_freq"
        change(folder, lambda tensors: tensors.update({name: Stored.of(np.ones(8, np.float32))}))
        with SafetensorsCheckpoint(folder) as checkpoint:
            assert name not in checkpoint.names()

    @pytest.mark.parametrize("folder", ["qwen2"], indirect=True)
    def test_an_lm_head_beside_a_tied_embedding_is_ignored(self, folder):
        head = Stored.of(np.ones((2, 2), np.float32))
        change(folder, lambda tensors: tensors.update({"lm_head.weight": head}))
        with SafetensorsCheckpoint(folder) as checkpoint:
            assert checkpoint.config.tie_word_embeddings
            assert "lm_head.weight" not in checkpoint.names()

    @pytest.mark.parametrize("folder", ["gemma3_text"], indirect=True)
    @pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
    def test_gemma3_in_the_place_that_it_has_in_a_model_that_sees(self, folder, prefix):
        with SafetensorsCheckpoint(folder) as checkpoint:
            plain = {name: checkpoint.tensor(name).float32() for name in checkpoint.names()}
        tensors = read_tensors(folder)
        renamed = {name.replace("model.", prefix, 1): tensors[name] for name in tensors}
        write_tensors(folder, renamed)
        with SafetensorsCheckpoint(folder) as checkpoint:
            assert checkpoint.names() == list(plain)
            for name, values in plain.items():
                np.testing.assert_array_equal(checkpoint.tensor(name).float32(), values)

    @pytest.mark.parametrize("folder", ["gemma3_text"], indirect=True)
    def test_a_tensor_under_both_names(self, folder):
        change(folder, lambda t: t.update({f"language_model.{NORM}": t[NORM]}))
        refused(folder, ModelFormatError, "would both be 'model.norm.weight'")

    def test_only_gemma3_has_such_a_place(self, folder):
        change(
            folder, lambda tensors: tensors.update({f"language_model.{NORM}": tensors.pop(NORM)})
        )
        refused(folder, ModelFormatError, "'model.norm.weight' is missing")


class TestRefusals:
    def test_a_missing_tensor(self, folder):
        change(folder, lambda tensors: tensors.pop(DOWN))
        refused(folder, ModelFormatError, r"down_proj.*is missing.*whole llama")

    def test_layers_that_the_configuration_promises(self, folder):
        path = folder / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "num_hidden_layers": 3}))
        refused(folder, ModelFormatError, r"model\.layers\.2\..*is missing")

    def test_another_shape(self, folder):
        wide = Stored.of(np.ones(65, np.float32))
        change(folder, lambda tensors: tensors.update({NORM: wide}))
        refused(folder, ModelFormatError, r"\(65,\).*calls for \(64,\)")

    @pytest.mark.parametrize("folder", ["phi3"], indirect=True)
    def test_a_fused_projection_of_other_heads(self, folder):
        name = "model.layers.0.self_attn.qkv_proj.weight"
        less = Stored.of(np.ones((96, 64), np.float32))
        change(folder, lambda tensors: tensors.update({name: less}))
        refused(folder, ModelFormatError, r"qkv_proj.*\(96, 64\).*\(128, 64\)")

    @pytest.mark.parametrize(
        "name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.2.input_layernorm.weight"]
    )
    def test_a_tensor_that_a_plain_decoder_would_leave_out(self, folder, name):
        change(folder, lambda tensors: tensors.update({name: Stored.of(np.ones(64, np.float32))}))
        refused(folder, UnsupportedModelError, r"1 tensors are not part of a plain llama.*ignored")

    def test_an_encoding_that_is_not_a_float(self, folder):
        integers = Stored.of(np.ones(64, np.int8), "I8")
        change(folder, lambda tensors: tensors.update({NORM: integers}))
        refused(folder, UnsupportedModelError, "I8")

    def test_no_such_folder(self, tmp_path):
        refused(tmp_path / "none", ModelNotFoundError, "none")

    def test_no_weights(self, folder):
        (folder / "model.safetensors").unlink()
        refused(folder, ModelNotFoundError, "safetensors")
