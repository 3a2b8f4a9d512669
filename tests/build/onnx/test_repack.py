"""Repacking GGML's blocks: bytes by hand, and the weights that they stand for, unrounded."""

from __future__ import annotations

import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize

from phirt.build.quantize import concatenate_rows, quantize_int8
from phirt.build.repack import (
    EXACT_ENCODINGS,
    fold_offsets,
    folding_error,
    repack,
    split_bytes,
)

# Where the float16 numbers lie in the blocks that gguf reads but does not write.
K_QUANTS = {"Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}
WITH_MINIMUM = {"Q4_1", "Q5_1", "Q4_K", "Q5_K"}


def encoded(encoding, rows=3, columns=96, seed=0, centre=0.0):
    random, kind = np.random.default_rng(seed), GGMLQuantizationType[encoding]
    if encoding in K_QUANTS:
        blocks = random_super_blocks(encoding, random, rows=rows, columns=768)
    else:
        values = random.standard_normal((rows, columns)) + centre
        blocks = quantize(values.astype(np.float32), kind)
    return blocks, dequantize(blocks, kind)


def random_super_blocks(encoding, random, *, rows, columns):
    length, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[encoding]]
    blocks = random.integers(0, 256, (rows, columns // length, nbytes), dtype=np.uint8)
    for start in K_QUANTS[encoding]:
        numbers = random.standard_normal(blocks.shape[:2]).astype("<f2")
        blocks[:, :, start : start + 2] = numbers[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


def halves(*numbers):
    return np.array(numbers, "<f2").view(np.uint8)


class TestLayout:
    def test_q4_0_bytes_by_hand(self):
        # One block: d = 0.5; GGML keeps element i in the low and i + 16 in the high nibble.
        q = np.arange(32) % 16
        ggml = np.concatenate([np.array([0.5], "<f2").view(np.uint8), q[:16] | (q[16:] << 4)])
        matrix = repack("Q4_0", ggml.astype(np.uint8)[None])
        # MatMulNBits keeps neighbours in one byte, the first in the low nibble.
        assert matrix.values.tolist() == [[[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2]]
        assert matrix.scales.tolist() == [[0.5]]
        assert matrix.zero_points is None
        assert matrix.dequantize().tolist() == [((q - 8) * 0.5).tolist()]

    def test_q4_1_offset_by_hand(self):
        ggml = np.concatenate(
            [np.array([0.5, -3.25], "<f2").view(np.uint8), np.zeros(16, np.uint8)]
        )
        matrix = repack("Q4_1", ggml[None])
        assert matrix.offsets is not None
        assert matrix.offsets.tolist() == [[-3.25 + 8 * 0.5]]
        assert matrix.dequantize().tolist() == [[-3.25] * 32]

    def test_q8_0_bytes_by_hand(self):
        q = np.arange(-16, 16, dtype=np.int8)
        ggml = np.concatenate([np.array([2.0], "<f2").view(np.uint8), q.view(np.uint8)])
        matrix = repack("Q8_0", ggml[None])
        assert matrix.values.tolist() == [[list(range(112, 144))]]
        assert matrix.dequantize().tolist() == [(2.0 * q).tolist()]

    def test_q5_0_high_bits_by_hand(self):
        q = np.arange(32)  # Bit i of the 32 is the fifth of element i: those from 16 on.
        high = np.array([0x00, 0x00, 0xFF, 0xFF], np.uint8)
        low = ((q[:16] & 15) | ((q[16:] & 15) << 4)).astype(np.uint8)
        matrix = repack("Q5_0", np.concatenate([halves(0.5), high, low])[None])
        assert (matrix.bits, matrix.block_size, matrix.offsets) == (8, 32, None)
        assert matrix.values.tolist() == [[(q + 112).tolist()]]
        assert matrix.dequantize().tolist() == [((q - 16) * 0.5).tolist()]

    def test_q5_1_offset_by_hand(self):
        matrix = repack("Q5_1", np.concatenate([halves(0.5, -3.25), np.zeros(20, np.uint8)])[None])
        assert matrix.offsets is not None
        assert matrix.offsets.tolist() == [[-3.25 + 16 * 0.5]]
        assert matrix.dequantize().tolist() == [[-3.25] * 32]

    def test_q4_k_scales_and_minima_by_hand(self):
        # Blocks 0 to 3 have sc 1, 2, 3, 63 and m 4, 5, 6, 7; blocks 4 to 7, whose low nibbles lie
        # in the last four bytes and high bits above the others', sc 16 + 1 and m 32 + 2.
        sc = np.array([1, 2, 3, 63]) | (0b01 << 6)
        m = np.array([4, 5, 6, 7]) | (0b10 << 6)
        packed = np.concatenate([sc, m, np.full(4, 1 | 2 << 4)]).astype(np.uint8)
        # In every 32 bytes the low nibbles are one block, the high ones the next.
        nibbles = np.full(128, 0x0F, np.uint8)
        matrix = repack("Q4_K", np.concatenate([halves(0.5, 0.25), packed, nibbles])[None])
        scales = np.array([1, 2, 3, 63, 17, 17, 17, 17])
        minima = np.array([4, 5, 6, 7, 34, 34, 34, 34])
        assert matrix.scales.tolist() == [(0.5 * scales).tolist()]
        assert matrix.offsets is not None
        assert matrix.offsets.tolist() == [(8 * 0.5 * scales - 0.25 * minima).tolist()]
        q = np.array([15, 0] * 4)
        weights = 0.5 * scales * q - 0.25 * minima
        assert matrix.dequantize()[0, ::32].tolist() == weights.tolist()

    def test_q5_k_high_bits_by_hand(self):
        packed = np.array([1] * 4 + [0] * 4 + [1] * 4, np.uint8)  # sc of 1, m of 0
        high = np.array([1 << (i % 8) for i in range(32)], np.uint8)  # element i: in block i % 8
        parts = [halves(0.5, 0.25), packed, high, np.zeros(128, np.uint8)]
        matrix = repack("Q5_K", np.concatenate(parts)[None])
        expected = np.zeros((8, 32))
        expected[np.arange(32) % 8, np.arange(32)] = 16 * 0.5
        assert (matrix.bits, matrix.block_size) == (8, 32)
        np.testing.assert_array_equal(matrix.dequantize().reshape(8, 32), expected)

    def test_q6_k_signed_scales_by_hand(self):
        scales = np.arange(-8, 8, dtype=np.int8)
        parts = [np.zeros(192, np.uint8), scales.view(np.uint8), halves(0.5)]
        matrix = repack("Q6_K", np.concatenate(parts)[None])
        assert (matrix.bits, matrix.block_size, matrix.offsets) == (8, 16, None)
        assert matrix.scales.tolist() == [(0.5 * scales).tolist()]
        assert matrix.dequantize()[0, ::16].tolist() == (0.5 * scales * -32.0).tolist()


class TestExact:
    @pytest.mark.parametrize("encoding", sorted(EXACT_ENCODINGS))
    @pytest.mark.parametrize("centre", [0.0, 2.0, -2.0])
    def test_repacked_weights_are_the_files_own(self, encoding, centre):
        blocks, weights = encoded(encoding, centre=centre)
        found = repack(encoding, blocks).dequantize()
        # With a minimum, d q + m is summed in another order; else equal to the last bit.
        tolerance = 2**-22 * np.abs(weights).max() if encoding in WITH_MINIMUM else 0
        np.testing.assert_allclose(found, weights, rtol=0, atol=tolerance)

    def test_split_bytes_multiply_the_doubled_input_to_the_same(self):
        for encoding in ("Q8_0", "Q5_0", "Q6_K"):
            blocks, weights = encoded(encoding, rows=4)
            split = split_bytes(repack(encoding, blocks)).dequantize()
            high, low = np.split(split, 2, axis=1)
            np.testing.assert_array_equal(high + low, weights)

    def test_scales_are_float32_whatever_they_multiply(self):
        for encoding in EXACT_ENCODINGS:
            matrix = repack(encoding, encoded(encoding)[0])
            assert matrix.scales.dtype == np.float32
            assert matrix.offsets is None or matrix.offsets.dtype == np.float32

    def test_the_largest_numbers_of_a_file_stay_finite(self):
        for encoding, starts in K_QUANTS.items():
            blocks = np.full((1, GGML_QUANT_SIZES[GGMLQuantizationType[encoding]][1]), 0xFF)
            for start in starts:
                blocks[:, start : start + 2] = halves(65504)
            assert np.isfinite(repack(encoding, blocks.astype(np.uint8)).dequantize()).all()

    def test_fused_rows_are_the_rows(self):
        parts = [encoded("Q4_1", rows=rows, seed=rows)[0] for rows in (2, 3)]
        matrices = [repack("Q4_1", part) for part in parts]
        fused = concatenate_rows(matrices)
        expected = np.concatenate([matrix.dequantize() for matrix in matrices])
        np.testing.assert_array_equal(fused.dequantize(), expected)


class TestFoldOffsets:
    def folded_product(self, x, matrix):
        """``[x, block_sums(x)] @ W'.T``, as the graph computes it."""
        sums = x.reshape(len(x), -1, 32).sum(axis=-1)
        return np.concatenate([x, sums], axis=-1) @ matrix.dequantize().T

    def test_one_column_a_block(self):
        matrix = fold_offsets(repack("Q4_1", encoded("Q4_1", columns=96)[0]))
        assert matrix is not None
        assert matrix.columns == 96 + 3
        assert matrix.values.shape == (3, 4, 16)
        assert matrix.offsets is None

    @pytest.mark.parametrize("columns", [32, 96, 1024, 1536])  # 1536: 48 blocks, two of columns
    def test_weights_move_by_a_fraction_of_a_step(self, columns):
        blocks, weights = encoded("Q4_1", rows=5, columns=columns)
        exact = repack("Q4_1", blocks)
        folded = fold_offsets(exact)
        assert folded is not None
        found = self.folded_product(np.eye(columns, dtype=np.float32), folded).T
        largest_step = exact.scales.max(axis=-1, keepdims=True)
        assert (np.abs(found - weights) <= largest_step / 30).all()

    def test_without_the_columns_the_error_would_be_half_a_step(self):
        blocks, weights = encoded("Q4_1", rows=5, columns=96)
        exact = repack("Q4_1", blocks)
        folded = fold_offsets(exact)
        assert folded is not None
        plain = folded.dequantize()[:, :96]
        assert np.abs(plain - weights).max() > 0.4 * exact.scales.min()

    def test_a_k_quant_of_4_bits_folds_too(self):
        # Minima of up to 15 steps: what llama.cpp writes, since 0 is among a block's weights.
        blocks, _ = encoded("Q4_K")
        blocks = blocks.reshape(3, 3, 144)
        blocks[:, :, :4] = np.tile(halves(0.5, 0.25), (3, 3, 1))
        blocks[:, :, 4:16] = [9, 9, 9, 9, 7, 7, 7, 7, 0x79, 0x79, 0x79, 0x79]
        folded = fold_offsets(exact := repack("Q4_K", blocks.reshape(3, -1)))
        assert folded is not None
        found = self.folded_product(np.eye(768, dtype=np.float32), folded).T
        assert (np.abs(found - exact.dequantize()) <= 9 * 0.5 / 30).all()

    @pytest.mark.parametrize("encoding", ["Q5_1", "Q5_K"])
    def test_refused_in_8_bits(self, encoding):
        matrix = repack(encoding, encoded(encoding)[0])
        assert fold_offsets(matrix) is None
        assert folding_error(matrix) is None

    def test_refused_where_no_zero_point_is_near(self):
        blocks, _ = encoded("Q4_1", centre=20.0)
        assert fold_offsets(repack("Q4_1", blocks)) is None

    def test_a_matrix_without_offsets(self):
        with pytest.raises(ValueError, match="no offsets"):
            fold_offsets(quantize_int8(np.ones((1, 32), np.float32), block_size=32))
