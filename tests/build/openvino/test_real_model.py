"""The default model as OpenVINO IR, against transformers reading the same GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from phirt.build.convert import convert
from tests.build.onnx.oracle import transformers_logits
from tests.build.onnx.runtime import mean_kl
from tests.build.openvino.runtime import OpenVinoDecoder

pytestmark = [pytest.mark.model, pytest.mark.oracle, pytest.mark.slow]

TEXT = Path(__file__).parents[3] / "benchmarks" / "quality_text.txt"
LENGTH = 200


@pytest.fixture(scope="module")
def convert_to(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    def make(precision: str) -> Path:
        folder = tmp_path_factory.mktemp(precision)
        convert(smollm2_gguf, folder, layout="openvino", precision=precision)
        return folder

    return make


@pytest.fixture(scope="module")
def prompt(convert_to: Any) -> list[int]:
    tokenizer = Tokenizer.from_file(str(convert_to("int4") / "tokenizer.json"))
    ids: list[int] = tokenizer.encode(TEXT.read_text(encoding="utf-8")).ids[:LENGTH]
    return ids


@pytest.fixture(scope="module")
def expected(smollm2_oracle: Any, prompt: list[int]) -> Any:
    return transformers_logits(smollm2_oracle, prompt)


@pytest.mark.parametrize("precision", ["fp32", "exact"])
def test_lossless_precisions(convert_to, prompt, expected, precision):
    decoder = OpenVinoDecoder(convert_to(precision) / "openvino_model.xml")
    assert np.abs(decoder.logits(prompt) - expected).max() < 1e-3
    decoder.reset()
    found = [decoder.run(prompt[:100])[-1:], *(decoder.run([token]) for token in prompt[100:150])]
    assert np.abs(np.concatenate(found) - expected[99:150]).max() < 1e-3


@pytest.mark.parametrize(("precision", "bound"), [("fp16", 1e-4), ("int8", 0.01), ("int4", 0.005)])
def test_mean_kl(convert_to, prompt, expected, precision, bound):
    """Measured: 2e-6, 0.0075, 0.0018."""
    decoder = OpenVinoDecoder(convert_to(precision) / "openvino_model.xml")
    assert mean_kl(expected, decoder.logits(prompt)) < bound
    decoder.reset()
    one_by_one = np.concatenate([decoder.run([token]) for token in prompt[:100]])
    assert mean_kl(expected[:100], one_by_one) < bound
