"""How an OpenVINO graph stores a matrix in each precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phirt.build.checkpoint import CheckpointTensor
from phirt.build.precision import Precision
from phirt.build.quantize import QuantizedMatrix, quantize_int8, split_nibbles
from phirt.build.recipe import Recipe
from phirt.build.repack import EXACT_ENCODINGS, repack
from phirt.build.rounding import round_matrix
from phirt.errors import UnsupportedModelError
from phirt.types import FloatArray

__all__ = ["IntegerMatrix", "encode", "rounded"]

_FLOAT_ENCODINGS = frozenset({"F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerMatrix:
    """A matrix ``scale * (value - zero)``, one scale and zero for each block of a row.

    Attributes:
        bits: 8 (``values`` are int8), or 4 (uint8, two unsigned values each, low first).
        shape: (rows, blocks, columns of a block).
        values: The integers, in row-major order.
        scales: Shape (rows, blocks, 1).
        zeros: Shape (rows, blocks, 1); None for 0 everywhere.
    """

    bits: int
    shape: tuple[int, int, int]
    values: NDArray[Any]
    scales: FloatArray
    zeros: FloatArray | None

    def dequantize(self) -> FloatArray:
        """The weights that the integers stand for, shape (rows, columns)."""
        values = self.values
        if self.bits == 4:
            values = np.stack(split_nibbles(values), axis=-1)
        weights = values.reshape(self.shape).astype(np.float32)
        if self.zeros is not None:
            weights -= self.zeros
        weights *= self.scales
        return weights.reshape(self.shape[0], -1)


def encode(
    tensor: CheckpointTensor, recipe: Recipe
) -> FloatArray | NDArray[np.float16] | IntegerMatrix:
    """Read a matrix in the form that a recipe gives it.

    Args:
        tensor: The matrix, (out, in), or some of its rows: what becomes of a row does not
            depend on the others.
        recipe: The recipe. Matrices that were rounded already are taken whole.

    Raises:
        UnsupportedModelError: The precision cannot hold it.
    """
    match recipe.precision:
        case Precision.FP32:
            return tensor.float32()
        case Precision.FP16:
            return tensor.float32().astype(np.float16)
        case Precision.EXACT:
            return _encode_exact(tensor)
        case Precision.INT4 if tensor.name in recipe.rounded:
            matrix = recipe.rounded[tensor.name]
        case Precision.INT4 if recipe.keeps_own_blocks(tensor):
            return _encode_exact(tensor)
        case Precision.INT4 if recipe.rounds_to_4_bits(tensor):
            matrix = round_matrix(tensor, recipe)
        case _:  # One scale a row: what OpenVINO multiplies by most quickly.
            matrix = quantize_int8(tensor.float32(), block_size=tensor.shape[-1])
    return _integers(matrix)


def rounded(tensor: CheckpointTensor, recipe: Recipe, first_row: int = 0) -> FloatArray:
    """The weights that the graph multiplies by, of shape (rows, columns).

    Args:
        tensor: A matrix, or some of its rows.
        recipe: How it is stored.
        first_row: The row of the whole matrix that is its first.

    Raises:
        UnsupportedModelError: The precision cannot hold it.
    """
    if tensor.name in recipe.rounded:
        whole = recipe.rounded[tensor.name]
        return whole.take(first_row, first_row + tensor.shape[0]).dequantize()
    stored = encode(tensor, recipe)
    if isinstance(stored, IntegerMatrix):
        return stored.dequantize()
    return stored.astype(np.float32)


def _encode_exact(tensor: CheckpointTensor) -> FloatArray | IntegerMatrix:
    if tensor.encoding in _FLOAT_ENCODINGS:
        return tensor.float32()
    if tensor.encoding in EXACT_ENCODINGS:
        return _integers(repack(tensor.encoding, tensor.blocks()))
    raise UnsupportedModelError(
        f"precision='exact' was asked for, and tensor {tensor.name!r} is stored as "
        f"{tensor.encoding}; exact takes {', '.join(sorted(EXACT_ENCODINGS | _FLOAT_ENCODINGS))}. "
        "Use precision='fp32', which keeps any encoding's values, or 'int8'."
    )


def _integers(matrix: QuantizedMatrix) -> IntegerMatrix:
    scales, values = matrix.scales, matrix.values
    rows, blocks = scales.shape
    zeros: FloatArray | None = None
    middle = 8
    if matrix.bits == 8:
        values, middle = (values ^ np.uint8(0x80)).view(np.int8), 0
    if matrix.zero_points is not None:
        nibbles = np.stack(split_nibbles(matrix.zero_points), axis=-1).reshape(rows, -1)
        zeros = nibbles[:, :blocks].astype(np.float32)
    elif matrix.offsets is not None:
        # A block of one value has no scale that a zero point could be counted in.
        flat = np.abs(scales) < np.finfo(np.float32).tiny
        scales = np.where(flat, np.float32(1), scales)
        values = np.where(flat[..., None], values.dtype.type(0), values)
        zeros = np.where(flat, 0, middle) - matrix.offsets / scales
    elif middle:
        zeros = np.full_like(scales, middle)
    return IntegerMatrix(
        bits=matrix.bits,
        shape=(rows, blocks, matrix.block_size),
        values=values,
        scales=scales[..., None],
        zeros=None if zeros is None else zeros[..., None].astype(np.float32),
    )
