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
    "BELOW_8_BITS",
    "EXACT_ENCODINGS",
    "FOUR_BIT_ENCODINGS",
    "GGML_BLOCK_SIZE",
    "SYMMETRIC_ENCODINGS",
    "fold_offsets",
    "folding_error",
    "repack",
    "split_bytes",
]

GGML_BLOCK_SIZE = 32
"""Columns that share a scale in every encoding but Q6_K, whose blocks are half as long."""

_Q6_K_BLOCK_SIZE = 16


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


def _repack_q5_0(blocks: NDArray[np.uint8]) -> QuantizedMatrix:
    """``w = d (q - 16)``: a float16 ``d``, 32 high bits, 16 bytes of nibbles."""
    return _in_bytes(_fifth_bits(blocks[:, :, 2:6], blocks[:, :, 6:]), 16, _float16(blocks, 0))


def _repack_q5_1(blocks: NDArray[np.uint8]) -> QuantizedMatrix:
    """``w = d q + m = d (q - 16) + (m + 16 d)``: as Q5_0, after float16 ``d`` and ``m``."""
    scales = _float16(blocks, 0)
    q = _fifth_bits(blocks[:, :, 4:8], blocks[:, :, 8:])
    return _in_bytes(q, 16, scales, offsets=_float16(blocks, 2) + 16 * scales)


def _fifth_bits(high: NDArray[np.uint8], low: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Integers of 5 bits: one bit each in ``high``, in order, and nibbles as Q4_0's."""
    nibbles = np.concatenate(split_nibbles(low), axis=-1)
    bits = np.unpackbits(np.ascontiguousarray(high), axis=-1, bitorder="little")
    return np.asarray(nibbles | bits << np.uint8(4), np.uint8)


def _in_bytes(
    q: NDArray[np.uint8], zero: int, scales: FloatArray, *, offsets: FloatArray | None = None
) -> QuantizedMatrix:
    """``scales (q - zero) + offsets`` for integers of fewer than 8 bits, one a byte.

    The zero point in the middle keeps the integers, and what 8-bit activations lose on them,
    small.
    """
    return QuantizedMatrix(
        bits=8,
        block_size=q.shape[-1],
        values=q + np.uint8(128 - zero),
        scales=scales,
        offsets=offsets,
    )


def _repack_q4_k(blocks: NDArray[np.uint8]) -> QuantizedMatrix:
    """``w = d sc q - dmin m = d sc (q - 8) + (8 d sc - dmin m)``, eight blocks of 32 in one.

    Float16 ``d`` and ``dmin``, 12 bytes of ``sc`` and ``m``, 128 of nibbles. The products of
    a float16 and 6 bits are exact in float32; the sum is where Q4_1's is.
    """
    scales, minima = _scales_and_minima(blocks)
    return QuantizedMatrix(
        bits=4,
        block_size=GGML_BLOCK_SIZE,
        values=pack_nibbles(_super_nibbles(blocks[:, :, 16:], GGML_BLOCK_SIZE)),
        scales=scales,
        offsets=8 * scales - minima,
    )


def _repack_q5_k(blocks: NDArray[np.uint8]) -> QuantizedMatrix:
    """As Q4_K, with 32 bytes of high bits before the nibbles.

    Bit ``k`` of byte ``i`` of them belongs to element ``i`` of block ``k``.
    """
    scales, minima = _scales_and_minima(blocks)
    high = blocks[:, :, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & np.uint8(1)
    low = _super_nibbles(blocks[:, :, 48:], GGML_BLOCK_SIZE)
    q = low | high.reshape(low.shape) << np.uint8(4)
    return _in_bytes(q, 16, scales, offsets=16 * scales - minima)


def _repack_q6_k(blocks: NDArray[np.uint8]) -> QuantizedMatrix:
    """``w = d sc (q - 32)``, sixteen blocks of 16 in one: exact to the last bit.

    128 bytes of nibbles, 64 of two high bits for four elements each, sixteen signed ``sc``,
    and a float16 ``d``.
    """
    rows = len(blocks)
    low = _super_nibbles(blocks[:, :, :128], 64).reshape(rows, -1, 2, 4, 32)
    pairs = blocks[:, :, 128:192].reshape(rows, -1, 2, 1, 32)
    high = pairs >> np.array([0, 2, 4, 6], np.uint8)[:, None] & np.uint8(3)
    q = (low | high << np.uint8(4)).reshape(rows, -1, _Q6_K_BLOCK_SIZE)
    sc = np.ascontiguousarray(blocks[:, :, 192:208]).view(np.int8)
    scales = _float16(blocks, 208)[..., None] * sc
    return _in_bytes(q, 32, scales.astype(np.float32).reshape(rows, -1))


def _scales_and_minima(blocks: NDArray[np.uint8]) -> tuple[FloatArray, FloatArray]:
    """``d sc`` and ``dmin m`` of Q4_K and Q5_K, each (rows, blocks of 32).

    Of the 12 bytes, four hold ``sc`` of the first half in their low six bits, four ``m``, and
    four the low nibbles of both for the second half, whose high bits are those left over.
    """
    sc, m, nibbles = (blocks[:, :, start : start + 4] for start in (4, 8, 12))
    six, high = np.uint8(0x3F), np.uint8(0x30)
    low, lower = split_nibbles(nibbles)
    scales = np.concatenate([sc & six, low | sc >> np.uint8(2) & high], axis=-1)
    minima = np.concatenate([m & six, lower | m >> np.uint8(2) & high], axis=-1)
    rows = len(blocks)
    return (
        (_float16(blocks, 0)[..., None] * scales).reshape(rows, -1),
        (_float16(blocks, 2)[..., None] * minima).reshape(rows, -1),
    )


def _super_nibbles(packed: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """A K-quant's nibbles: of every ``width`` bytes, the low ones come first.

    Returns:
        Shape (rows, blocks, width), counting blocks of ``width``.
    """
    rows = len(packed)
    halves = split_nibbles(packed.reshape(rows, -1, width))
    return np.stack(halves, axis=2).reshape(rows, -1, width)


_REPACKERS: dict[str, tuple[int, Callable[[NDArray[np.uint8]], QuantizedMatrix]]] = {
    "Q4_0": (18, _repack_q4_0),
    "Q4_1": (20, _repack_q4_1),
    "Q5_0": (22, _repack_q5_0),
    "Q5_1": (24, _repack_q5_1),
    "Q8_0": (34, _repack_q8_0),
    "Q4_K": (144, _repack_q4_k),
    "Q5_K": (176, _repack_q5_k),
    "Q6_K": (210, _repack_q6_k),
}

EXACT_ENCODINGS = frozenset(_REPACKERS)
"""GGML encodings that `repack` keeps: to float32's rounding where they have a minimum (Q4_1,
Q5_1, Q4_K, Q5_K), and to the last bit where they have none."""

BELOW_8_BITS = EXACT_ENCODINGS - {"Q8_0"}
"""Those of 4 bits, and those of 5 and 6: rounded to 8 they would lose and be no smaller."""

FOUR_BIT_ENCODINGS = frozenset({"Q4_0", "Q4_1", "Q4_K"})
"""Those of 4 bits."""

SYMMETRIC_ENCODINGS = frozenset({"Q4_0", "Q5_0", "Q6_K", "Q8_0"})
"""Those whose blocks have a scale and nothing else."""


def repack(encoding: str, rows: NDArray[np.uint8]) -> QuantizedMatrix:
    """The same weights in MatMulNBits' layout, without rounding.

    Args:
        encoding: One of `EXACT_ENCODINGS`.
        rows: The encoded rows, shape (rows, bytes per row).
    """
    block_bytes, repacker = _REPACKERS[encoding]
    return repacker(rows.reshape(rows.shape[0], -1, block_bytes))


def split_bytes(matrix: QuantizedMatrix) -> QuantizedMatrix:
    """An 8-bit matrix without offsets as a 4-bit one of twice the columns: high nibbles, low.

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
        matrix: With offsets and without zero points.

    Returns:
        The matrix, with as many columns more as ``matrix`` has blocks; or None where it has
        8 bits, or zero lies outside the range of a block, so that no zero point comes near
        its offset.
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
    if matrix.bits != 4:
        return None
    zero = np.rint(8 - matrix.offsets * reciprocal(matrix.scales))
    if zero.min() < 0 or zero.max() > 15:
        return None
    left = matrix.offsets + matrix.scales * (zero - 8)
    blocks = left.shape[1]
    columns = -(-blocks // matrix.block_size) * matrix.block_size
    return zero, np.pad(left, ((0, 0), (0, columns - blocks)))
