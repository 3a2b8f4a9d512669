"""How probable a model finds tokens that are given: teacher forcing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from phirt.errors import ContextLengthError, UnsupportedModelError
from phirt.generation.forward import split_prompt
from phirt.generation.sampling_logprobs import log_softmax_at
from phirt.protocols import LoadedModel
from phirt.types import FloatArray

__all__ = ["score_tokens"]

# Positions per call: their logits exist at once, 4 bytes times the vocabulary for each.
_CHUNK = 128


def score_tokens(model: LoadedModel, token_ids: Sequence[int]) -> FloatArray:
    """Log-probability of each token given those before it.

    Args:
        model: The loaded model.
        token_ids: n ids, at least two.

    Returns:
        Natural log-probabilities of tokens 1 to n - 1, shape (n - 1,), float32.

    Raises:
        ValueError: Fewer than two tokens, or an id outside the vocabulary.
        ContextLengthError: More tokens than the model's context.
        UnsupportedModelError: The model gives logits of the last position only.
    """
    count, info = len(token_ids), model.info
    if count < 2:
        raise ValueError(f"Scoring needs at least two tokens; there are {count}.")
    if min(token_ids) < 0 or max(token_ids) >= info.vocab_size:
        raise ValueError(f"A token id is outside the model's vocabulary of {info.vocab_size}.")
    if count > info.context_length:
        raise ContextLengthError(
            f"The text has {count} tokens; the model's context is {info.context_length}. "
            "Score it in parts.",
            required=count,
            available=info.context_length,
        )
    if not model.capabilities.verify:
        raise UnsupportedModelError(
            "The loaded graph computes the logits of the last position only, so it cannot "
            "score a text."
        )
    scores = np.empty(count - 1, np.float32)
    session = model.new_session(max_length=count - 1, expected_length=count - 1)
    try:
        start = 0
        for size in split_prompt(count - 1, _CHUNK, first=info.first_call(count - 1)):
            chunk = token_ids[start : start + size]
            for row, logits in enumerate(session.verify(chunk).numpy(), start):
                scores[row] = log_softmax_at(logits, [token_ids[row + 1]])[0]
            start += size
    finally:
        session.close()
    return scores
