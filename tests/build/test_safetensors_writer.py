from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from phirt.build.huggingface_config import config_document
from phirt.build.safetensors_writer import write_safetensors
from phirt.errors import UnsupportedModelError
from phirt.types import FloatArray
from tests.build.decoders import DECODERS, numpy_logits, random_decoder
from tests.build.onnx.checkpoints import MemoryCheckpoint, tiny
from tests.installed import require

_NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def read(path: Path) -> dict[str, NDArray[Any]]:
    """The tensors of a file, by the letter of the format."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    assert size % 8 == 0
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    assert header.pop("__metadata__") == {"format": "pt"}
    ends = [0]
    tensors = {}
    for name, info in header.items():
        start, end = info["data_offsets"]
        assert start == ends[-1]  # no gaps
        ends.append(end)
        array = np.frombuffer(body[start:end], _NUMPY[info["dtype"]])
        tensors[name] = array.reshape(info["shape"])
    assert ends[-1] == len(body)
    return tensors


def one_tensor(values: FloatArray) -> MemoryCheckpoint:
    checkpoint = MemoryCheckpoint(tiny())
    checkpoint.put("model.norm.weight", values, "F32")
    return checkpoint


def written(values: list[float], path: Path, *, precision: str) -> NDArray[Any]:
    checkpoint = one_tensor(np.array(values, np.float32))
    write_safetensors(checkpoint, path, precision=precision)
    return read(path)["model.norm.weight"]


def test_float32_is_written_bit_for_bit(tmp_path):
    checkpoint = random_decoder(DECODERS["llama"])
    write_safetensors(checkpoint, tmp_path / "m.safetensors", precision="fp32")
    tensors = read(tmp_path / "m.safetensors")
    assert list(tensors) == checkpoint.names()
    for name, values in tensors.items():
        assert np.array_equal(values, checkpoint.tensor(name).float32())


def test_phi3_is_written_with_its_projections_fused(tmp_path):
    checkpoint = random_decoder(DECODERS["phi3"])
    write_safetensors(checkpoint, tmp_path / "m.safetensors", precision="fp32")
    tensors = read(tmp_path / "m.safetensors")
    scope = "model.layers.1"
    parts = [checkpoint.tensor(f"{scope}.self_attn.{p}_proj.weight").float32() for p in "qkv"]
    assert np.array_equal(tensors[f"{scope}.self_attn.qkv_proj.weight"], np.concatenate(parts))
    parts = [checkpoint.tensor(f"{scope}.mlp.{p}_proj.weight").float32() for p in ("gate", "up")]
    assert np.array_equal(tensors[f"{scope}.mlp.gate_up_proj.weight"], np.concatenate(parts))
    assert not any("q_proj" in name or ".up_proj" in name for name in tensors)


def test_a_tied_head_is_not_written_twice(tmp_path):
    checkpoint = random_decoder(DECODERS["llama"])
    checkpoint.tensors["lm_head.weight"] = checkpoint.tensor("model.embed_tokens.weight")
    write_safetensors(checkpoint, tmp_path / "m.safetensors", precision="fp32")
    assert "lm_head.weight" not in read(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("bits", "rounded"),
    [
        (0x3F80_0000, 0x3F80),  # 1
        (0x3F80_8000, 0x3F80),  # a tie: down to the even one
        (0x3F81_8000, 0x3F82),  # a tie: up to the even one
        (0x3F80_8001, 0x3F81),
        (0xBF80_7FFF, 0xBF80),
        (0x3FFF_FFFF, 0x4000),  # a carry into the exponent
        (0x0000_8001, 0x0001),  # a subnormal
        (0x8000_0000, 0x8000),  # -0
        (0x7F80_0000, 0x7F80),  # infinity stays what it is
        (0x7F80_0001, 0x7FC0),  # a NaN whose payload would be cut off
        (0x7FFF_FFFF, 0x7FC0),
    ],
)
def test_bfloat16_is_rounded_to_nearest_even(tmp_path, bits, rounded):
    values = np.array([bits], np.uint32).view(np.float32)
    write_safetensors(one_tensor(values), tmp_path / "m.safetensors", precision="bf16")
    assert read(tmp_path / "m.safetensors")["model.norm.weight"][0] == rounded


def test_bfloat16_rounds_like_torch(tmp_path):
    require("torch")
    import torch

    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    write_safetensors(one_tensor(values), tmp_path / "m.safetensors", precision="bf16")
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(read(tmp_path / "m.safetensors")["model.norm.weight"], expected)


def test_float16_is_rounded_to_nearest_even(tmp_path):
    values = [1.0, 1 + 2**-11, 1 + 3 * 2**-11, 65519.0, -65504.0, 1e-9]
    stored = written(values, tmp_path / "m.safetensors", precision="fp16")
    assert stored.tolist() == [1.0, 1.0, 1 + 2**-9, 65504.0, -65504.0, 0.0]


@pytest.mark.parametrize(
    ("precision", "value"), [("fp16", 65520.0), ("fp16", -1e6), ("bf16", 3.4e38)]
)
def test_what_would_become_infinite_is_refused_by_name(tmp_path, precision, value):
    with pytest.raises(UnsupportedModelError, match=r"'model\.norm\.weight'"):
        written([0.0, value], tmp_path / "m.safetensors", precision=precision)


def test_an_existing_file_is_never_overwritten(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        written([1.0], path, precision="fp32")
    assert path.read_bytes() == b"mine"


def test_an_unknown_precision_is_a_mistake(tmp_path):
    with pytest.raises(ValueError, match="fp32, fp16, bf16"):
        written([1.0], tmp_path / "m.safetensors", precision="int4")


@pytest.mark.oracle
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_transformers_reads_16_bits_as_they_were_rounded(tmp_path, precision):
    from safetensors.torch import load_file

    checkpoint = random_decoder(DECODERS["llama"])
    write_safetensors(checkpoint, tmp_path / "m.safetensors", precision=precision)
    rounded = MemoryCheckpoint(checkpoint.config)
    for name, tensor in load_file(tmp_path / "m.safetensors").items():
        rounded.put(name, tensor.float().numpy(), "F32")
    ids = list(range(3, 20))
    np.testing.assert_allclose(
        numpy_logits(rounded, ids),
        numpy_logits(checkpoint, ids),
        atol=0.02 if precision == "fp16" else 0.2,
    )


@pytest.mark.model
@pytest.mark.oracle
@pytest.mark.slow
def test_the_default_model_is_what_transformers_reads_from_its_gguf(
    tmp_path, smollm2_gguf, smollm2_oracle
):
    import torch
    from transformers import AutoModelForCausalLM

    from phirt.build.gguf.checkpoint import GgufCheckpoint

    with GgufCheckpoint(smollm2_gguf) as checkpoint:
        write_safetensors(checkpoint, tmp_path / "model.safetensors", precision="fp32")
        document = config_document(checkpoint.config)
    (tmp_path / "config.json").write_text(json.dumps(document))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.from_numpy(np.random.default_rng(0).integers(20, 40_000, (1, 60)))
    with torch.inference_mode():
        found, expected = (network(ids).logits for network in (model, smollm2_oracle))
    assert float((found - expected).abs().max()) < 1e-3
