"""Matrices as constants of an OpenVINO graph, in each precision, streamed through a file.

A quantized matrix is a constant of integers that ``Convert``, ``Subtract`` and ``Multiply``
turn into floats. OpenVINO's plugins recognise that pattern and multiply by the integers
(what it calls compressed weights); a plugin that does not still computes the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from phirt.backends.openvino.runtime import import_openvino
from phirt.build.checkpoint import Checkpoint, CheckpointTensor
from phirt.build.openvino_precision import IntegerMatrix, encode
from phirt.build.recipe import Recipe

ov = import_openvino()
ops = ov.opset13

__all__ = ["MatrixWriter", "ScratchFile"]

_ALIGNMENT = 64


class ScratchFile:
    """Arrays on disk, mapped back into memory: OpenVINO serializes whole graphs only.

    Args:
        path: The file, which is deleted in the end.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream = path.open("xb")
        self._maps: list[NDArray[Any]] = []  # OpenVINO does not keep alive what it shares.

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stream.close()
        self._maps.clear()
        self._path.unlink()

    def put(self, array: NDArray[Any]) -> NDArray[Any]:
        """Write an array, and return it as it lies in the file."""
        stream = self._stream
        stream.write(bytes(-stream.tell() % _ALIGNMENT))
        offset = stream.tell()
        stream.write(np.ascontiguousarray(array).data.cast("B"))
        stream.flush()
        # Copy on write: OpenVINO takes no array that it could not write to.
        mapped = np.memmap(self._path, array.dtype, mode="c", offset=offset, shape=array.shape)
        self._maps.append(mapped)
        return mapped


class MatrixWriter:
    """Writes what holds a decoder's matrices: projections, embedding, LM head.

    Args:
        checkpoint: The weights.
        recipe: How they are stored.
        scratch: Receives them.
    """

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, scratch: ScratchFile) -> None:
        self._checkpoint = checkpoint
        self._recipe = recipe
        self._scratch = scratch
        self._tables: dict[str, Any] = {}  # weights that two nodes share, by tensor

    def vector(self, tensor: str, *, offset: float = 0.0) -> Any:
        """A norm's weight or a bias plus ``offset``, as a constant of float32."""
        values = self._checkpoint.tensor(tensor).float32() + np.float32(offset)
        return ops.constant(values.astype(np.float32), name=tensor)

    def project(self, x: Any, tensor: str, *, bias: str | None = None) -> Any:
        """``x @ weight.T + bias``.

        Args:
            x: The input, (batch, positions, in).
            tensor: Name of the matrix (out, in) in the checkpoint.
            bias: Name of the bias, if there is one.
        """
        weights = self._weights(self._checkpoint.tensor(tensor))
        product = ops.matmul(x, weights, False, True, name=tensor.removesuffix(".weight"))
        return product if bias is None else ops.add(product, self.vector(bias))

    def embed(self, token_ids: Any, tensor: str) -> Any:
        """Rows of the embedding, (batch, positions, width)."""
        axis = ops.constant(np.int64(0))
        return ops.gather(self._table(tensor), token_ids, axis, name="embed_tokens")

    def head(self, x: Any, tensor: str) -> Any:
        """The logits, (batch, positions, vocabulary); the matrix may be the embedding."""
        return ops.matmul(x, self._table(tensor), False, True, name="lm_head")

    def _table(self, tensor: str) -> Any:
        if tensor not in self._tables:
            self._tables[tensor] = self._weights(self._checkpoint.tensor(tensor))
        return self._tables[tensor]

    def _weights(self, tensor: CheckpointTensor) -> Any:
        matrix = encode(tensor, self._recipe)
        if isinstance(matrix, IntegerMatrix):
            return self._decompress(matrix, tensor.name)
        constant = self._constant(matrix, name=tensor.name)
        return constant if matrix.dtype == np.float32 else ops.convert(constant, "f32")

    def _decompress(self, matrix: IntegerMatrix, name: str) -> Any:
        rows, blocks, width = matrix.shape
        # One block a row needs no third axis.
        shape = matrix.shape if blocks > 1 else (rows, width)
        each = (*shape[:-1], 1)
        weights = ops.convert(self._integers(matrix, shape, name), "f32")
        if matrix.zeros is not None:
            zeros = self._constant(matrix.zeros.reshape(each), name=f"{name}/zeros")
            weights = ops.subtract(weights, zeros)
        scales = self._constant(matrix.scales.reshape(each), name=f"{name}/scales")
        weights = ops.multiply(weights, scales)
        if blocks == 1:
            return weights
        return ops.reshape(weights, ops.constant(np.array([rows, blocks * width])), False)

    def _integers(self, matrix: IntegerMatrix, shape: tuple[int, ...], name: str) -> Any:
        if matrix.bits == 8:
            return self._constant(matrix.values.reshape(shape), name=name)
        packed = ov.Tensor(self._scratch.put(matrix.values), ov.Shape(shape), ov.Type.u4)
        return _shared(packed, name)

    def _constant(self, array: NDArray[Any], *, name: str) -> Any:
        return _shared(ov.Tensor(self._scratch.put(array), shared_memory=True), name)


def _shared(tensor: Any, name: str) -> Any:
    constant = ov.op.Constant(tensor, shared_memory=True)
    constant.set_friendly_name(name)
    return constant
