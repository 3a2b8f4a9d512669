"""llama.cpp itself, as the oracle: what it makes of a GGUF file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

from phirt.types import FloatArray

__all__ = ["LlamaCpp"]

_FLOAT32 = 0  # GGML_TYPE_F32
_NO_FLASH_ATTENTION = 0  # LLAMA_FLASH_ATTN_TYPE_DISABLED


class LlamaCpp:
    """A GGUF file, opened by llama.cpp on the CPU. Use it in a ``with`` statement.

    What llama.cpp cannot run may end the process: it asserts.

    Args:
        path: The file.
        context: Tokens of its KV cache, which llama.cpp rounds up to 256. LongRoPE's long
            factors take over where this, and not the prompt, is beyond the original context.
    """

    def __init__(self, path: Path, *, context: int = 256) -> None:
        self._library: Any = pytest.importorskip(
            "cyllama.llama.llama_cpp", reason="cyllama has no wheel for this platform"
        )
        self._library.disable_logging()
        params = self._library.LlamaModelParams()
        params.n_gpu_layers = 0
        self._model = _model_class(self._library)(str(path), params, verbose=False)
        self._params = self._library.LlamaContextParams()
        self._params.n_ctx = self._params.n_batch = self._params.n_ubatch = context
        # Either of these, left alone, rounds to half precision: a difference of 0.03.
        self._params.type_k = self._params.type_v = _FLOAT32
        self._params.flash_attn_type = _NO_FLASH_ATTENTION
        self._params.n_threads = self._params.n_threads_batch = 2

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._model.close()

    def logits(self, token_ids: Sequence[int]) -> FloatArray:
        """Logits of every position of a sequence, (positions, vocabulary)."""
        context = self._library.LlamaContext(self._model, self._params, verbose=False)
        batch = self._library.LlamaBatch(n_tokens=len(token_ids), embd=0, n_seq_max=1)
        try:
            for position, token in enumerate(token_ids):
                batch.add(token, position, [0], True)
            context.decode(batch)
            rows = [context.get_logits_ith(index) for index in range(len(token_ids))]
        finally:
            batch.close()
            context.close()
        return np.array(rows, np.float32)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the model adds."""
        ids: list[int] = self._model.get_vocab().tokenize(text, True, True)
        return ids


def _model_class(library: Any) -> Any:
    class Model(library.LlamaModel):  # type: ignore[misc]  # a class of an untyped library
        @property
        def n_vocab(self) -> Any:
            """cyllama 0.2.18 asks the model for what its vocabulary has."""
            return self.get_vocab().n_vocab

    return Model
