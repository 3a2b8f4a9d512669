"""What is in a folder, and what is to happen while one is made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx

from phirt.models.hashing import sha256_of
from phirt.models.manifest import read_manifest

__all__ = ["content", "edit", "initializers", "is_whole", "raising"]


def is_whole(folder: Path) -> bool:
    """Whether a folder holds exactly what its phirt.json says, byte for byte."""
    manifest = read_manifest(folder)
    assert manifest is not None
    names = {path.name for path in folder.iterdir()} - {"phirt.json"}
    return names == set(manifest.files) and all(
        record.sha256 == sha256_of(folder / name) for name, record in manifest.files.items()
    )


def content(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in folder.iterdir()}


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def initializers(folder: Path) -> dict[str, onnx.TensorProto]:
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    return {tensor.name: tensor for tensor in model.graph.initializer}


def raising(error: BaseException) -> Callable[..., None]:
    def raises(*_: object, **__: object) -> None:
        raise error

    return raises
