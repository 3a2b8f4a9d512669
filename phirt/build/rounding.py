"""Rounds the matrices of a model to 4 bits once, for all who need them so.

The search for scales is the dearest part of a conversion. Both the writer and the canary
(`phirt.build.canary`) want what comes of it, each in its own time; it is kept on disk between.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from phirt.build.checkpoint import Checkpoint, CheckpointTensor
from phirt.build.quantize import QuantizedMatrix, concatenate_rows, quantize_int4
from phirt.build.recipe import Recipe
from phirt.errors import UnsupportedModelError
from phirt.types import Progress, ProgressCallback

__all__ = ["RoundedFiles", "check_blocks", "round_matrices", "round_matrix"]

_PIECE = 1 << 24  # Elements of a matrix that are read at once: 64 MB as floats.


class RoundedFiles(Mapping[str, QuantizedMatrix]):
    """Rounded matrices by the names of their tensors, a file each.

    Each thread keeps the last that it asked for: who goes through a matrix asks for it again
    with every few rows.

    Args:
        folder: An empty folder; the caller keeps it as long as this is used, and removes it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._paths: dict[str, Path] = {}
        self._last = threading.local()

    def add(self, name: str, matrix: QuantizedMatrix) -> None:
        """Keep a matrix of 4 bits, without offsets."""
        path = self._folder / f"{len(self._paths)}.npz"
        parts: dict[str, Any] = {"values": matrix.values, "scales": matrix.scales}
        if matrix.zero_points is not None:
            parts["zero_points"] = matrix.zero_points
        np.savez(path, allow_pickle=False, **parts)
        self._paths[name] = path

    def __getitem__(self, name: str) -> QuantizedMatrix:
        path = self._paths[name]
        kept: tuple[str, QuantizedMatrix] | None = getattr(self._last, "kept", None)
        if kept is None or kept[0] != name:
            self._last.kept = None  # freed before the next is read
            kept = self._last.kept = (name, _read(path))
        return kept[1]

    def __contains__(self, name: object) -> bool:
        return name in self._paths  # where Mapping would read the file

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def round_matrices(
    checkpoint: Checkpoint,
    recipe: Recipe,
    rounded: RoundedFiles,
    *,
    progress: ProgressCallback | None = None,
) -> None:
    """Round what a recipe rounds to 4 bits and is not rounded yet.

    Args:
        checkpoint: The weights.
        recipe: What is rounded, and how.
        rounded: What was rounded before, to which the rest is added.
        progress: Called for every matrix.

    Raises:
        ModelFormatError: A tensor is damaged.
        UnsupportedModelError: Blocks do not divide a matrix.
    """
    names = [
        name
        for name in checkpoint.names()
        if len(checkpoint.tensor(name).shape) > 1
        and name not in rounded
        and recipe.rounds_to_4_bits(checkpoint.tensor(name))
    ]
    for done, name in enumerate(names, 1):
        rounded.add(name, round_matrix(checkpoint.tensor(name), recipe))
        if progress is not None:
            progress(Progress("quantize", done, len(names), "tensors"))


def check_blocks(tensor: CheckpointTensor, block_size: int) -> None:
    """Refuse a matrix that blocks do not divide.

    Raises:
        UnsupportedModelError: They do not.
    """
    columns = tensor.shape[-1]
    if columns % block_size:
        raise UnsupportedModelError(
            f"Tensor {tensor.name!r} has {columns:,} columns, which blocks of {block_size} do not "
            "divide, so that it cannot be stored in 4 bits. Use a smaller block size, keep it in 8 "
            "bits, or use precision='fp32'."
        )


def round_matrix(tensor: CheckpointTensor, recipe: Recipe) -> QuantizedMatrix:
    """A matrix, or some of its rows, in 4 bits.

    Raises:
        UnsupportedModelError: Blocks do not divide it.
    """
    chosen = recipe.quantization
    check_blocks(tensor, chosen.block_size)
    rows, columns = tensor.shape
    step = max(1, _PIECE // columns)
    parts = [
        quantize_int4(
            tensor.rows(start, min(start + step, rows)).float32(),
            block_size=chosen.block_size,
            symmetric=chosen.symmetric,
        )
        for start in range(0, rows, step)
    ]
    return concatenate_rows(parts)


def _read(path: Path) -> QuantizedMatrix:
    with np.load(path) as parts:
        values = parts["values"]
        return QuantizedMatrix(
            bits=4,
            block_size=2 * values.shape[-1],
            values=values,
            scales=parts["scales"],
            zero_points=parts.get("zero_points"),
        )
