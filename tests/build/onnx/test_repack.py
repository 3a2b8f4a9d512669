"""Repacking GGML's blocks: bytes by hand, and the weights that they stand for, unrounded."""

from __future__ import annotations

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from phirt.build.quantize import concatenate_rows, quantize_int8
from phirt.build.repack import EXACT_ENCODINGS, fold_offsets, repack, split_bytes


def encoded(encoding, rows=3, columns=96, seed=0, centre=0.0):
    values = np.random.default_rng(seed).standard_normal((rows, columns)) + centre
    kind = GGMLQuantizationType[encoding]
    blocks = quantize(values.astype(np.float32), kind)
    return blocks, dequantize(blocks, kind)


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


class TestExact:
    @pytest.mark.parametrize("encoding", sorted(EXACT_ENCODINGS))
    @pytest.mark.parametrize("centre", [0.0, 2.0, -2.0])
    def test_repacked_weights_are_the_files_own(self, encoding, centre):
        blocks, weights = encoded(encoding, centre=centre)
        found = repack(encoding, blocks).dequantize()
        # Q4_1's d q + m is summed in another order; the others are equal to the last bit.
        tolerance = 2**-22 * np.abs(weights).max() if encoding == "Q4_1" else 0
        np.testing.assert_allclose(found, weights, rtol=0, atol=tolerance)

    def test_split_bytes_multiply_the_doubled_input_to_the_same(self):
        blocks, weights = encoded("Q8_0", rows=4, columns=64)
        split = split_bytes(repack("Q8_0", blocks)).dequantize()
        assert split.shape == (4, 128)
        np.testing.assert_array_equal(split[:, :64] + split[:, 64:], weights)

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

    def test_refused_where_no_zero_point_is_near(self):
        blocks, _ = encoded("Q4_1", centre=20.0)
        assert fold_offsets(repack("Q4_1", blocks)) is None

    def test_a_matrix_without_offsets(self):
        with pytest.raises(ValueError, match="no offsets"):
            fold_offsets(quantize_int8(np.ones((1, 32), np.float32), block_size=32))
