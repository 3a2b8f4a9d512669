"""The same weights in `transformers`, as the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phirt.build.checkpoint import Checkpoint
from phirt.types import FloatArray


def transformers_model(checkpoint: Checkpoint) -> Any:
    """A checkpoint as a model of transformers, in float32: a Mistral where it has a window."""
    import torch
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
    )

    config = checkpoint.config
    shape: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope.theta},
        "tie_word_embeddings": config.tie_word_embeddings,
        "attn_implementation": "eager",
    }
    if config.window is None:
        model = LlamaForCausalLM(LlamaConfig(**shape))
    else:
        model = MistralForCausalLM(MistralConfig(**shape, sliding_window=config.window))
    state = {
        name: torch.from_numpy(checkpoint.tensor(name).float32()) for name in checkpoint.names()
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if config.tie_word_embeddings else [])
    if config.rope.factors is not None:
        model.model.rotary_emb.inv_freq /= torch.from_numpy(config.rope.factors)
    return model.eval()


def pretrained(folder: Path) -> Any:
    """A Hugging Face folder as a model of transformers, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def transformers_logits(model: Any, token_ids: Sequence[int]) -> FloatArray:
    """Logits of every position, from one forward pass without a cache."""
    import torch

    with torch.inference_mode():
        logits = model(torch.tensor([list(token_ids)]), use_cache=False).logits[0]
    result: FloatArray = logits.numpy().astype(np.float32)
    return result
