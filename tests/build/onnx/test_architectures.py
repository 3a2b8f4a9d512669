"""Every architecture's graph, from a Hugging Face folder, against transformers on that folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from phirt.build.gguf.checkpoint import GgufCheckpoint
from phirt.build.onnx_decoder import write_decoder
from phirt.build.precision import Precision
from phirt.build.recipe import Recipe
from phirt.build.safetensors_checkpoint import SafetensorsCheckpoint
from phirt.models.huggingface_config import DECODER_ARCHITECTURES
from phirt.models.onnx_safety import check_onnx_files
from phirt.testing import write_tiny_checkpoint
from phirt.types import FloatArray
from tests.build.onnx.oracle import pretrained, transformers_logits
from tests.build.onnx.runtime import OnnxDecoder, mean_kl, written
from tests.tiny_gguf import write_tiny_llama_gguf

pytestmark = pytest.mark.oracle

# mistral and gemma3_text have windows of 16 tokens; phi3 goes over to its long factors beyond 32.
TOKENS = [int(i) for i in np.random.default_rng(5).integers(0, 320, 100)]


@dataclass
class Case:
    """One architecture: its folder, its graph, and what transformers makes of the folder."""

    folder: Path
    decoder: OnnxDecoder
    model: Any

    def expected(self, length: int) -> FloatArray:
        return transformers_logits(self.model, TOKENS[:length])


@pytest.fixture(scope="module", params=DECODER_ARCHITECTURES)
def case(request, tmp_path_factory):
    return tiny_case(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def phi3(tmp_path_factory):
    return tiny_case(tmp_path_factory.mktemp("phi3"), "phi3")


def tiny_case(folder: Path, architecture: str) -> Case:
    write_tiny_checkpoint(folder, architecture)
    return Case(folder, converted(folder), pretrained(folder))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def converted(folder: Path, precision: Precision = Precision.FP32) -> OnnxDecoder:
    path = folder / f"{precision}.onnx"
    with SafetensorsCheckpoint(folder) as checkpoint:
        write_decoder(checkpoint, path, recipe=Recipe(precision))
    return OnnxDecoder(path)


def difference(found: FloatArray, expected: FloatArray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max())


class TestFloat32:
    @pytest.mark.parametrize("length", [1, 20, 100])
    def test_every_position_of_a_prompt(self, case, length):
        expected = case.expected(length)
        assert np.abs(expected).max() > 5, "the logits are too small to tell anything"
        assert difference(case.decoder.logits(TOKENS[:length]), expected) < 1e-4

    @pytest.mark.parametrize(("first", "length"), [(10, 32), (40, 60)])
    def test_decode_after_prefill(self, case, first, length):
        case.decoder.reset()
        found = [case.decoder.run(TOKENS[:first])]
        found += [case.decoder.run([token]) for token in TOKENS[first:length]]
        expected = case.expected(length)[first - 1 :]
        assert difference(np.concatenate(found), expected) < 1e-4

    def test_chunks(self, case):
        case.decoder.reset()
        cuts = [0, 40, 43, 44, 60, 100]  # The first beyond phi3's boundary.
        found = [case.decoder.run(TOKENS[a:b], keep=b - a) for a, b in pairwise(cuts)]
        assert difference(np.concatenate(found), case.expected(100)) < 1e-4


class TestLongRope:
    @pytest.mark.parametrize("length", [20, 31, 32, 33, 60])
    def test_a_prompt_uses_one_set_of_factors_for_all_positions(self, phi3, length):
        assert difference(phi3.decoder.logits(TOKENS[:length]), phi3.expected(length)) < 1e-4

    @pytest.mark.parametrize("length", [31, 32, 33, 60])
    def test_decode_stays_with_the_factors_of_its_prompt(self, phi3, length):
        first = 20 if length <= 32 else 33  # A session of the long factors begins beyond 32.
        phi3.decoder.reset()
        found = [phi3.decoder.run(TOKENS[:first])]
        found += [phi3.decoder.run([token]) for token in TOKENS[first:length]]
        expected = phi3.expected(length)[first - 1 :]
        assert difference(np.concatenate(found), expected) < 1e-4

    def test_crossing_without_a_new_prefill_would_be_wrong(self, phi3):
        phi3.decoder.reset()
        phi3.decoder.run(TOKENS[:32])
        crossed = phi3.decoder.run(TOKENS[32:33])
        assert difference(crossed, phi3.expected(33)[-1:]) > 0.1

    def test_the_tables_hold_both_regimes_and_nothing_more(self, phi3):
        graph = onnx.load(phi3.folder / "fp32.onnx", load_external_data=False).graph
        tables = {t.name: tuple(t.dims) for t in graph.initializer if "_cache" in t.name}
        assert tables == {
            "cos_cache_short_and_long": (32 + 128, 8),
            "sin_cache_short_and_long": (32 + 128, 8),
        }

    def test_a_part_of_the_head_rotates(self, tmp_path):
        """As in Phi-4-mini: half of a head, here, and heads twice as wide."""
        write_tiny_checkpoint(tmp_path, "phi3")
        changes = {"num_attention_heads": 2, "num_key_value_heads": 1, "partial_rotary_factor": 0.5}
        edit_config(tmp_path, **changes)
        decoder, model = converted(tmp_path), pretrained(tmp_path)
        for length in (32, 60):
            expected = transformers_logits(model, TOKENS[:length])
            assert difference(decoder.logits(TOKENS[:length]), expected) < 1e-4


class TestGemma3:
    def test_the_global_layers_scale_their_positions(self, tmp_path):
        """As those of every Gemma 3 above 1B do."""
        write_tiny_checkpoint(tmp_path, "gemma3_text")
        edit_config(tmp_path, rope_scaling={"rope_type": "linear", "factor": 8.0})
        expected = transformers_logits(pretrained(tmp_path), TOKENS)
        assert difference(converted(tmp_path).logits(TOKENS), expected) < 1e-4


class TestGguf:
    @pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
    def test_a_quantized_file_keeps_its_weights(self, architecture, tmp_path, monkeypatch):
        from transformers import AutoModelForCausalLM

        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        path = write_tiny_llama_gguf(
            tmp_path / "model.gguf",
            architecture=architecture,
            encoding="Q4_1",
            pre="qwen2",
            hidden=256,
            heads=2,  # transformers takes heads of 128 for granted in qwen3
            kv_heads=1,
        )
        model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name).eval()
        with GgufCheckpoint(path) as checkpoint:
            decoder = written(checkpoint, tmp_path, precision=Precision.EXACT)
        tokens = [token % 300 for token in TOKENS]
        expected = transformers_logits(model, tokens)
        assert difference(decoder.logits(tokens), expected) < 1e-3


class TestPrecisions:
    @pytest.mark.parametrize(
        ("precision", "bound"), [("exact", 1e-9), ("int8", 0.08), ("int4", 0.5)]
    )
    def test_mean_kl(self, case, precision, bound):
        found = converted(case.folder, Precision(precision)).logits(TOKENS)
        assert mean_kl(case.expected(100), found) < bound


class TestGraph:
    def test_is_one_that_a_backend_accepts(self, case):
        check_onnx_files(case.folder, "fp32.onnx")
