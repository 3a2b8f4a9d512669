"""Rounding that makes up for its own errors, as the paper has it."""

from __future__ import annotations

import numpy as np
import pytest

from phirt.build.gptq import quantize_with_inputs
from phirt.build.quantize import (
    QuantizedMatrix,
    pack_int4,
    quantize_int4,
    reciprocal,
    round_to_steps,
    search_scales,
)
from phirt.build.recipe import BLOCK_SIZES
from phirt.types import FloatArray

COLUMNS = 256


def matrix(rows: int = 24, columns: int = COLUMNS, *, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def correlated_inputs(columns: int = COLUMNS, *, rank: int = 32, seed: int = 1) -> FloatArray:
    """Inputs that a few directions make up nearly all of, as those of a decoder's matrices are."""
    random = np.random.default_rng(seed)
    directions = random.standard_normal((rank, columns))
    inputs = random.standard_normal((1000, rank)) @ directions
    inputs += 0.1 * random.standard_normal(inputs.shape)
    return inputs.astype(np.float32)


def hessian_of(inputs: FloatArray) -> FloatArray:
    return inputs.T @ inputs / np.float32(len(inputs))


def rounded_alike(weights: FloatArray, *, block_size: int, symmetric: bool) -> QuantizedMatrix:
    """Rounded where every column counts alike."""
    blocks = weights.reshape(len(weights), -1, block_size)
    alike = np.ones(block_size, np.float32)
    scales, zero = search_scales(blocks, symmetric=symmetric, importance=alike)
    steps = round_to_steps(blocks, reciprocal(scales), zero)
    return pack_int4(steps, scales, None if symmetric else zero)


def error(weights: FloatArray, rounded: FloatArray, inputs: FloatArray) -> float:
    """Mean squared error of what a layer computes."""
    return float(((inputs @ (weights - rounded).T) ** 2).mean())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_inputs_that_do_not_depend_on_each_other_leave_nothing_to_make_up_for(
    block_size, symmetric
):
    weights = matrix()
    found = quantize_with_inputs(
        weights, np.eye(COLUMNS, dtype=np.float32), block_size=block_size, symmetric=symmetric
    )
    plain = rounded_alike(weights, block_size=block_size, symmetric=symmetric)
    assert found.block_size == block_size
    assert (found.zero_points is None) == symmetric
    np.testing.assert_array_equal(found.values, plain.values)
    np.testing.assert_allclose(found.scales, plain.scales, rtol=1e-6)
    np.testing.assert_allclose(found.dequantize(), plain.dequantize(), rtol=1e-5, atol=1e-6)


def test_a_column_pays_for_the_error_of_the_one_before_it():
    # The first two inputs are always equal, so that w0 + w1 is all that counts of their weights.
    # The others keep the step at 1.
    weights = np.array([[0.45, 0.1, *[7.0, -7.0] * 7]], np.float32)
    hessian = np.eye(16, dtype=np.float32)
    hessian[:2, :2] = 1
    plain = quantize_int4(weights, block_size=16, symmetric=True).dequantize()[0]
    assert plain[:2] == pytest.approx([0, 0]), "each alone is nearer to 0 than to a step"
    found = quantize_with_inputs(weights, hessian, block_size=16, symmetric=True).dequantize()[0]
    assert found == pytest.approx([0, 1, *[7, -7] * 7], abs=0.02), "0.45 + 0.1 is nearer to 1"


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_what_a_layer_computes_is_much_closer_than_by_plain_rounding(block_size, symmetric):
    weights, inputs = matrix(), correlated_inputs()
    unseen = correlated_inputs(seed=1)[500:]
    found = quantize_with_inputs(
        weights, hessian_of(inputs[:500]), block_size=block_size, symmetric=symmetric
    )
    plain = quantize_int4(weights, block_size=block_size, symmetric=symmetric)
    ratio = error(weights, plain.dequantize(), unseen) / error(weights, found.dequantize(), unseen)
    assert ratio > 4
    of_weights = [((weights - each.dequantize()) ** 2).sum() for each in (found, plain)]
    assert of_weights[0] > of_weights[1], "bought with a larger error of the weights themselves"


def test_a_matrix_of_many_groups_of_columns():
    # What is owed across groups of 128 columns is paid in one product.
    weights, inputs = matrix(8, 640), correlated_inputs(640)
    found = quantize_with_inputs(weights, hessian_of(inputs), block_size=64, symmetric=False)
    plain = quantize_int4(weights, block_size=64)
    ratio = error(weights, plain.dequantize(), inputs) / error(weights, found.dequantize(), inputs)
    assert ratio > 4


@pytest.mark.parametrize(
    "hessian",
    [
        np.zeros((COLUMNS, COLUMNS), np.float32),
        np.full((COLUMNS, COLUMNS), np.nan, np.float32),
        np.full((COLUMNS, COLUMNS), np.inf, np.float32),
        -np.eye(COLUMNS, dtype=np.float32),
        # Of no inputs at all: far from positive definite.
        np.ones((COLUMNS, COLUMNS), np.float32) - 1000 * np.eye(COLUMNS, k=1, dtype=np.float32),
    ],
    ids=["zero", "NaN", "infinite", "negative", "of no inputs"],
)
def test_without_a_hint_it_is_plain_rounding(hessian):
    weights = matrix()
    found = quantize_with_inputs(weights, hessian, block_size=32, symmetric=False)
    plain = quantize_int4(weights, block_size=32)
    np.testing.assert_array_equal(found.values, plain.values)
    np.testing.assert_allclose(found.scales, plain.scales, rtol=1e-6)


def test_fewer_tokens_than_columns_are_enough():
    weights, inputs = matrix(), correlated_inputs()
    few = hessian_of(inputs[:40])
    assert np.linalg.matrix_rank(few) < COLUMNS
    found = quantize_with_inputs(weights, few, block_size=32, symmetric=False).dequantize()
    plain = quantize_int4(weights, block_size=32).dequantize()
    assert error(weights, plain, inputs) > 2 * error(weights, found, inputs)


def test_columns_whose_inputs_were_zero_keep_their_weights():
    weights, inputs = matrix(), correlated_inputs()
    inputs[:, 32:64] = 0  # a whole block that the text did not wake
    found = quantize_with_inputs(weights, hessian_of(inputs), block_size=32, symmetric=False)
    plain = rounded_alike(weights, block_size=32, symmetric=False)
    silent = slice(32, 64)
    np.testing.assert_allclose(
        found.dequantize()[:, silent], plain.dequantize()[:, silent], atol=1e-4
    )


@pytest.mark.parametrize("rows", [1, 3])
def test_the_caller_keeps_its_arrays(rows):
    weights, hessian = matrix(rows), hessian_of(correlated_inputs())
    before = weights.copy(), hessian.copy()
    quantize_with_inputs(weights, hessian, block_size=32, symmetric=False)
    np.testing.assert_array_equal(weights, before[0])
    np.testing.assert_array_equal(hessian, before[1])


@pytest.mark.parametrize("value", [0.0, 1e-42, 1e12])
def test_constant_blocks_stay_finite(value):
    weights = np.full((2, COLUMNS), value, np.float32)
    found = quantize_with_inputs(
        weights, hessian_of(correlated_inputs()), block_size=32, symmetric=False
    )
    assert np.isfinite(found.scales).all()
    np.testing.assert_allclose(found.dequantize(), value, rtol=1e-5, atol=1e-37)
