"""The graph as OpenVINO IR: held against the formulas, transformers, and other precisions."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phirt.build.openvino_decoder import write_openvino
from phirt.build.precision import Precision
from phirt.build.recipe import Recipe
from phirt.build.safetensors_checkpoint import SafetensorsCheckpoint
from phirt.errors import UnsupportedModelError
from phirt.models.huggingface_config import DECODER_ARCHITECTURES
from phirt.testing import write_tiny_checkpoint
from phirt.types import FloatArray
from tests.build.decoders import DECODERS, numpy_logits, random_decoder
from tests.build.onnx.checkpoints import random_llama, tiny
from tests.build.onnx.oracle import pretrained, transformers_logits
from tests.build.onnx.runtime import mean_kl
from tests.build.openvino.runtime import OpenVinoDecoder, written

# mistral and gemma3_text have windows of 16 tokens; phi3 goes over to its long factors beyond 32.
TOKENS = [int(i) for i in np.random.default_rng(5).integers(0, 96, 100)]


def difference(found: FloatArray, expected: FloatArray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max())


class TestAgainstTheFormulas:
    @pytest.mark.parametrize("config", DECODERS.values(), ids=DECODERS)
    def test_prefill_chunks_and_decode(self, config, tmp_path):
        checkpoint = random_decoder(config)
        expected = numpy_logits(checkpoint, TOKENS)
        assert np.abs(expected).max() > 1, "the logits are too small to tell anything"
        decoder = written(checkpoint, tmp_path)
        assert difference(decoder.logits(TOKENS), expected) < 1e-4
        decoder.reset()
        cuts = [0, 40, 43, *range(44, 60), 80, 100]  # The first beyond phi3's boundary.
        found = [decoder.run(TOKENS[a:b]) for a, b in pairwise(cuts)]
        assert difference(np.concatenate(found), expected) < 1e-4

    def test_left_padding_hides_what_it_pads(self, tmp_path):
        """A batch's shorter rows, as openvino_genai and optimum pad them."""
        checkpoint = random_decoder(DECODERS["mistral"])
        decoder = written(checkpoint, tmp_path)
        rows = [TOKENS[:30], TOKENS[40:60]]
        feeds = {
            "input_ids": np.array([rows[0], [0] * 10 + rows[1]]),
            "attention_mask": np.array([[1] * 30, [0] * 10 + [1] * 20]),
            "position_ids": np.array([list(range(30)), [1] * 10 + list(range(20))]),
            "beam_idx": np.arange(2, dtype=np.int32),
        }
        logits = decoder.compiled.create_infer_request().infer(feeds)["logits"]
        assert difference(logits[0], numpy_logits(checkpoint, rows[0])) < 1e-4
        assert difference(logits[1, 10:], numpy_logits(checkpoint, rows[1])) < 1e-4


@dataclass
class Case:
    """One architecture: its graph, and what transformers makes of the same folder."""

    folder: Path
    decoder: OpenVinoDecoder
    model: Any

    def expected(self, length: int) -> FloatArray:
        return transformers_logits(self.model, TOKENS[:length])


@pytest.fixture(scope="module", params=DECODER_ARCHITECTURES)
def case(request, tmp_path_factory):
    folder = write_tiny_checkpoint(tmp_path_factory.mktemp(request.param), request.param)
    with SafetensorsCheckpoint(folder) as checkpoint:
        return Case(folder, written(checkpoint, folder), pretrained(folder))


@pytest.mark.oracle
class TestAgainstTransformers:
    @pytest.mark.parametrize("length", [1, 20, 31, 32, 33, 60, 100])
    def test_every_position_of_a_prompt(self, case, length):
        assert difference(case.decoder.logits(TOKENS[:length]), case.expected(length)) < 1e-4

    @pytest.mark.parametrize(("first", "length"), [(10, 32), (33, 60)])
    def test_decode_after_prefill(self, case, first, length):
        case.decoder.reset()
        found = [case.decoder.run(TOKENS[:first])[-1:]]
        found += [case.decoder.run([token]) for token in TOKENS[first:length]]
        expected = case.expected(length)[first - 1 :]
        assert difference(np.concatenate(found), expected) < 1e-4

    @pytest.mark.parametrize(
        ("precision", "bound"), [("fp16", 1e-4), ("exact", 1e-9), ("int8", 0.08), ("int4", 0.5)]
    )
    def test_mean_kl(self, case, precision, bound, tmp_path):
        with SafetensorsCheckpoint(case.folder) as checkpoint:
            found = written(checkpoint, tmp_path, precision).logits(TOKENS)
        assert mean_kl(case.expected(100), found) < bound


class TestPrecisions:
    @pytest.mark.parametrize("encoding", ["F16", "BF16", "Q4_0", "Q4_1", "Q8_0"])
    @pytest.mark.parametrize("tied", [True, False])
    def test_exact_has_the_logits_of_fp32(self, encoding, tied, tmp_path):
        checkpoint = random_llama(tiny(tie_word_embeddings=tied), encoding=encoding)
        expected = written(checkpoint, tmp_path).logits(TOKENS)
        decoder = written(checkpoint, tmp_path, "exact")
        assert difference(decoder.logits(TOKENS), expected) < 1e-4
        decoder.reset()
        one_by_one = np.concatenate([decoder.run([token]) for token in TOKENS[:10]])
        assert difference(one_by_one, expected[:10]) < 1e-4

    def test_exact_keeps_blocks_of_one_value(self, tmp_path):
        """Q4_1 stores such a block with a scale of 0, which a zero point is divided by."""
        checkpoint = random_llama(encoding="Q4_1")
        values = np.full((128, 64), 0.05, np.float32)
        checkpoint.put("model.layers.0.mlp.up_proj.weight", values, "Q4_1")
        expected = written(checkpoint, tmp_path).logits(TOKENS)
        assert difference(written(checkpoint, tmp_path, "exact").logits(TOKENS), expected) < 1e-4

    def test_exact_refuses_other_encodings(self, tmp_path):
        checkpoint = random_llama()
        checkpoint.tensors["model.layers.0.mlp.up_proj.weight"].__dict__["encoding"] = "Q3_K"
        with pytest.raises(UnsupportedModelError, match="Q3_K"):
            written(checkpoint, tmp_path, "exact")

    @pytest.mark.parametrize(("precision", "share"), [("fp16", 0.5), ("int8", 0.26)])
    def test_size(self, precision, share, tmp_path):
        config = tiny(hidden_size=256, intermediate_size=512)
        checkpoint = random_llama(config)
        sizes = {}
        for name in ("fp32", precision):
            written(checkpoint, tmp_path, name)
            sizes[name] = (tmp_path / f"openvino-{name}" / "openvino_model.bin").stat().st_size
        assert sizes[precision] / sizes["fp32"] < share + 0.02

    @pytest.mark.parametrize("precision", ["fp8", "bf16"])
    def test_unknown_precisions_are_refused(self, precision, tmp_path):
        with pytest.raises((ValueError, UnsupportedModelError), match=precision):
            written(random_llama(), tmp_path, precision)


class TestGraph:
    @pytest.mark.parametrize("name", ["llama", "gemma3_text", "phi3"])
    def test_the_plugin_fuses_attention_norms_and_rotation(self, name, tmp_path):
        config = DECODERS[name]
        types = written(random_decoder(config), tmp_path).layer_types()
        assert types.count("ScaledDotProductAttention") == config.num_layers
        assert types.count("RoPE") == 2 * config.num_layers
        assert "RMS" in types
        assert "Softmax" not in types

    def test_is_named_as_optimum_names_it(self, tmp_path):
        decoder = written(random_llama(), tmp_path)
        inputs = {name for value in decoder.compiled.inputs for name in value.names}
        assert inputs == {"input_ids", "attention_mask", "position_ids", "beam_idx"}
        states = {state.name for state in decoder.compiled.create_infer_request().query_state()}
        assert "past_key_values.1.valuepresent.1.value" in states
        assert len(states) == 4


class TestFiles:
    def test_nothing_else_is_left(self, tmp_path):
        written(random_llama(), tmp_path)
        left = sorted(file.name for file in (tmp_path / "openvino-fp32").iterdir())
        assert left == ["openvino_model.bin", "openvino_model.xml"]

    def test_nothing_is_left_of_a_failure(self, tmp_path):
        checkpoint = random_llama()
        del checkpoint.tensors["model.norm.weight"]
        with pytest.raises(KeyError):
            write_openvino(checkpoint, tmp_path, recipe=Recipe(Precision.FP32))
        assert not list(tmp_path.iterdir())

    def test_nothing_is_overwritten(self, tmp_path):
        (tmp_path / "openvino_model.bin").write_bytes(b"mine")
        with pytest.raises(FileExistsError, match=r"openvino_model\.bin"):
            write_openvino(random_llama(), tmp_path, recipe=Recipe(Precision.FP32))
        assert (tmp_path / "openvino_model.bin").read_bytes() == b"mine"

    def test_other_architectures_are_refused(self, tmp_path):
        with pytest.raises(UnsupportedModelError, match="falcon"):
            write_openvino(
                random_llama(tiny(architecture="falcon")), tmp_path, recipe=Recipe(Precision.FP32)
            )

    def test_sizes_that_no_machine_holds_are_refused(self, tmp_path):
        huge = tiny(vocab_size=10**12)
        checkpoint = random_llama()
        checkpoint.config = huge
        with pytest.raises(UnsupportedModelError, match="embedding"):
            write_openvino(checkpoint, tmp_path, recipe=Recipe(Precision.FP32))
