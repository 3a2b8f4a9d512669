"""How an ONNX graph stores a matrix in each precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from phirt.build.checkpoint import CheckpointTensor
from phirt.build.precision import EMBEDDING, Precision
from phirt.build.quantize import QuantizedMatrix, quantize_int8
from phirt.build.recipe import Recipe
from phirt.build.repack import EXACT_ENCODINGS, folding_error, repack
from phirt.build.rounding import round_matrix
from phirt.errors import UnsupportedModelError
from phirt.types import FloatArray

__all__ = ["StoredMatrix", "encode", "rounded"]

StoredMatrix: TypeAlias = FloatArray | QuantizedMatrix
"""A matrix as floats, or in blocks of integers."""

_FLOATS = frozenset({Precision.FP32, Precision.FP16})
_FLOAT_ENCODINGS = frozenset({"F32", "F16", "BF16"})

# By preference. At 32 the scales (and the block sums that ONNX Runtime adds to them) are a
# fifth of what a decode step reads of 8-bit weights; 64 halves that, for a KL of 0.003.
_INT8_BLOCK_SIZES = (64, 32)


def encode(tensor: CheckpointTensor, recipe: Recipe) -> StoredMatrix:
    """Read a matrix in the form that a recipe gives it.

    Args:
        tensor: The matrix, (out, in), or some of its rows: what becomes of a row does not
            depend on the others.
        recipe: The recipe. Matrices that were rounded already are taken whole.

    Raises:
        UnsupportedModelError: The precision cannot hold it.
    """
    precision = recipe.precision
    if precision in _FLOATS:
        return tensor.float32()
    if precision is Precision.EXACT:
        return _encode_exact(tensor)
    if tensor.name in recipe.rounded:
        return recipe.rounded[tensor.name]
    if precision is Precision.INT4:
        if recipe.keeps_own_blocks(tensor):
            own = repack(tensor.encoding, tensor.blocks())
            # Rows of the embedding are gathered, which knows no offsets.
            if own.offsets is None or tensor.name != EMBEDDING:
                return own
        if recipe.rounds_to_4_bits(tensor):
            return round_matrix(tensor, recipe)
    return quantize_int8(tensor.float32(), block_size=_block_size(tensor, _INT8_BLOCK_SIZES))


def rounded(tensor: CheckpointTensor, recipe: Recipe, first_row: int = 0) -> FloatArray:
    """The weights that the graph multiplies by, of shape (rows, columns).

    Args:
        tensor: A matrix, or some of its rows.
        recipe: How it is stored.
        first_row: The row of the whole matrix that is its first.

    Raises:
        UnsupportedModelError: The precision cannot hold it.
    """
    stored = encode(tensor, recipe)
    if not isinstance(stored, QuantizedMatrix):
        return stored.astype(recipe.float_type).astype(np.float32)
    if tensor.name in recipe.rounded:
        stored = stored.take(first_row, first_row + tensor.shape[0])
    stored = replace(stored, scales=stored.scales.astype(recipe.float_type).astype(np.float32))
    if stored.offsets is None:
        return stored.dequantize()
    error = folding_error(stored)
    values = tensor.float32()
    if error is None:
        return values
    blocks = values.reshape(*error.shape, stored.block_size)
    return (blocks + error[:, :, None]).reshape(values.shape)


def _encode_exact(tensor: CheckpointTensor) -> StoredMatrix:
    if tensor.encoding in _FLOAT_ENCODINGS:
        return tensor.float32()
    if tensor.encoding in EXACT_ENCODINGS:
        return repack(tensor.encoding, tensor.blocks())
    raise UnsupportedModelError(
        f"precision='exact' was asked for, and tensor {tensor.name!r} is stored as "
        f"{tensor.encoding}; exact takes {', '.join(sorted(EXACT_ENCODINGS | _FLOAT_ENCODINGS))}. "
        "Use precision='fp32', which keeps any encoding's values, or 'int8'."
    )


def _block_size(tensor: CheckpointTensor, preferred: Sequence[int]) -> int:
    columns = tensor.shape[-1]
    for size in preferred:
        if columns % size == 0:
            return size
    raise UnsupportedModelError(
        f"Tensor {tensor.name!r} has {columns:,} columns, which blocks of {preferred[-1]} do not "
        "divide, so that it cannot be quantized. Use precision='fp32'."
    )
