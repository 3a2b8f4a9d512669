"""Rounding to blocks: layouts by hand, bounds, and the search against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phirt.build.quantize import (
    QuantizedMatrix,
    concatenate_rows,
    quantize_int4,
    quantize_int8,
    quantize_symmetric_int4,
)


def squared_error(weights, matrix):
    return ((matrix.dequantize() - weights) ** 2).sum(axis=-1)


class TestLayout:
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

    @pytest.mark.parametrize("quantizer", [quantize_int4, quantize_int8])
    def test_fused_rows_are_the_rows(self, quantizer):
        random = np.random.default_rng(0)
        parts = [random.standard_normal((rows, 96)).astype(np.float32) for rows in (2, 3)]
        fused = concatenate_rows([quantizer(part, block_size=32) for part in parts])
        whole = quantizer(np.concatenate(parts), block_size=32)
        np.testing.assert_array_equal(fused.dequantize(), whole.dequantize())

    def test_symmetric_int4_by_hand(self):
        block = np.zeros((1, 1, 32), np.float32)
        block[0, 0, :3] = [4.0, -3.5, 0.5]  # 4 is the furthest: steps of -0.5, it is the -8th
        matrix = quantize_symmetric_int4(block)
        assert matrix.scales.tolist() == [[-0.5]]
        assert matrix.values[0, 0, :2].tolist() == [0xF0, 0x87]  # 8 - 8, 8 + 7; 8 - 1, 8
        assert matrix.dequantize()[0, :3].tolist() == [4.0, -3.5, 0.5]


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


class TestSymmetricInt4:
    @given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([16, 32, 64, 128, 256]))
    def test_never_worse_than_plain_rounding_to_the_furthest(self, seed, size):
        # The fractions of the peak hold 1, and then the scale is fitted to the integers.
        random = np.random.default_rng(seed)
        values = random.standard_normal((8, 512)) * 10.0 ** random.uniform(-9, 9, (8, 1))
        values += random.choice([0, 1]) * values.std()
        weights = values.astype(np.float32)
        blocks = weights.reshape(8, -1, size)
        found = quantize_int4(weights, block_size=size, symmetric=True).dequantize()
        plain = quantize_symmetric_int4(blocks).dequantize()
        exact = blocks.astype(np.float64)
        # Large weights count for more: by their magnitude and the root mean square.
        counts = np.abs(exact) + np.sqrt((exact**2).mean(axis=-1, keepdims=True))
        errors = [
            (counts * (each.reshape(blocks.shape) - exact) ** 2).sum(axis=-1)
            for each in (found, plain)
        ]
        # Candidates are told apart by sums of squares in float32.
        rounding = 1e-6 * (counts * exact**2).sum(axis=-1)
        assert (errors[0] <= errors[1] * (1 + 1e-4) + rounding).all()

    def test_better_on_normal_weights_however_they_count(self):
        weights = np.random.default_rng(1).standard_normal((64, 512)).astype(np.float32)
        found = quantize_int4(weights, block_size=32, symmetric=True)
        plain = quantize_symmetric_int4(weights.reshape(64, -1, 32))
        assert squared_error(weights, found).sum() < 0.92 * squared_error(weights, plain).sum()

    def test_the_zero_point_is_in_the_middle_and_stored_nowhere(self):
        weights = np.random.default_rng(2).standard_normal((4, 64)).astype(np.float32)
        weights[0] = 0
        found = quantize_int4(weights, block_size=32, symmetric=True)
        assert found.zero_points is None
        assert (found.values[0] == 0x88).all(), "zero is 8"
        assert (found.dequantize()[0] == 0).all()
        turned = quantize_int4(-weights, block_size=32, symmetric=True)
        np.testing.assert_allclose(turned.dequantize(), -found.dequantize(), rtol=1e-5)

    def test_the_peak_may_lie_on_either_side(self):
        # -8 to 7 steps of 1, exactly: the peak is the eighth below zero.
        weights = np.arange(-8, 8, dtype=np.float32)[None]
        found = quantize_int4(weights, block_size=16, symmetric=True)
        np.testing.assert_allclose(found.dequantize(), weights, atol=1e-6)
        # Seven steps on both sides: with the peak as the eighth, 7 would be 8 of 7/8.
        weights = np.array([[*range(-7, 8), 0]], np.float32)
        found = quantize_int4(weights, block_size=16, symmetric=True)
        np.testing.assert_allclose(found.dequantize(), weights, atol=1e-6)


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
