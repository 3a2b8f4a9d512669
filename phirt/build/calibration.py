"""Rounds a model to 4 bits while it reads a text: each matrix for the inputs that it gets.

One pass goes through the decoder, layer by layer. Before a matrix multiplies, its inputs tell
what of it matters (`phirt.build.gptq`); it multiplies rounded, so that later matrices are
rounded for the inputs that they will get.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from phirt.backends.reference.decoder import Decoder
from phirt.build.checkpoint import Checkpoint
from phirt.build.gptq import quantize_with_inputs
from phirt.build.precision import EMBEDDING
from phirt.build.recipe import Recipe
from phirt.build.rounding import RoundedFiles, check_blocks
from phirt.models.decoder_config import DecoderConfig
from phirt.text.calibration import calibration_pieces
from phirt.types import FloatArray, IntArray, Progress, ProgressCallback

__all__ = ["calibrate", "calibration_tokens"]

_SEQUENCES, _LENGTH = 32, 160

_Encode = Callable[[str], Sequence[int]]


def calibrate(
    checkpoint: Checkpoint,
    recipe: Recipe,
    token_ids: IntArray,
    rounded: RoundedFiles,
    *,
    progress: ProgressCallback | None = None,
) -> None:
    """Round every matrix that a recipe rounds to 4 bits; the embedding and LM head excepted.

    Inputs of the widest matrix, and three times the square of its width, are in memory at
    once; what is rounded is kept on disk.

    Args:
        checkpoint: The weights.
        recipe: What is rounded, and how.
        token_ids: Shape (sequences, tokens).
        rounded: Receives what is rounded.
        progress: Called for every matrix.

    Raises:
        ModelFormatError: A tensor is damaged.
        UnsupportedModelError: Blocks do not divide a matrix.
    """
    weights = _CalibratedWeights(checkpoint, recipe, rounded, progress)
    with np.errstate(over="ignore", invalid="ignore"):
        Decoder(checkpoint.config, weights).forward(token_ids)  # type: ignore[arg-type]  # rows of ids make rows of states


def calibration_tokens(encode: _Encode, config: DecoderConfig) -> IntArray:
    """Ids of the calibration text in equal pieces from all over it, shape (sequences, tokens).

    Args:
        encode: The model's tokenizer.
        config: The decoder.

    Raises:
        UnsupportedModelError: The tokenizer makes too few ids of it that the model knows.
    """
    return calibration_pieces(
        encode,
        vocab_size=config.vocab_size,
        count=_SEQUENCES,
        longest=min(_LENGTH, config.context_length, config.rope.boundary or _LENGTH),
    )


class _CalibratedWeights:
    """Weights that are rounded when they first multiply (a decoder's `Weights`)."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        rounded: RoundedFiles,
        progress: ProgressCallback | None,
    ) -> None:
        self._rounded = rounded
        self._checkpoint = checkpoint
        self._recipe = recipe
        self._progress = progress
        names = [name for name in checkpoint.names() if name.startswith("model.layers.")]
        self._matrices = [name for name in names if len(checkpoint.tensor(name).shape) > 1]
        self._seen = 0
        self._inputs: FloatArray | None = None  # of which the next is
        self._hessian: FloatArray | None = None

    def embed(self, token_ids: IntArray) -> FloatArray:
        table = self._checkpoint.tensor(EMBEDDING)
        distinct, places = np.unique(token_ids, return_inverse=True)
        rows = [table.rows(int(token), int(token) + 1).float32() for token in distinct]
        return np.concatenate(rows)[places.reshape(token_ids.shape)]

    def vector(self, name: str) -> FloatArray:
        return self._checkpoint.tensor(name).float32()

    def multiply(self, x: FloatArray, name: str) -> FloatArray:
        matrix = self._checkpoint.tensor(name)
        weights = matrix.float32()
        if self._recipe.rounds_to_4_bits(matrix):
            chosen = self._recipe.quantization
            check_blocks(matrix, chosen.block_size)
            rounded = quantize_with_inputs(
                weights,
                self._hessian_of(x),
                block_size=chosen.block_size,
                symmetric=chosen.symmetric,
            )
            self._rounded.add(name, rounded)
            weights = rounded.dequantize()
        self._seen += 1
        if self._progress is not None:
            self._progress(Progress("calibrate", self._seen, len(self._matrices), "tensors"))
        return x @ weights.T

    def _hessian_of(self, x: FloatArray) -> FloatArray:
        """``x.T @ x`` over all positions, made once for all matrices that x meets."""
        if self._inputs is not x or self._hessian is None:
            rows = x.reshape(-1, x.shape[-1])
            self._inputs, self._hessian = x, rows.T @ rows / np.float32(len(rows))
        return self._hessian
