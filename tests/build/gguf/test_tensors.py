"""Encoded rows and their values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize

from phirt.build.gguf import tensors
from phirt.build.gguf.checkpoint import GgufCheckpoint
from phirt.build.gguf.tensors import ENCODINGS, rotary_row_order
from phirt.errors import ModelFormatError
from tests.tiny_gguf import write_tiny_llama_gguf

PLAIN = "model.layers.0.mlp.up_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
KEY = "model.layers.0.self_attn.k_proj.weight"
GGUF_NAMES = {
    PLAIN: "blk.0.ffn_up.weight",
    QUERY: "blk.0.attn_q.weight",
    KEY: "blk.0.attn_k.weight",
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def write(path: Path, encoding: str) -> Path:
    return write_tiny_llama_gguf(path, encoding=encoding, layers=1, hidden=256, intermediate=256)


def test_row_order_takes_interleaved_pairs_to_halves() -> None:
    # Two heads of six rows, whose rotary pairs lie side by side: (0, 1), (2, 3), (4, 5).
    assert rotary_row_order(heads=2, head_size=6).tolist() == [
        0, 2, 4, 1, 3, 5,
        6, 8, 10, 7, 9, 11,
    ]  # fmt: skip


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", GGUF_NAMES)
def test_values_are_those_of_the_gguf_package(path: Path, encoding: str, name: str) -> None:
    with GgufCheckpoint(write(path, encoding)) as checkpoint:
        tensor = checkpoint.tensor(name)
        info = checkpoint.file.header.tensors[GGUF_NAMES[name]]
        assert (tensor.encoding, tensor.shape) == (encoding, info.shape)
        raw = path.read_bytes()[info.offset : info.offset + info.nbytes]
        rows = np.frombuffer(raw, dtype=np.uint8).reshape(info.shape[0], -1)
        if name != PLAIN:
            heads = {QUERY: 4, KEY: 2}[name]
            rows = rows[rotary_row_order(heads=heads, head_size=64)]
        np.testing.assert_array_equal(tensor.blocks(), rows)
        expected = dequantize(rows, GGMLQuantizationType[encoding])
        np.testing.assert_array_equal(tensor.float32(), expected)
        assert tensor.float32().dtype == np.float32


@pytest.mark.parametrize(("encoding", "error"), [("Q4_0", 0.13), ("Q4_1", 0.07), ("Q8_0", 0.005)])
def test_known_values_come_back(path: Path, encoding: str, error: float) -> None:
    # 0 to 1 in every block of 32: what 4 or 8 bits can hold of it, and no more.
    values = np.tile(np.linspace(0, 1, 32, dtype=np.float32), (256, 8))
    write(path, encoding)
    with GgufCheckpoint(path) as checkpoint:
        info = checkpoint.file.header.tensors[GGUF_NAMES[PLAIN]]
        with path.open("r+b") as file:
            file.seek(info.offset)
            file.write(quantize(values, GGMLQuantizationType[encoding]).tobytes())
        np.testing.assert_allclose(checkpoint.tensor(PLAIN).float32(), values, atol=error)


def test_norms_are_vectors(path: Path) -> None:
    with GgufCheckpoint(write(path, "Q8_0")) as checkpoint:
        norm = checkpoint.tensor("model.norm.weight")
        assert (norm.encoding, norm.shape) == ("F32", (256,))
        assert norm.float32().shape == (256,)
        assert norm.blocks().shape == (1, 1024)


@pytest.mark.parametrize("name", [PLAIN, QUERY])
def test_decoding_in_chunks_changes_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with GgufCheckpoint(write(path, "Q4_K")) as checkpoint:
        whole = checkpoint.tensor(name).float32()
        monkeypatch.setattr(
            tensors, "_CHUNK_BYTES", 1000
        )  # seven rows of 144 bytes; 256 is no multiple
        np.testing.assert_array_equal(checkpoint.tensor(name).float32(), whole)


# Where the half-precision numbers of a block lie, from ggml-common.h.
FLOATS = {
    "F32": [0], "F16": [0], "BF16": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0],
    "Q5_1": [0, 2], "Q8_0": [0], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
}  # fmt: skip
NAN = {"F32": b"\x00\x00\xc0\x7f", "BF16": b"\xc0\x7f"}
INFINITY = {"F32": b"\x00\x00\x80\xff", "BF16": b"\x80\xff"}


@pytest.mark.parametrize(
    ("encoding", "offset"), [(name, offset) for name in FLOATS for offset in FLOATS[name]]
)
@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_a_non_finite_weight_or_scale_is_an_error(
    path: Path, encoding: str, offset: int, bad: str
) -> None:
    assert set(FLOATS) == set(ENCODINGS)
    pattern = (
        NAN.get(encoding, b"\x00\x7e") if bad == "nan" else INFINITY.get(encoding, b"\x00\xfc")
    )
    with GgufCheckpoint(write(path, encoding)) as checkpoint:
        info = checkpoint.file.header.tensors[GGUF_NAMES[PLAIN]]
        row_bytes = info.nbytes // 256
        last_block = row_bytes - GGML_QUANT_SIZES[GGMLQuantizationType[encoding]][1]
        with path.open("r+b") as file:
            file.seek(info.offset + 3 * row_bytes + last_block + offset)
            file.write(pattern)
        tensor = checkpoint.tensor(PLAIN)
        for read in (tensor.blocks, tensor.float32):
            with pytest.raises(ModelFormatError, match="NaN or infinity in row 3"):
                read()
