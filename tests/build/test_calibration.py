"""Calibration: what a text through the model buys, on other tokens than it was rounded for."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from phirt.build.calibration import calibrate, calibration_tokens
from phirt.build.onnx_precision import rounded
from phirt.build.precision import Precision
from phirt.build.recipe import Quantization, Recipe
from phirt.build.rounding import RoundedFiles
from phirt.errors import UnsupportedModelError
from phirt.types import IntArray, Progress, ProgressCallback
from tests.build.decoders import DECODERS, numpy_logits, random_decoder
from tests.build.onnx.checkpoints import MemoryCheckpoint, random_llama, tiny
from tests.build.onnx.runtime import mean_kl

TEXT = (files("phirt.text") / "calibration.txt").read_text(encoding="utf-8")
BYTES = tiny(vocab_size=256, context_length=512)


def letters(text: str) -> list[int]:
    """A tokenizer of bytes."""
    return list(text.encode())


def recipe(**quantization: object) -> Recipe:
    chosen = {"calibrate": True, **quantization}
    return Recipe(Precision.INT4, Quantization(**chosen))  # type: ignore[arg-type]


def calibrated(
    checkpoint: MemoryCheckpoint,
    chosen: Recipe,
    tokens: IntArray,
    folder: Path,
    progress: ProgressCallback | None = None,
) -> RoundedFiles:
    """What calibration rounds."""
    found = RoundedFiles(folder)
    calibrate(checkpoint, chosen, tokens, found, progress=progress)
    return found


def as_rounded(checkpoint: MemoryCheckpoint, chosen: Recipe) -> MemoryCheckpoint:
    """The checkpoint whose weights are those that a graph of the recipe multiplies by."""
    result = MemoryCheckpoint(checkpoint.config)
    for name in checkpoint.names():
        tensor = checkpoint.tensor(name)
        is_matrix = len(tensor.shape) > 1
        result.put(name, rounded(tensor, chosen) if is_matrix else tensor.float32(), "F32")
    return result


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_it_is_closer_to_the_original_on_tokens_that_it_has_not_seen(
    tmp_path, block_size, symmetric
):
    checkpoint = random_decoder(BYTES)
    seen = calibration_tokens(letters, BYTES)
    unseen = letters("Wer reitet so spät durch Nacht und Wind? Es ist der Vater mit seinem Kind.")
    chosen = recipe(block_size=block_size, symmetric=symmetric, int8_layers=("embed_tokens",))
    text = replace(chosen, rounded=calibrated(checkpoint, chosen, seen, tmp_path))
    original = numpy_logits(checkpoint, unseen)
    with_text = mean_kl(original, numpy_logits(as_rounded(checkpoint, text), unseen))
    without = mean_kl(original, numpy_logits(as_rounded(checkpoint, chosen), unseen))
    assert 0 < with_text < 0.8 * without


def test_what_a_recipe_keeps_is_left_alone(tmp_path):
    checkpoint = random_llama(tiny(vocab_size=256), encodings={"o_proj": "Q4_0", "up_proj": "Q5_0"})
    chosen = recipe(int8_layers=("q_proj", "layers.1.*"))
    found = calibrated(checkpoint, chosen, calibration_tokens(letters, checkpoint.config), tmp_path)
    scope = "model.layers.0"
    # Blocks of the file's own lose nothing, and the embedding is no layer's.
    assert set(found) == {
        f"{scope}.self_attn.k_proj.weight",
        f"{scope}.self_attn.v_proj.weight",
        f"{scope}.mlp.gate_proj.weight",
        f"{scope}.mlp.down_proj.weight",
    }
    assert len(found) == 4


@pytest.mark.parametrize("symmetric", [False, True])
def test_what_was_rounded_is_kept_in_the_folder_and_nowhere_else(tmp_path, monkeypatch, symmetric):
    folder, elsewhere = tmp_path / "given", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("TMPDIR", str(elsewhere))
    checkpoint = random_llama(tiny(vocab_size=256))
    chosen = recipe(symmetric=symmetric, block_size=64)
    found = calibrated(checkpoint, chosen, calibration_tokens(letters, checkpoint.config), folder)
    assert len(list(folder.iterdir())) == len(found) == 8
    assert not any(elsewhere.iterdir())
    name = "model.layers.1.mlp.down_proj.weight"
    first, other = found[name], found["model.layers.1.mlp.up_proj.weight"]
    assert (first.rows, first.columns, first.block_size) == (64, 128, 64)
    assert (other.rows, other.columns) == (128, 64)
    assert (first.zero_points is None) == symmetric
    np.testing.assert_array_equal(found[name].values, first.values)
    assert name in found
    assert "model.embed_tokens.weight" not in found


def test_all_that_is_rounded_is_counted(tmp_path):
    checkpoint = random_llama(tiny(vocab_size=256))
    told: list[Progress] = []
    tokens = calibration_tokens(letters, checkpoint.config)
    calibrated(checkpoint, recipe(), tokens, tmp_path, progress=told.append)
    # Seven matrices in each of two layers, those among them that keep 8 bits.
    assert told == [Progress("calibrate", count, 14, "tensors") for count in range(1, 15)]


def test_blocks_that_do_not_divide_a_matrix_are_refused_by_name(tmp_path):
    checkpoint = random_llama(tiny(vocab_size=256, intermediate_size=96))
    tokens = calibration_tokens(letters, checkpoint.config)
    with pytest.raises(UnsupportedModelError, match=r"mlp\.down_proj.*96 columns.*blocks of 64"):
        calibrated(checkpoint, recipe(block_size=64), tokens, tmp_path)


@pytest.mark.parametrize("name", DECODERS)
def test_every_architecture_can_be_calibrated(tmp_path, name):
    config = replace(DECODERS[name], vocab_size=256)
    checkpoint = random_decoder(config)
    chosen = recipe(block_size=16, int8_layers=("embed_tokens",))
    tokens = calibration_tokens(letters, config)[:4]
    if config.hidden_size % 16:
        with pytest.raises(UnsupportedModelError, match="do not divide"):
            calibrated(checkpoint, chosen, tokens, tmp_path)
        return
    assert len(calibrated(checkpoint, chosen, tokens, tmp_path)) == 14


# The tokens.


def test_tokens_are_pieces_from_all_over_the_text():
    ids = letters(TEXT)
    found = calibration_tokens(letters, BYTES)
    assert found.shape == (32, 160)
    assert found[0].tolist() == ids[:160]
    assert found[-1].tolist() == ids[-160:]
    text = bytes(ids)
    places = [text.index(bytes(map(int, row))) for row in found]
    assert places == sorted(places)
    gaps = np.diff(places)
    assert gaps.max() - gaps.min() <= 1, "evenly spaced"


def test_the_text_is_not_what_quality_is_measured_on():
    held_out = "".join(
        path.read_text(encoding="utf-8")
        for path in (files("phirt.quality") / "texts").iterdir()
        if path.name.endswith(".txt")
    )
    sentences = [line for line in TEXT.splitlines() if len(line) > 40]
    assert sentences
    assert not [line for line in sentences if line in held_out]


def test_pieces_are_no_longer_than_the_model_reads_with_one_kind_of_rope():
    assert calibration_tokens(letters, tiny(vocab_size=256, context_length=100)).shape == (32, 100)
    assert DECODERS["phi3"].rope.boundary == 32
    phi3 = replace(DECODERS["phi3"], vocab_size=256)
    assert calibration_tokens(letters, phi3).shape == (32, 32)


def test_ids_that_the_model_does_not_know_are_left_out():
    found = calibration_tokens(letters, tiny(vocab_size=100))
    assert found.max() < 100
    assert found[0].tolist() == [each for each in letters(TEXT) if each < 100][: found.shape[1]]


def test_a_tokenizer_that_makes_too_little_of_the_text_is_refused():
    with pytest.raises(UnsupportedModelError, match="255 tokens that it knows: too few"):
        calibration_tokens(lambda text: letters(text)[:255], BYTES)
    assert calibration_tokens(lambda text: letters(text)[:256], BYTES).shape == (32, 8)


def test_a_model_of_a_shorter_context_than_any_piece_is_refused():
    with pytest.raises(UnsupportedModelError, match="Do without calibration"):
        calibration_tokens(letters, tiny(vocab_size=256, context_length=7))
