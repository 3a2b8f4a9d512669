"""Small folders, one file of them cut at every byte: a typed error, never a crash. Row M8."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import pytest

from phirt.build.huggingface_config import config_document
from phirt.build.onnx_decoder import write_decoder
from phirt.build.precision import Precision
from phirt.build.recipe import Recipe
from phirt.build.safetensors_checkpoint import SafetensorsCheckpoint
from phirt.build.safetensors_writer import write_safetensors
from phirt.errors import PhirtError
from phirt.models.onnx_safety import check_onnx_files
from phirt.models.rotary import Rotary
from tests.build.onnx.checkpoints import random_llama, tiny

SMALL = tiny(
    vocab_size=8,
    hidden_size=8,
    intermediate_size=8,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_size=8,
    context_length=8,
    rope=Rotary(theta=10_000.0, dim=8),
)


def cut_at_every_byte(
    path: Path, read: Callable[[], None], *, still_whole: Collection[int] = ()
) -> None:
    """Read a file at every length; all but ``still_whole`` must be an error."""
    whole = path.read_bytes()
    assert len(whole) < 20_000
    read()
    for length in range(len(whole) - 1, -1, -1):
        os.truncate(path, length)
        if length in still_whole:
            read()
            continue
        with pytest.raises(PhirtError):
            read()


@pytest.fixture
def checkpoint_folder(tmp_path):
    checkpoint = random_llama(SMALL)
    write_safetensors(checkpoint, tmp_path / "model.safetensors", precision="fp32")
    # The object's end is the file's, so that no cut leaves a whole one.
    (tmp_path / "config.json").write_text(json.dumps(config_document(SMALL)))
    return tmp_path


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_checkpoint(checkpoint_folder, name):
    def read() -> None:
        with SafetensorsCheckpoint(checkpoint_folder) as checkpoint:
            for tensor in checkpoint.names():
                checkpoint.tensor(tensor).float32()

    cut_at_every_byte(checkpoint_folder / name, read)


@pytest.fixture
def graph_folder(tmp_path):
    checkpoint = random_llama(replace(SMALL, vocab_size=64))  # Wide enough for a file of its own.
    write_decoder(checkpoint, tmp_path / "model.onnx", recipe=Recipe(Precision.FP32))
    return tmp_path


def test_a_graph(graph_folder):
    path = graph_folder / "model.onnx"
    # The last field is the version of ONNX Runtime's own operators: a message without it is whole.
    end = path.read_bytes().rindex(b"B\x11\n\rcom.microsoft")
    cut_at_every_byte(path, lambda: check_onnx_files(graph_folder, "model.onnx"), still_whole={end})


def test_the_weights_of_a_graph(graph_folder):
    path = graph_folder / "model.onnx.data"
    assert path.stat().st_size > 1000
    cut_at_every_byte(path, lambda: check_onnx_files(graph_folder, "model.onnx"))
