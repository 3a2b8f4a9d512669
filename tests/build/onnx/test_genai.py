"""The graphs on onnxruntime-genai, which drives them in its own way."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from phirt.build.documents import genai_document, write_json
from phirt.build.onnx_decoder import write_decoder
from phirt.build.precision import Precision
from phirt.build.recipe import Recipe
from phirt.build.safetensors_checkpoint import SafetensorsCheckpoint
from phirt.models.huggingface_config import DECODER_ARCHITECTURES
from phirt.testing import write_tiny_checkpoint
from tests.build.onnx.runtime import OnnxDecoder
from tests.installed import require

require("onnxruntime_genai")
genai = import_module("onnxruntime_genai")
genai.disable_telemetry_events()

TOKENS = [int(i) for i in np.random.default_rng(5).integers(0, 320, 60)]


@pytest.fixture(scope="module", params=DECODER_ARCHITECTURES)
def folder(request, tmp_path_factory):
    """A graph and what phirt tells genai about it."""
    folder = tmp_path_factory.mktemp(request.param)
    write_tiny_checkpoint(folder, request.param)
    with SafetensorsCheckpoint(folder) as checkpoint:
        write_decoder(checkpoint, folder / "model.onnx", recipe=Recipe(Precision.FP32))
        document = genai_document(checkpoint.config, filename="model.onnx")
    write_json(folder / "genai_config.json", document)
    return folder


@pytest.mark.parametrize(("first", "length"), [(20, 32), (40, 60)])  # phi3: short, long factors
def test_prefill_and_decode_are_those_of_the_bare_runtime(folder: Path, first: int, length: int):
    model = genai.Model(str(folder))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=length + 1)
    generator = genai.Generator(model, params)
    generator.append_tokens(np.array(TOKENS[:first], np.int32))
    found = [generator.get_logits().reshape(-1)]
    assert generator.get_output("logits").shape == (1, 1, len(found[0])), "only the last position"
    for token in TOKENS[first:length]:
        generator.append_tokens(np.array([token], np.int32))
        found.append(generator.get_logits().reshape(-1))
    bare = OnnxDecoder(folder / "model.onnx")
    expected = [bare.run(TOKENS[:first])]
    expected += [bare.run([token]) for token in TOKENS[first:length]]
    np.testing.assert_allclose(np.stack(found), np.concatenate(expected), atol=1e-4)
