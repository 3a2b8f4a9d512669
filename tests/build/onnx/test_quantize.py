"""Block quantization: layouts by hand, exactness, the search against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import given
from hypothesis import strategies as st

from phirt.build.quantize import (
    EXACT_ENCODINGS,
    QuantizedMatrix,
    concatenate_rows,
    quantize_int4,
    quantize_int8,
    repack,
    split_bytes,
)


def encoded(encoding, rows=3, columns=96, seed=0, centre=0.0):
    values = np.random.default_rng(seed).standard_normal((rows, columns)) + centre
    kind = GGMLQuantizationType[encoding]
    blocks = quantize(values.astype(np.float32), kind)
    return blocks, dequantize(blocks, kind)


def squared_error(weights, matrix):
    return ((matrix.dequantize() - weights) ** 2).sum(axis=-1)


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

    def test_zero_points_of_an_odd_number_of_blocks_end_in_half_a_byte(self):
        weights = np.tile(np.linspace(-1, 2, 32, dtype=np.float32), (2, 3))
        matrix = quantize_int4(weights, block_size=32)
        # A range of -1 to 2 in 15 steps has its zero at 5.
        assert matrix.zero_points is not None
        assert matrix.zero_points.tolist() == [[0x55, 0x05]] * 2

    def test_shape_follows_from_the_scales(self):
        matrix = quantize_int8(np.ones((5, 128), np.float32), block_size=64)
        assert (matrix.rows, matrix.columns) == (5, 128)
        assert matrix.values.shape == (5, 2, 64)


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


class TestInt8:
    @given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([32, 64]))
    def test_no_weight_is_off_by_more_than_half_a_step(self, seed, size):
        random = np.random.default_rng(seed)
        scale = 10.0 ** random.uniform(-20, 20, (4, 1))
        weights = (random.standard_normal((4, 128)) * scale).astype(np.float32)
        matrix = quantize_int8(weights, block_size=size)
        steps = np.repeat(matrix.scales, size, axis=-1)
        assert (np.abs(matrix.dequantize() - weights) <= 0.5001 * steps).all()

    def test_the_extremes_of_a_block_are_kept(self):
        weights = np.zeros((1, 32), np.float32)
        weights[0, :2] = [-3.0, 1.5]
        assert quantize_int8(weights, block_size=32).dequantize()[0, 0] == pytest.approx(-3.0)


class TestInt4:
    def brute_force(self, block):
        """The least squared error over all zero points and a fine grid of scales."""
        spread = block.max() - block.min()
        scales = np.linspace(0.4, 1.3, 400)[:, None, None] * spread / 15
        zeros = np.arange(16)[None, :, None]
        q = np.clip(np.rint(block / scales) + zeros, 0, 15)
        return (((q - zeros) * scales - block) ** 2).sum(axis=-1).min()

    @pytest.mark.parametrize("distribution", ["normal", "laplace", "uniform"])
    def test_close_to_brute_force(self, distribution):
        weights = getattr(np.random.default_rng(1), distribution)(size=(64, 32)).astype(np.float32)
        found = squared_error(weights, quantize_int4(weights, block_size=32)).sum()
        best = sum(self.brute_force(block) for block in weights)
        assert best * 0.999 <= found <= best * 1.15

    def test_better_than_the_plain_range(self):
        weights = np.random.default_rng(2).standard_normal((64, 32)).astype(np.float32)
        low, high = weights.min(axis=1, keepdims=True), weights.max(axis=1, keepdims=True)
        step = (high - low) / 15
        plain = (((np.rint((weights - low) / step) * step + low) - weights) ** 2).sum()
        # Even though its zero point is an integer, which the plain range's minimum is not.
        assert squared_error(weights, quantize_int4(weights, block_size=32)).sum() < plain

    @pytest.mark.parametrize("sign", [-1, 1])
    def test_weights_of_one_sign_keep_their_sign(self, sign):
        weights = sign * np.linspace(1, 2, 32, dtype=np.float32)[None]
        found = quantize_int4(weights, block_size=32).dequantize()
        assert (np.sign(found) == sign).all()


@pytest.mark.parametrize("quantizer", [quantize_int4, quantize_int8])
class TestBoth:
    @pytest.mark.parametrize("value", [0.0, 1e-42, 1e12])
    def test_constant_blocks_stay_finite(self, quantizer, value):
        matrix = quantizer(np.full((2, 64), value, np.float32), block_size=32)
        assert np.isfinite(matrix.scales).all()
        np.testing.assert_allclose(matrix.dequantize(), value, rtol=1e-6, atol=1e-37)

    def test_chunks_of_rows_do_not_matter(self, quantizer, monkeypatch):
        weights = np.random.default_rng(3).standard_normal((7, 64)).astype(np.float32)
        whole: QuantizedMatrix = quantizer(weights, block_size=32)
        monkeypatch.setattr("phirt.build.quantize._CHUNK_ELEMENTS", 2 * 64)
        np.testing.assert_array_equal(
            quantizer(weights, block_size=32).dequantize(), whole.dequantize()
        )
