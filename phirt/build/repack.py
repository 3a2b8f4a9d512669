"""From GGML's quantized blocks to MatMulNBits', without rounding a weight.

GGML's layouts: ``block_q4_0`` and its neighbours in ggml's ``ggml-common.h``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from phirt.build.quantize import (
    QuantizedMatrix,
    pack_nibbles,
    quantize_symmetric_int4,
    reciprocal,
    split_nibbles,
)
from phirt.types import FloatArray

__all__ = [
    "EXACT_ENCODINGS",
    "FOUR_BIT_ENCODINGS",
    "GGML_BLOCK_SIZE",
    "fold_offsets",
    "folding_error",
    "repack",
    "split_bytes",
]

GGML_BLOCK_SIZE = 32
"""Columns that share a scale in Q4_0, Q4_1 and Q8_0."""


def _float16(blocks: NDArray[np.uint8], start: int) -> FloatArray:
    """The little-endian float16 at a byte of every block, shape (rows, blocks)."""
    return (
        np.ascontiguousarray(blocks[:, :, start : start + 2]).view("<f2")[..., 0].astype(np.float32)
    )


def _interleave_nibbles(blocks: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """From GGML's order of nibbles to MatMulNBits'.

    GGML's byte ``i`` of 16 holds elements ``i`` (low) and ``i + 16`` (high); MatMulNBits'
    byte ``i`` holds elements ``2 i`` and ``2 i + 1``.
    """
    return pack_nibbles(np.concatenate(split_nibbles(blocks), axis=-1))


def _repack_q4_0(blocks: NDArray[np.uint8]) -> QuantizedMatrix:
    """``w = d (q - 8)``: a float16 ``d`` and 16 bytes of nibbles."""
    return QuantizedMatrix(
        bits=4,
        block_size=GGML_BLOCK_SIZE,
        values=_interleave_nibbles(blocks[:, :, 2:]),
        scales=_float16(blocks, 0),
    )


def _repack_q4_1(blocks: NDArray[np.uint8]) -> QuantizedMatrix:
    """``w = d q + m = d (q - 8) + (m + 8 d)``: float16 ``d`` and ``m``, 16 bytes of nibbles.

    The sum is exact in float32: both terms are float16 values, 8 d with the same 11 bits,
    unless they lie more than 13 binary orders apart, where its rounding is below 2**-24.
    """
    scales = _float16(blocks, 0)
    return QuantizedMatrix(
        bits=4,
        block_size=GGML_BLOCK_SIZE,
        values=_interleave_nibbles(blocks[:, :, 4:]),
        scales=scales,
        offsets=_float16(blocks, 2) + 8 * scales,
    )


def _repack_q8_0(blocks: NDArray[np.uint8]) -> QuantizedMatrix:
    """``w = d q``: a float16 ``d`` and 32 signed bytes."""
    return QuantizedMatrix(
        bits=8,
        block_size=GGML_BLOCK_SIZE,
        values=blocks[:, :, 2:] ^ np.uint8(0x80),  # q + 128, as two's complement has it
        scales=_float16(blocks, 0),
    )


_REPACKERS: dict[str, tuple[int, Callable[[NDArray[np.uint8]], QuantizedMatrix]]] = {
    "Q4_0": (18, _repack_q4_0),
    "Q4_1": (20, _repack_q4_1),
    "Q8_0": (34, _repack_q8_0),
}

EXACT_ENCODINGS = frozenset(_REPACKERS)
"""GGML encodings that `repack` keeps to the last bit."""

FOUR_BIT_ENCODINGS = frozenset({"Q4_0", "Q4_1"})
"""Those of 4 bits."""


def repack(encoding: str, rows: NDArray[np.uint8]) -> QuantizedMatrix:
    """The same weights in MatMulNBits' layout, without rounding.

    Args:
        encoding: One of `EXACT_ENCODINGS`.
        rows: The encoded rows, shape (rows, bytes per row).
    """
    block_bytes, repacker = _REPACKERS[encoding]
    return repacker(rows.reshape(rows.shape[0], -1, block_bytes))


def split_bytes(matrix: QuantizedMatrix) -> QuantizedMatrix:
    """An 8-bit matrix as a 4-bit one of twice the columns: first high nibbles, then low.

    ``s (q - 128) = 16 s (high - 8) + s low``, so that ``x @ W.T`` becomes ``[x, x] @ W'.T``,
    exactly. ONNX Runtime multiplies 8-bit weights quickly only with activations rounded to
    8 bits; 4-bit weights it multiplies quickly with float activations too.
    """
    rows, blocks = matrix.scales.shape
    zero_points = np.zeros((rows, 2 * blocks), np.uint8)
    zero_points[:, :blocks] = 8
    low, high = split_nibbles(matrix.values)
    return QuantizedMatrix(
        bits=4,
        block_size=matrix.block_size,
        values=np.concatenate([pack_nibbles(high), pack_nibbles(low)], axis=1),
        scales=np.concatenate([16 * matrix.scales, matrix.scales], axis=1),
        zero_points=pack_nibbles(zero_points),
    )


def fold_offsets(matrix: QuantizedMatrix) -> QuantizedMatrix | None:
    """A 4-bit matrix with offsets as one without, on an input that its block sums follow.

    ``x @ W.T`` becomes ``[x, block_sums(x)] @ W'.T``. The nearest integer zero points take
    most of every offset; what is left of it, at most half a step, becomes a column of W'
    for its block, rounded to 4 bits: an error of about a thirtieth of a step.

    Args:
        matrix: Of 4 bits, with offsets and without zero points.

    Returns:
        The matrix, with as many columns more as ``matrix`` has blocks; or None where zero
        lies outside the range of a block, so that no zero point comes near its offset.
    """
    rows, blocks = matrix.scales.shape
    parts = _split_offsets(matrix)
    if parts is None:
        return None
    zero, left = parts
    folded = quantize_symmetric_int4(left.reshape(rows, -1, matrix.block_size))
    zero_points = np.full((rows, blocks + folded.scales.shape[1]), 8, np.uint8)
    zero_points[:, :blocks] = zero
    return QuantizedMatrix(
        bits=4,
        block_size=matrix.block_size,
        values=np.concatenate([matrix.values, folded.values], axis=1),
        scales=np.concatenate([matrix.scales, folded.scales], axis=1),
        zero_points=pack_nibbles(zero_points),
        padding=left.shape[1] - blocks,
    )


def folding_error(matrix: QuantizedMatrix) -> FloatArray | None:
    """What `fold_offsets` adds to every weight of a block, shape (rows, blocks).

    Args:
        matrix: As for `fold_offsets`.

    Returns:
        The error, or None where there is no folding.
    """
    rows, blocks = matrix.scales.shape
    parts = _split_offsets(matrix)
    if parts is None:
        return None
    left = parts[1]
    folded = quantize_symmetric_int4(left.reshape(rows, -1, matrix.block_size))
    return (folded.dequantize() - left)[:, :blocks]


def _split_offsets(matrix: QuantizedMatrix) -> tuple[FloatArray, FloatArray] | None:
    """Offsets as integer zero points and what these leave over, padded to whole blocks."""
    if matrix.offsets is None:
        raise ValueError("The matrix has no offsets to fold.")
    zero = np.rint(8 - matrix.offsets * reciprocal(matrix.scales))
    if zero.min() < 0 or zero.max() > 15:
        return None
    left = matrix.offsets + matrix.scales * (zero - 8)
    blocks = left.shape[1]
    columns = -(-blocks // matrix.block_size) * matrix.block_size
    return zero, np.pad(left, ((0, 0), (0, columns - blocks)))
