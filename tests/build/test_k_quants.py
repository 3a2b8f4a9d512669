"""Files of K-quants, and of 5 bits, in every precision that keeps their blocks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phirt.build import onnx_precision, openvino_precision
from phirt.build.gguf.checkpoint import GgufCheckpoint
from phirt.build.precision import Precision
from phirt.build.quantize import QuantizedMatrix
from phirt.build.recipe import Recipe
from phirt.errors import ModelFormatError
from tests.build.onnx.runtime import mean_kl
from tests.build.onnx.runtime import written as written_onnx
from tests.build.openvino.runtime import written as written_openvino
from tests.tiny_gguf import write_tiny_llama_gguf

TOKENS = [int(i) for i in np.random.default_rng(5).integers(0, 300, 40)]
DOWN = "model.layers.0.mlp.down_proj.weight"
VALUE = "model.layers.0.self_attn.v_proj.weight"

# As llama-quantize mixes them: what is most sensitive gets 6 bits.
Q4_K_M = {"attn_v": "Q6_K", "ffn_down": "Q6_K", "token_embd": "Q6_K"}
FILES: dict[str, dict[str, Any]] = {
    "Q4_K_M": {"encoding": "Q4_K", "encodings": Q4_K_M},
    "Q5_K_M": {"encoding": "Q5_K", "encodings": Q4_K_M},
    **{name: {"encoding": name} for name in ("Q4_K", "Q5_K", "Q6_K", "Q5_0", "Q5_1")},
}


@dataclass(frozen=True)
class Case:
    """A file, and the logits of its decoded weights."""

    path: Path
    expected: Any


@pytest.fixture(scope="module", params=FILES)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    path = write_tiny_llama_gguf(
        folder / "model.gguf",
        hidden=256,
        heads=8,
        kv_heads=2,
        layers=1,
        **FILES[request.param],
    )
    with GgufCheckpoint(path) as checkpoint:
        return Case(path, written_onnx(checkpoint, folder).logits(TOKENS))


def test_exact_has_the_logits_of_fp32_on_onnx(case, tmp_path):
    with GgufCheckpoint(case.path) as checkpoint:
        decoder = written_onnx(checkpoint, tmp_path, precision=Precision.EXACT)
    np.testing.assert_allclose(decoder.logits(TOKENS), case.expected, atol=1e-3)
    decoder.reset()  # One row at a time runs other kernels.
    one_by_one = np.concatenate([decoder.run([token]) for token in TOKENS[:10]])
    np.testing.assert_allclose(one_by_one, case.expected[:10], atol=1e-3)


@pytest.mark.parametrize("precision", ["exact", "int4"])
def test_openvino_keeps_every_block(case, precision, tmp_path):
    with GgufCheckpoint(case.path) as checkpoint:
        found = written_openvino(checkpoint, tmp_path, precision).logits(TOKENS)
    np.testing.assert_allclose(found, case.expected, atol=1e-3)


def test_int4_loses_no_more_than_8_bit_activations_do(case, tmp_path):
    """Random blocks are harsher than a model's: their scales differ by a factor of 60."""
    with GgufCheckpoint(case.path) as checkpoint:
        found = written_onnx(checkpoint, tmp_path, precision=Precision.INT4).logits(TOKENS)
    assert mean_kl(case.expected, found) < 0.03


@pytest.mark.parametrize("name", [DOWN, VALUE])
def test_int4_rounds_no_weight_of_5_or_6_bits(case, name):
    """They become 8 bits, in blocks of their own; Q4_K stays 4 bits."""
    with GgufCheckpoint(case.path) as checkpoint:
        tensor = checkpoint.tensor(name)
        values = tensor.float32()
        stored = onnx_precision.encode(tensor, Recipe(Precision.INT4))
        assert isinstance(stored, QuantizedMatrix)
        assert stored.bits == (4 if tensor.encoding == "Q4_K" else 8)
        np.testing.assert_allclose(stored.dequantize(), values, rtol=0, atol=1e-6)
        integers = openvino_precision.encode(tensor, Recipe(Precision.INT4))
        assert isinstance(integers, openvino_precision.IntegerMatrix)
        np.testing.assert_allclose(integers.dequantize(), values, rtol=0, atol=1e-6)
        if stored.bits == 8:
            rounded = onnx_precision.rounded(tensor, Recipe(Precision.INT4))
            np.testing.assert_allclose(rounded, values, rtol=0, atol=1e-6)


def test_rows_of_a_matrix_are_encoded_as_they_are_in_the_whole(case):
    with GgufCheckpoint(case.path) as checkpoint:
        for name in (DOWN, "model.layers.0.self_attn.q_proj.weight"):
            tensor = checkpoint.tensor(name)
            whole = onnx_precision.encode(tensor, Recipe(Precision.EXACT))
            some = onnx_precision.encode(tensor.rows(40, 56), Recipe(Precision.EXACT))
            assert isinstance(whole, QuantizedMatrix)
            assert isinstance(some, QuantizedMatrix)
            np.testing.assert_array_equal(some.values, whole.values[40:56])
            np.testing.assert_array_equal(some.scales, whole.scales[40:56])
            if whole.offsets is not None:
                assert some.offsets is not None
                np.testing.assert_array_equal(some.offsets, whole.offsets[40:56])


@pytest.mark.parametrize("precision", ["exact", "int4"])
def test_a_scale_that_is_no_number_is_found(case, precision, tmp_path):
    """A float16 of all ones is NaN, wherever a block keeps it."""
    path = tmp_path / "model.gguf"
    path.write_bytes(case.path.read_bytes())
    with GgufCheckpoint(path) as checkpoint:
        info = checkpoint.file.header.tensors["blk.0.ffn_down.weight"]
        with path.open("r+b") as file:
            file.seek(info.offset)
            file.write(b"\xff" * info.nbytes)
        with pytest.raises(ModelFormatError, match="NaN or infinity in row 0"):
            written_onnx(checkpoint, tmp_path, precision=Precision(precision))
