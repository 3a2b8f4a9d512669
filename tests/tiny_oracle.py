"""transformers' answers about tiny checkpoints: full forwards without a cache, in float32."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from phirt.types import FloatArray

__all__ = ["TransformersOracle"]


class TransformersOracle:
    """One checkpoint in transformers. Every answer is computed once.

    Args:
        checkpoint: A Hugging Face folder.
    """

    def __init__(self, checkpoint: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HF_HUB_OFFLINE", "1")
            network: Any = AutoModelForCausalLM.from_pretrained(
                checkpoint, dtype=torch.float32, attn_implementation="eager"
            )
        self._network = network.eval()
        self._known: dict[tuple[int, ...], FloatArray] = {}

    def logits(self, ids: Sequence[int]) -> FloatArray:
        """Logits of every position, (n, vocab). Under LongRoPE n decides the factors."""
        key = tuple(ids)
        if key not in self._known:
            self._choose_factors(len(key))
            with self._torch.inference_mode():
                output = self._network(self._torch.tensor([key]), use_cache=False)
            self._known[key] = output.logits[0].numpy()
        return self._known[key]

    def _choose_factors(self, length: int) -> None:
        """Tell phimoe's LongRoPE how long the sequence is: transformers 5.23 forgets to."""
        rotary = self._network.model.rotary_emb
        if type(rotary).__name__ == "PhimoeRotaryEmbedding" and rotary.rope_type == "longrope":
            from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

            rotary.rope_init_fn = partial(ROPE_INIT_FUNCTIONS["longrope"], seq_len=length)
