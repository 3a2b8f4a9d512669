"""The canary of a conversion: computed in NumPy, from the weights before and after rounding.

Both passes run side by side, so that each matrix is read once, and some rows of it at a time:
a model far larger than the memory passes through. All of it runs on a thread of its own while
the artifact is written.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from phirt.backends.reference.decoder import Decoder
from phirt.build import onnx_precision, openvino_precision, safetensors_writer
from phirt.build.checkpoint import Checkpoint, CheckpointTensor
from phirt.build.precision import EMBEDDING, LOSSLESS
from phirt.build.recipe import Recipe
from phirt.errors import ModelError
from phirt.models.canary import (
    CANARY_TEXT,
    POSITIONS,
    Canary,
    choose_tokens,
    make_canary,
    mean_kl,
)
from phirt.models.decoder_config import DecoderConfig
from phirt.types import FloatArray

__all__ = ["Rounding", "canary_beside", "compute_canary", "encode_canary", "rounding_of"]

Rounding: TypeAlias = Callable[[CheckpointTensor, int], FloatArray]
"""The values of a tensor, or of some rows of a matrix from one on, as an artifact stores them."""

_CHUNK = 1 << 17  # Elements of a matrix at once: small enough for a processor's cache.

_logger = logging.getLogger(__name__)


@contextmanager
def canary_beside(
    checkpoint: Checkpoint, encode: Callable[[str], Sequence[int]], rounding: Rounding | None
) -> Iterator[Callable[[], Canary | None]]:
    """Compute the canary while the caller does something else.

    Args:
        checkpoint: The weights; it may be read from two threads.
        encode: The model's tokenizer: from text to ids.
        rounding: What the artifact does to the weights, or None for nothing.

    Yields:
        A function that waits for the canary, and gives None where there can be none. What it
        has not been called for when the block ends is given up.
    """
    token_ids = encode_canary(encode, checkpoint.config)
    if token_ids is None:
        yield lambda: None
        return
    stop = threading.Event()
    with ThreadPoolExecutor(1, thread_name_prefix="phirt-canary") as pool:
        future = pool.submit(compute_canary, checkpoint, token_ids, rounding, stop=stop)
        try:
            yield future.result
        finally:
            stop.set()


def encode_canary(
    encode: Callable[[str], Sequence[int]], config: DecoderConfig
) -> tuple[int, ...] | None:
    """The token ids of a model's canary; None where it can have none, which the log explains.

    Args:
        encode: Its tokenizer: from text to ids.
        config: The decoder.
    """
    longest = min(config.context_length, config.rope.boundary or config.context_length)
    try:
        encoded = encode(CANARY_TEXT)
    except ModelError as error:
        _logger.warning("No canary: %s", error)
        return None
    chosen = choose_tokens(encoded, vocab_size=config.vocab_size, longest=longest)
    if chosen is None:
        _logger.warning(
            "No canary: of an English sentence the tokenizer makes %d tokens, of which the model, "
            "with a vocabulary of %d and a context of %d, cannot take enough.",
            len(encoded),
            config.vocab_size,
            longest,
        )
    return chosen


def rounding_of(layout: str, recipe: Recipe) -> Rounding | None:
    """What storing weights in a layout by a recipe does to them; None for nothing."""
    if recipe.precision in LOSSLESS and not recipe.half:
        return None
    if layout == "safetensors":
        precision = recipe.precision
        return lambda tensor, _: safetensors_writer.rounded(tensor.float32(), precision=precision)
    rounded = {
        "onnx-genai": onnx_precision.rounded,
        "openvino": openvino_precision.rounded,
    }[layout]

    def rounding(tensor: CheckpointTensor, first_row: int) -> FloatArray:
        # Norms and biases stay as they are.
        is_matrix = len(tensor.shape) > 1
        return rounded(tensor, recipe, first_row) if is_matrix else tensor.float32()

    return rounding


def compute_canary(
    checkpoint: Checkpoint,
    token_ids: Sequence[int],
    rounding: Rounding | None,
    *,
    stop: threading.Event | None = None,
) -> Canary | None:
    """Run the tokens through the weights, and through what an artifact keeps of them.

    Args:
        checkpoint: The weights.
        token_ids: The canary's tokens.
        rounding: What the artifact does to them, or None for nothing.
        stop: Set to give up.

    Returns:
        The canary; None where the model's own logits are not finite.

    Raises:
        CancelledError: ``stop`` was set.
        ModelFormatError: A tensor is damaged.
        UnsupportedModelError: The precision cannot hold a tensor.
    """
    weights = _StreamedWeights(checkpoint, rounding, stop or threading.Event())
    decoder = Decoder(checkpoint.config, weights)
    with np.errstate(over="ignore", invalid="ignore"):
        logits = decoder.logits(decoder.forward(token_ids)[:, -POSITIONS:])
    if not np.isfinite(logits[0]).all():
        _logger.warning("No canary: the logits of the original weights are not finite.")
        return None
    canary = make_canary(token_ids, logits[0])
    own_kl = mean_kl(canary, logits[1]) if rounding else 0.0
    if not math.isfinite(own_kl):
        _logger.warning(
            "Once the weights are rounded, the model's logits are not finite: choose a precision "
            "with a larger range, bf16, int8 or fp32."
        )
    return replace(canary, own_kl=own_kl if math.isfinite(own_kl) else None)


class _StreamedWeights:
    """Weights that are read when they are needed (`phirt.backends.reference.decoder.Weights`).

    Everything has a first axis: the original weights, and the rounded ones, if any.
    """

    def __init__(
        self, checkpoint: Checkpoint, rounding: Rounding | None, stop: threading.Event
    ) -> None:
        self._checkpoint = checkpoint
        self._rounding = rounding
        self._stop = stop

    def embed(self, token_ids: Sequence[int]) -> FloatArray:
        table = self._checkpoint.tensor(EMBEDDING)
        rows = [np.stack(self._values(table.rows(token, token + 1), token)) for token in token_ids]
        return np.concatenate(rows, axis=1)

    def vector(self, name: str) -> FloatArray:
        return np.stack(self._values(self._checkpoint.tensor(name)))

    def multiply(self, x: FloatArray, name: str) -> FloatArray:
        matrix = self._checkpoint.tensor(name)
        rows, columns = matrix.shape
        product = np.empty((*x.shape[:-1], rows), np.float32)
        step = max(1, _CHUNK // columns)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            for each, weights in enumerate(self._values(matrix.rows(start, stop), start)):
                # Not a matrix product: NumPy's wakes threads for each, and waits for them, which
                # on a busy machine takes twenty times as long as the arithmetic.
                np.vecdot(x[each, :, None], weights, out=product[each, :, start:stop])
        return product

    def _values(self, tensor: CheckpointTensor, first_row: int = 0) -> list[FloatArray]:
        """The tensor's values, and what rounding makes of them."""
        if self._stop.is_set():
            raise CancelledError
        decoded = _Decoded(tensor)
        values = [decoded.values]
        return values if self._rounding is None else [*values, self._rounding(decoded, first_row)]


class _Decoded:
    """A tensor that is decoded once, however often it is asked (a `CheckpointTensor`)."""

    def __init__(self, tensor: CheckpointTensor) -> None:
        self._tensor = tensor
        self.name = tensor.name
        self.shape = tensor.shape
        self.encoding = tensor.encoding

    @cached_property
    def values(self) -> FloatArray:
        return self._tensor.float32()

    def blocks(self) -> NDArray[np.uint8]:
        return self._tensor.blocks()

    def float32(self) -> FloatArray:
        return self.values

    def rows(self, start: int, stop: int) -> CheckpointTensor:
        return self._tensor.rows(start, stop)
