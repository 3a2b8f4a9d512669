"""The canary of a conversion, against formulas written out a second time."""

from __future__ import annotations

import json
import logging
import threading
from concurrent.futures import CancelledError
from dataclasses import replace

import numpy as np
import pytest

from phirt.build import canary as canary_module
from phirt.build import onnx_precision, openvino_precision
from phirt.build.canary import canary_beside, compute_canary, rounding_of
from phirt.build.convert import convert
from phirt.build.gguf.checkpoint import GgufCheckpoint
from phirt.build.precision import EMBEDDING, FORMAT_PRECISIONS, LOSSLESS, Precision
from phirt.build.quantize import QuantizedMatrix
from phirt.build.recipe import Recipe
from phirt.build.repack import fold_offsets
from phirt.build.safetensors_checkpoint import SafetensorsCheckpoint
from phirt.errors import ModelFormatError
from phirt.models.canary import make_canary, mean_kl, read_canary
from phirt.models.folder import read_folder
from phirt.models.safetensors import SafetensorsFolder
from phirt.testing import write_tiny_checkpoint
from tests.build.decoders import DECODERS, numpy_logits, random_decoder
from tests.build.onnx.checkpoints import MemoryTensor, random_llama

TOKENS = [3, 17, 80, 5, 9, 60, 33, 2, 41, 7, 90, 11, 52, 64, 1, 28]
ROUNDINGS = [
    (layout, precision)
    for layout, precisions in FORMAT_PRECISIONS.items()
    for precision in precisions
    if precision not in LOSSLESS
]


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_against_its_definition(name):
    """Another implementation, in float64 and one weight at a time."""
    checkpoint = random_decoder(DECODERS[name])
    found = compute_canary(checkpoint, TOKENS, None)
    assert found is not None
    assert found.own_kl == 0
    expected = make_canary(TOKENS, numpy_logits(checkpoint, TOKENS)[-8:].astype(np.float32))
    np.testing.assert_array_equal(found.top_ids, expected.top_ids)
    np.testing.assert_allclose(found.log_probabilities, expected.log_probabilities, atol=1e-4)


@pytest.mark.parametrize(("layout", "precision"), ROUNDINGS)
@pytest.mark.parametrize("name", ["llama-biases", "gemma3_text"])
def test_its_own_kl_is_that_of_a_checkpoint_of_the_rounded_weights(name, layout, precision):
    config = replace(DECODERS[name], hidden_size=64) if "gemma" in name else DECODERS[name]
    checkpoint = random_decoder(config)
    rounding = rounding_of(layout, Recipe(precision))
    assert rounding is not None
    found = compute_canary(checkpoint, TOKENS, rounding)
    rounded = random_decoder(config)
    for tensor in list(rounded.tensors):
        rounded.put(tensor, rounding(checkpoint.tensor(tensor), 0), "F32")
    expected = mean_kl(
        make_canary(TOKENS, numpy_logits(checkpoint, TOKENS)[-8:].astype(np.float32)),
        numpy_logits(rounded, TOKENS)[-8:].astype(np.float32),
    )
    assert found is not None
    assert found.own_kl is not None
    assert found.own_kl == pytest.approx(expected, rel=0.05, abs=2e-6)
    assert found.own_kl > 0


class TestRounding:
    """What is called rounded is what the writer stores."""

    @pytest.mark.parametrize(("layout", "precision"), ROUNDINGS)
    @pytest.mark.parametrize("encoding", ["F32", "F16", "Q4_0", "Q4_1", "Q8_0"])
    def test_of_some_rows_is_some_rows_of_it(self, layout, precision, encoding):
        checkpoint = random_llama(encoding=encoding)
        rounding = rounding_of(layout, Recipe(precision))
        assert rounding is not None
        for name in (EMBEDDING, "model.layers.1.mlp.down_proj.weight"):
            tensor = checkpoint.tensor(name)
            whole = rounding(tensor, 0)
            np.testing.assert_array_equal(rounding(tensor.rows(8, 24), 8), whole[8:24])
            assert np.abs(whole - tensor.float32()).max() < 0.1

    def test_of_a_block_with_a_minimum_is_that_of_the_folded_matrix(self):
        """ONNX Runtime multiplies [x, block sums of x] by the folded matrix."""
        tensor = random_llama(encoding="Q4_1").tensor("model.layers.0.mlp.up_proj.weight")
        own = onnx_precision.encode(tensor, Recipe(Precision.INT4))
        assert isinstance(own, QuantizedMatrix)
        folded = fold_offsets(own)
        assert folded is not None
        x = np.random.default_rng(0).standard_normal((5, own.columns), dtype=np.float32)
        sums = x.reshape(5, -1, own.block_size).sum(-1)
        product = np.concatenate([x, sums], axis=-1) @ folded.dequantize().T
        values = onnx_precision.rounded(tensor, Recipe(Precision.INT4))
        np.testing.assert_allclose(x @ values.T, product, atol=1e-4)
        assert np.abs(values - tensor.float32()).max() > 0

    @pytest.mark.parametrize("precision", ["fp16", "bf16"])
    def test_of_safetensors_is_what_the_file_holds(self, precision, tmp_path):
        source = write_tiny_checkpoint(tmp_path / "source", "qwen2")
        out = tmp_path / "out"
        out.mkdir()
        convert(source, out, layout="safetensors", precision=precision)
        rounding = rounding_of("safetensors", Recipe(Precision(precision)))
        assert rounding is not None
        with SafetensorsCheckpoint(source) as checkpoint, SafetensorsFolder(out) as written:
            for name in written.names():
                values = rounding(checkpoint.tensor(name), 0)
                np.testing.assert_array_equal(values, written.float32(name))

    def test_of_openvino_is_what_the_integers_stand_for(self):
        tensor = random_llama().tensor("model.layers.0.mlp.up_proj.weight")
        rows = np.abs(tensor.float32()).max(axis=-1, keepdims=True) / 127
        expected = np.rint(tensor.float32() / rows) * rows
        found = openvino_precision.rounded(tensor, Recipe(Precision.INT8))
        np.testing.assert_allclose(found, expected, atol=1e-6)

    @pytest.mark.parametrize("layout", FORMAT_PRECISIONS)
    def test_is_nothing_where_nothing_is_lost(self, layout):
        assert rounding_of(layout, Recipe(Precision.FP32)) is None


class TestRows:
    @pytest.mark.parametrize("encoding", ["F32", "Q4_1"])
    def test_of_a_gguf_file_in_hugging_faces_order(self, encoding, tmp_path):
        from tests.tiny_gguf import write_tiny_llama_gguf

        path = write_tiny_llama_gguf(tmp_path / "tiny.gguf", encoding=encoding)
        with GgufCheckpoint(path) as checkpoint:
            for part in ("q_proj", "k_proj", "v_proj"):
                tensor = checkpoint.tensor(f"model.layers.0.self_attn.{part}.weight")
                some = tensor.rows(3, 21)
                assert some.shape == (18, tensor.shape[1])
                np.testing.assert_array_equal(some.float32(), tensor.float32()[3:21])
                np.testing.assert_array_equal(some.blocks(), tensor.blocks()[3:21])
                again = some.rows(2, 5)
                np.testing.assert_array_equal(again.float32(), tensor.float32()[5:8])

    def test_of_a_projection_that_a_folder_keeps_fused(self, tmp_path):
        source = write_tiny_checkpoint(tmp_path, "phi3")
        with SafetensorsCheckpoint(source) as checkpoint:
            tensor = checkpoint.tensor("model.layers.0.self_attn.v_proj.weight")
            np.testing.assert_array_equal(tensor.rows(4, 9).float32(), tensor.float32()[4:9])
            np.testing.assert_array_equal(tensor.rows(4, 9).blocks(), tensor.blocks()[4:9])


class Watched(MemoryTensor):
    """Remembers the most values that were decoded at once."""

    most = 0

    def float32(self):
        values = super().float32()
        Watched.most = max(Watched.most, values.size)
        return values


def test_a_matrix_is_never_in_memory_as_a_whole(monkeypatch):
    """Not the embedding, and not the head either, which is the largest of many models."""
    monkeypatch.setattr(canary_module, "_CHUNK", 512)
    monkeypatch.setattr(Watched, "most", 0)
    checkpoint = random_decoder(DECODERS["llama-biases"])
    expected = compute_canary(checkpoint, TOKENS, None)
    for name, tensor in list(checkpoint.tensors.items()):
        checkpoint.tensors[name] = Watched(
            tensor.name, tensor.shape, tensor.encoding, tensor.encoded
        )
    rounding = rounding_of("onnx-genai", Recipe(Precision.INT8))
    found = compute_canary(checkpoint, TOKENS, rounding)
    assert found is not None
    assert expected is not None
    np.testing.assert_allclose(found.log_probabilities, expected.log_probabilities, atol=1e-5)
    assert 0 < Watched.most <= 512


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), "llama")


class TestConversion:
    @pytest.fixture
    def out_dir(self, tmp_path):
        folder = tmp_path / "out"
        folder.mkdir()
        return folder

    @pytest.mark.parametrize(
        ("layout", "precision"),
        [(layout, p) for layout, precisions in FORMAT_PRECISIONS.items() for p in precisions],
    )
    def test_every_folder_gets_one_of_the_source(self, source, layout, precision, out_dir):
        convert(source, out_dir, layout=layout, precision=str(precision))
        folder = read_folder(out_dir, formats=(layout,))
        found = read_canary(out_dir, vocab_size=folder.facts.vocab_size)
        assert found is not None
        assert found.own_kl is not None
        assert (found.own_kl == 0) == (precision in LOSSLESS)
        assert folder.manifest is not None
        assert "canary.json" in folder.manifest.files
        with SafetensorsCheckpoint(source) as checkpoint:
            expected = compute_canary(checkpoint, found.token_ids, None)
        assert expected is not None
        np.testing.assert_array_equal(found.top_ids, expected.top_ids)
        np.testing.assert_array_equal(found.log_probabilities, expected.log_probabilities)

    def test_a_gguf_file_too(self, tiny_q4_1_gguf, out_dir):
        convert(tiny_q4_1_gguf, out_dir, layout="onnx-genai", precision="int4")
        found = read_canary(out_dir)
        assert found is not None
        assert found.own_kl is not None
        assert 0 < found.own_kl < 0.1

    def test_the_bytes_are_the_same_each_time(self, source, tmp_path):
        written = set()
        for number in range(2):
            out = tmp_path / str(number)
            out.mkdir()
            convert(source, out, layout="onnx-genai", precision="int8")
            written.add((out / "canary.json").read_bytes())
        assert len(written) == 1

    def test_a_context_too_short_for_one_is_no_fault(self, tmp_path, out_dir, caplog):
        short = write_tiny_checkpoint(tmp_path / "short", "llama")
        config = json.loads((short / "config.json").read_text())
        (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 15}))
        convert(short, out_dir, layout="safetensors", precision="fp32")
        assert read_canary(out_dir) is None
        assert "No canary" in caplog.text
        assert "context of 15" in caplog.text

    def test_a_tokenizer_that_cannot_encode_is_no_fault(self, tmp_path, out_dir, caplog):
        damaged = write_tiny_checkpoint(tmp_path / "damaged", "llama")
        (damaged / "tokenizer.json").write_text("{}")
        convert(damaged, out_dir, layout="safetensors", precision="fp32")
        assert read_canary(out_dir) is None
        assert "No canary" in caplog.text

    def test_weights_whose_logits_overflow_have_none(self, caplog):
        checkpoint = random_llama()
        largest = np.full(checkpoint.config.hidden_size, 3e38, np.float32)
        checkpoint.put("model.norm.weight", largest, "F32")
        with caplog.at_level(logging.WARNING):
            assert compute_canary(checkpoint, TOKENS, None) is None
        assert "not finite" in caplog.text

    def test_rounded_weights_whose_logits_overflow_have_no_distance(self, caplog):
        checkpoint = random_llama()
        with caplog.at_level(logging.WARNING):
            canary = compute_canary(
                checkpoint, TOKENS, lambda tensor, _: np.full_like(tensor.float32(), np.inf)
            )
        assert canary is not None
        assert canary.own_kl is None
        assert "rounded" in caplog.text


def encode(text):
    return TOKENS


class TestBesideAWriter:
    def test_what_fails_in_it_fails_the_conversion(self, source):
        with SafetensorsCheckpoint(source) as checkpoint:
            damaged = random_decoder(checkpoint.config)
            del damaged.tensors["model.layers.1.mlp.up_proj.weight"]
            with canary_beside(damaged, encode, None) as wait, pytest.raises(KeyError):
                wait()

    def test_it_is_given_up_where_the_writer_fails(self, source, monkeypatch):
        reading = threading.Event()
        values = canary_module._StreamedWeights._values

        def slowly(self, tensor, first_row=0):
            reading.set()
            assert self._stop.wait(timeout=60)
            return values(self, tensor, first_row)

        monkeypatch.setattr(canary_module._StreamedWeights, "_values", slowly)

        def write():
            assert reading.wait(timeout=60)
            raise ModelFormatError("as a writer would")

        before = threading.active_count()
        with SafetensorsCheckpoint(source) as checkpoint:
            beside = canary_beside(checkpoint, encode, None)
            with pytest.raises(ModelFormatError, match="as a writer would"), beside:
                write()
        assert threading.active_count() == before

    def test_who_asks_to_stop_is_heard(self):
        stop = threading.Event()
        stop.set()
        with pytest.raises(CancelledError):
            compute_canary(random_llama(), TOKENS, None, stop=stop)
