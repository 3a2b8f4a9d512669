"""The default model, converted, against transformers reading the same GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from phirt.build.convert import choose_precision, convert
from tests.build.onnx.oracle import transformers_logits
from tests.build.onnx.runtime import OnnxDecoder, mean_kl

pytestmark = [pytest.mark.model, pytest.mark.oracle, pytest.mark.slow]

TEXT = Path(__file__).parents[3] / "benchmarks" / "quality_text.txt"
LENGTHS = (5, 20, 60, 150, 300)


@pytest.fixture(scope="module")
def folders(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    assert choose_precision(smollm2_gguf, "onnx-genai") == "int8"
    for precision in ("fp32", "exact", "int8", "int4"):
        folders[precision] = tmp_path_factory.mktemp(precision)
        convert(smollm2_gguf, folders[precision], layout="onnx-genai", precision=precision)
    return folders


@pytest.fixture(scope="module")
def prompts(folders: dict[str, Path]) -> list[list[int]]:
    """Prompts from different places of a text of prose, code and figures."""
    tokenizer = Tokenizer.from_file(str(folders["fp32"] / "tokenizer.json"))
    ids = tokenizer.encode(TEXT.read_text(encoding="utf-8"), add_special_tokens=False).ids
    assert len(ids) > 1000
    return [ids[200 * i : 200 * i + length] for i, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def expected(smollm2_oracle: Any, prompts: list[list[int]]) -> list[Any]:
    return [transformers_logits(smollm2_oracle, prompt) for prompt in prompts]


def test_fp32_logits(folders, prompts, expected):
    decoder = OnnxDecoder(folders["fp32"] / "model.onnx")
    for prompt, logits in zip(prompts, expected, strict=True):
        assert np.abs(decoder.logits(prompt) - logits).max() < 1e-3


@pytest.mark.parametrize("chunk", [None, 1], ids=["prefill kernels", "decode kernels"])
def test_exact_logits(folders, prompts, expected, chunk):
    decoder = OnnxDecoder(folders["exact"] / "model.onnx")
    for prompt, logits in zip(prompts, expected, strict=True):
        found = decoder.logits(prompt, chunk=chunk)
        assert np.abs(found - logits).max() < 5e-3
        assert mean_kl(logits, found) < 1e-4


@pytest.mark.parametrize("chunk", [None, 1], ids=["prefill kernels", "decode kernels"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_rounded_precisions_are_close(folders, prompts, expected, precision, chunk):
    decoder = OnnxDecoder(folders[precision] / "model.onnx")
    found = [decoder.logits(prompt, chunk=chunk) for prompt in prompts]
    assert mean_kl(np.concatenate(expected), np.concatenate(found)) < 0.02
