"""Block quantization as MatMulNBits stores it: packing, exact repacking, rounding.

A matrix of shape (rows, columns) is cut along its columns into blocks. Block ``k`` of row
``n`` keeps unsigned integers ``q``, one float scale ``s`` and a zero point ``z``::

    w = s * (q - z)  [+ offset]

``z`` is ``2 ** (bits - 1)`` where none is stored. MatMulNBits has no offset; a matrix that
needs one (Q4_1, whose block minimum is any float) is multiplied as
``x @ (s * (q - z)).T + block_sums(x) @ offsets.T``, which is exact.

GGML's block layouts: ``block_q4_0`` and its neighbours in ggml's ``ggml-common.h``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from phirt.types import FloatArray

__all__ = [
    "EXACT_ENCODINGS",
    "GGML_BLOCK_SIZE",
    "QuantizedMatrix",
    "concatenate_rows",
    "quantize_int4",
    "quantize_int8",
    "repack",
    "split_bytes",
]

GGML_BLOCK_SIZE = 32
"""Columns that share a scale in Q4_0, Q4_1 and Q8_0."""

Bits = Literal[4, 8]
Scalar = TypeVar("Scalar", bound=np.generic)

_NIBBLE = np.uint8(4)
_LOW_NIBBLE = np.uint8(0x0F)
_SMALLEST_NORMAL = np.finfo(np.float32).tiny
_CHUNK_ELEMENTS = 1 << 20  # Bounds the temporaries of a search to a few dozen megabytes.


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedMatrix:
    """A block-quantized matrix, packed.

    Attributes:
        bits: Width of a quantized value.
        block_size: Columns that share a scale.
        values: Packed values, low bits first, shape (rows, blocks, block_size * bits / 8).
        scales: Shape (rows, blocks).
        zero_points: Packed like ``values``, shape (rows, ceil(blocks * bits / 8)), or None
            for ``2 ** (bits - 1)`` everywhere.
        offsets: What is added to every weight of a block, shape (rows, blocks), or None.
    """

    bits: Bits
    block_size: int
    values: NDArray[np.uint8]
    scales: FloatArray
    zero_points: NDArray[np.uint8] | None = None
    offsets: FloatArray | None = None

    @property
    def rows(self) -> int:
        """Rows of the matrix: output features."""
        return len(self.scales)

    @property
    def columns(self) -> int:
        """Columns of the matrix: input features."""
        blocks: int = self.scales.shape[1]
        return blocks * self.block_size

    def dequantize(self) -> FloatArray:
        """The weights that the integers stand for, shape (rows, columns)."""
        rows, blocks = self.scales.shape
        q = _unpack(self.values, self.bits)
        if self.zero_points is None:
            zero = np.full((rows, blocks), 1 << (self.bits - 1), np.uint8)
        else:
            zero = _unpack(self.zero_points, self.bits)[:, :blocks]
        weights = (q.astype(np.float32) - zero[:, :, None]) * self.scales[:, :, None]
        if self.offsets is not None:
            weights += self.offsets[:, :, None]
        return weights.reshape(rows, self.columns)


def concatenate_rows(matrices: Sequence[QuantizedMatrix]) -> QuantizedMatrix:
    """One matrix of all rows: projections of one input, fused. Exact.

    Args:
        matrices: At least one; alike in bits, block size, columns and what is None.
    """
    first = matrices[0]
    if len(matrices) == 1:
        return first
    return replace(
        first,
        values=np.concatenate([matrix.values for matrix in matrices]),
        scales=np.concatenate([matrix.scales for matrix in matrices]),
        zero_points=_concatenate_optional([matrix.zero_points for matrix in matrices]),
        offsets=_concatenate_optional([matrix.offsets for matrix in matrices]),
    )


def _concatenate_optional(parts: Sequence[NDArray[Scalar] | None]) -> NDArray[Scalar] | None:
    present = [part for part in parts if part is not None]
    return np.concatenate(present) if present else None


# --- Exact: the file's own integers ---------------------------------------------------


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
    elements = np.concatenate([blocks & _LOW_NIBBLE, blocks >> _NIBBLE], axis=-1)
    return _pack(elements)


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
    high, low = matrix.values >> _NIBBLE, matrix.values & _LOW_NIBBLE
    return QuantizedMatrix(
        bits=4,
        block_size=matrix.block_size,
        values=np.concatenate([_pack(high), _pack(low)], axis=1),
        scales=np.concatenate([16 * matrix.scales, matrix.scales], axis=1),
        zero_points=_pack(zero_points),
    )


# --- Rounding: any weights --------------------------------------------------------------


def quantize_int8(weights: FloatArray, *, block_size: int) -> QuantizedMatrix:
    """Round to the nearest of 255 levels, symmetric about zero, per block.

    Args:
        weights: Shape (rows, columns), columns a multiple of ``block_size``.
        block_size: Columns that share a scale.
    """
    return _in_row_chunks(weights, block_size, _quantize_int8)


def quantize_int4(weights: FloatArray, *, block_size: int) -> QuantizedMatrix:
    """Round to 16 levels, with the scale of least squared error that a search finds, per block.

    The zero point is that of the block's range. Candidates step by a fraction of the range;
    the scale that fits a candidate's integers best follows by least squares.

    Args:
        weights: Shape (rows, columns), columns a multiple of ``block_size``.
        block_size: Columns that share a scale and a zero point.
    """
    return _in_row_chunks(weights, block_size, _quantize_int4)


def _in_row_chunks(
    weights: FloatArray, block_size: int, quantize: Callable[[FloatArray], QuantizedMatrix]
) -> QuantizedMatrix:
    rows, columns = weights.shape
    blocks = weights.reshape(rows, columns // block_size, block_size)
    step = max(1, _CHUNK_ELEMENTS // columns)
    return concatenate_rows([quantize(blocks[i : i + step]) for i in range(0, rows, step)])


def _quantize_int8(blocks: FloatArray) -> QuantizedMatrix:
    scales = np.abs(blocks).max(axis=-1) / np.float32(127)
    q = np.rint(blocks * _reciprocal(scales)[:, :, None]).astype(np.int8)
    return QuantizedMatrix(
        bits=8,
        block_size=blocks.shape[-1],
        values=q.view(np.uint8) ^ np.uint8(0x80),
        scales=scales,
    )


# Fractions of a block's range that the search spends its 16 levels on. Below 1 it clips an
# outlier, which is often cheaper than coarse steps for the other 31 values; above 1 it moves
# the grid. On SmolLM2's layers the squared error is 1 % above that of 123 candidates, among
# them other zero points, and a quarter below that of no search.
_RANGE_FRACTIONS = np.linspace(0.7, 1.2, 11, dtype=np.float32)


def _quantize_int4(blocks: FloatArray) -> QuantizedMatrix:
    low = np.minimum(blocks.min(axis=-1), 0)  # Zero lies in the range: a zero point needs it.
    high = np.maximum(blocks.max(axis=-1), 0)
    step = (high - low) / 15
    zero = np.rint(-low * _reciprocal(step))
    best_gain = np.full(low.shape, -1, np.float32)
    best_scale = np.zeros_like(low)
    for fraction in _RANGE_FRACTIONS:
        steps = _round_int4(blocks, _reciprocal(step * fraction), zero)
        # Least squares: with the best scale p / e for these integers, the squared error is
        # |blocks|^2 - p^2 / e, where p = steps . blocks and e = steps . steps.
        product = np.einsum("rbi,rbi->rb", steps, blocks)
        scale = product * _reciprocal(np.einsum("rbi,rbi->rb", steps, steps))
        gain = product * scale
        better = gain > best_gain
        best_gain = np.where(better, gain, best_gain)
        best_scale = np.where(better, scale, best_scale)
    steps = _round_int4(blocks, _reciprocal(best_scale), zero)
    return QuantizedMatrix(
        bits=4,
        block_size=blocks.shape[-1],
        values=_pack((steps + zero[:, :, None]).astype(np.uint8)),
        scales=best_scale,
        zero_points=_pack(zero.astype(np.uint8)),
    )


def _round_int4(blocks: FloatArray, reciprocal: FloatArray, zero: FloatArray) -> FloatArray:
    """The nearest ``q - zero`` with ``q`` in 0..15, as floats."""
    zero = zero[:, :, None]
    rounded: FloatArray = np.rint(blocks * reciprocal[:, :, None])
    return np.clip(rounded, -zero, 15 - zero, out=rounded)


def _reciprocal(values: FloatArray) -> FloatArray:
    """``1 / values``, and 0 where that would overflow: a block of zeros gives zeros."""
    reciprocals: FloatArray = np.zeros_like(values)
    np.divide(1, values, out=reciprocals, where=np.abs(values) >= _SMALLEST_NORMAL)
    return reciprocals


# --- Bits ---------------------------------------------------------------------------------


def _pack(nibbles: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pack values below 16 along the last axis, low nibble first, padded with zero."""
    if nibbles.shape[-1] % 2:
        padding = np.zeros((*nibbles.shape[:-1], 1), np.uint8)
        nibbles = np.concatenate([nibbles, padding], axis=-1)
    packed: NDArray[np.uint8] = nibbles[..., 0::2] | (nibbles[..., 1::2] << _NIBBLE)
    return packed


def _unpack(packed: NDArray[np.uint8], bits: Bits) -> NDArray[np.uint8]:
    """The values of a packed array, along its last axis."""
    if bits == 8:
        return packed
    return np.stack([packed & _LOW_NIBBLE, packed >> _NIBBLE], axis=-1).reshape(
        *packed.shape[:-1], -1
    )
