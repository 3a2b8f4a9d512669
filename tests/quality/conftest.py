"""Tiny models in several formats, each loaded once for all files of this folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

import phirt
from phirt.testing import write_tiny_checkpoint
from phirt.testing.checkpoints import safetensors_bytes
from phirt.types import FloatArray

Edit = Callable[[dict[str, FloatArray]], object]
Load = Callable[..., phirt.Model]

TEXTS = {
    "prose": "The sea was calm and the old man sat in his boat and waited for the fish. " * 8,
    "code": "def add(one, other):\n    return one + other\n\nprint(add(12, 30))\n" * 8,
}
"""Some 350 tokens each for the tiny tokenizer."""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama of 2 layers, as a folder of safetensors in float32."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("quality") / "tiny", "llama")


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Load]:
    """`phirt.load` into a store of this run; the same arguments give the same model."""
    models: dict[str, phirt.Model] = {}
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setenv("PHIRT_HOME", str(tmp_path_factory.mktemp("quality-home")))

        def load(folder: Path, **options: str) -> phirt.Model:
            key = f"{folder} {sorted(options.items())}"
            if key not in models:
                models[key] = stack.enter_context(phirt.load(folder, **options))  # type: ignore[arg-type]  # only strings here
            return models[key]

        yield load


@pytest.fixture(scope="session")
def exact(load: Load, checkpoint: Path) -> phirt.Model:
    """The checkpoint as it is, on the reference backend."""
    return load(checkpoint, backend="reference")


@pytest.fixture(scope="session")
def edited(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Edit], Path]:
    """A copy of the checkpoint with other weights."""

    def edited(edit: Edit) -> Path:
        folder = tmp_path_factory.mktemp("edited") / "tiny"
        folder.mkdir()
        for file in checkpoint.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        tensors = read_safetensors(folder / "model.safetensors")
        edit(tensors)
        (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
        return folder

    return edited


def read_safetensors(path: Path) -> dict[str, FloatArray]:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header: Mapping[str, dict[str, list[int]]] = json.loads(data[8 : 8 + size])
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = (8 + size + offset for offset in entry["data_offsets"])
            tensors[name] = (
                np.frombuffer(data[start:end], np.float32).reshape(entry["shape"]).copy()
            )
    return tensors
