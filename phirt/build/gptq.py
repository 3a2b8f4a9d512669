"""GPTQ: rounding that lets the columns not yet rounded make up for those that were.

Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", algorithm 1. A matrix W is multiplied by inputs x; what counts is not the error
of W but that of ``x @ W.T``. With ``H = E[x x.T]``, the error that rounding column i makes
there is least when every later column j is moved by ``-U[i, j] / U[i, i]`` times the error of
column i, where U is the upper triangle with ``inv(H) = U.T @ U``.
"""

from __future__ import annotations

import numpy as np

from phirt.build.quantize import (
    QuantizedMatrix,
    pack_int4,
    quantize_int4,
    reciprocal,
    round_to_steps,
    search_scales,
)
from phirt.types import FloatArray

__all__ = ["quantize_with_inputs"]

# Of the mean of H's diagonal, added to all of it, as the paper does: inputs of few tokens, or
# columns that are always zero, leave H singular. Where it is not enough, ten times as much is.
_DAMPING = 0.01
_LARGEST_DAMPING = 10.0
# Columns after which what is owed is paid to all that come later, in one product.
_GROUP = 128


def quantize_with_inputs(
    weights: FloatArray, hessian: FloatArray, *, block_size: int, symmetric: bool
) -> QuantizedMatrix:
    """Round a matrix to 4 bits, for inputs like those that were seen.

    Args:
        weights: Shape (rows, columns), columns a multiple of ``block_size``.
        hessian: ``x.T @ x`` of the inputs, up to a factor, shape (columns, columns).
        block_size: Columns that share a scale and a zero point.
        symmetric: Whether the zero point is 8 everywhere.

    Returns:
        The matrix; without a hint of what matters (``hessian`` is 0 or not finite) that of
        `phirt.build.quantize.quantize_int4`.
    """
    rows, columns = weights.shape
    upper = _upper_of_inverse(hessian)
    if upper is None:
        return quantize_int4(weights, block_size=block_size, symmetric=symmetric)
    # Damped, too: a block whose inputs were all zero in the text still rounds its weights.
    diagonal = np.diag(hessian)
    importance = (diagonal + _DAMPING * diagonal.mean()).astype(np.float32)
    left = weights.T.copy()  # columns as rows, which lie in one piece
    steps = np.empty((columns, rows), np.float32)
    scales = np.empty((columns // block_size, rows), np.float32)
    zeros = np.empty_like(scales)
    group = max(_GROUP, block_size)
    for start in range(0, columns, group):
        stop = min(start + group, columns)
        owed = np.empty((stop - start, rows), np.float32)
        for column in range(start, stop):
            block, offset = divmod(column, block_size)
            if offset == 0:
                part = slice(column, column + block_size)
                scale, zero = search_scales(
                    np.ascontiguousarray(left[part].T)[:, None],
                    symmetric=symmetric,
                    importance=importance[part],
                )
                scales[block], zeros[block] = scale[:, 0], zero[:, 0]
                inverse = reciprocal(scale)
            rounded = round_to_steps(left[column, :, None, None], inverse, zero)[:, 0, 0]
            steps[column] = rounded
            error = (left[column] - rounded * scales[block]) / upper[column, column]
            owed[column - start] = error
            left[column + 1 : stop] -= np.outer(upper[column, column + 1 : stop], error)
        left[stop:] -= upper[start:stop, stop:].T @ owed
    blocks = steps.T.reshape(rows, -1, block_size)
    return pack_int4(
        blocks,
        np.ascontiguousarray(scales.T),
        None if symmetric else np.ascontiguousarray(zeros.T),
    )


def _upper_of_inverse(hessian: FloatArray) -> FloatArray | None:
    """U with ``inv(H) = U.T @ U``, H damped; None where there is nothing to go by."""
    mean = float(np.diag(hessian).mean())
    if not np.isfinite(hessian).all() or mean <= 0:
        return None
    damping = _DAMPING
    while damping <= _LARGEST_DAMPING:
        damped = hessian.copy()
        damped.flat[:: len(damped) + 1] += damping * mean
        try:
            # Of H in reverse order, H = R @ R.T with R an upper triangle, whose inverse is U.
            lower = np.linalg.cholesky(damped[::-1, ::-1])
            upper = np.linalg.inv(lower[::-1, ::-1])
        except np.linalg.LinAlgError:
            damping *= 10
        else:
            return np.triu(upper)
    return None
