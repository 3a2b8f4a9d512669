"""Tiny random checkpoints in Hugging Face's layout, written with NumPy alone.

They have everything that a real one has and a runtime may get wrong (grouped queries, heads
wider than ``hidden / heads``, biases, norms of queries and keys, windows shorter than a prompt,
LongRoPE, tied embeddings, fused projections), in half a megabyte.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from phirt.testing.tiny_tokenizer import (
    EOS_TOKEN_ID,
    PAD_TOKEN_ID,
    VOCAB_SIZE,
    tokenizer_config_document,
    tokenizer_document,
)
from phirt.types import FloatArray

__all__ = ["TINY_ARCHITECTURES", "safetensors_bytes", "write_tiny_checkpoint"]

TINY_ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3_text", "mistral", "phi3", "phimoe")
"""What `write_tiny_checkpoint` can write, by Hugging Face's ``model_type``."""

_HIDDEN = 64
_LAYERS = 2
_HEADS = 4
_KV_HEADS = 2
_INNER = 128
_EXPERTS = 4

_COMMON: dict[str, Any] = {
    "hidden_size": _HIDDEN,
    "intermediate_size": _INNER,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _KV_HEADS,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": PAD_TOKEN_ID,
    "eos_token_id": EOS_TOKEN_ID,
    "pad_token_id": PAD_TOKEN_ID,
    "torch_dtype": "float32",
}

# Eight pairs per head: the short factors leave the fast pairs alone, the long ones none.
_LONG_ROPE: dict[str, Any] = {
    "type": "longrope",
    "rope_type": "longrope",
    "short_factor": [1.0, 1.0, 1.05, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.1, 1.4, 1.9, 2.6, 3.4, 4.3, 5.2, 6.0],
}

# What each architecture's config.json says beyond (or instead of) _COMMON.
_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "mlp_bias": False},
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": 32,
        "attention_bias": False,
        "use_sliding_window": False,
    },
    "gemma3_text": {
        "architectures": ["Gemma3ForCausalLM"],
        "head_dim": 32,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 24,  # Not the head size: the scale must come from here.
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "sliding_window": 16,
        "sliding_window_pattern": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "tie_word_embeddings": True,
    },
    "mistral": {"architectures": ["MistralForCausalLM"], "head_dim": 16, "sliding_window": 16},
    "phi3": {
        "architectures": ["Phi3ForCausalLM"],
        "max_position_embeddings": 128,
        "original_max_position_embeddings": 32,
        "rope_scaling": _LONG_ROPE,
        "sliding_window": None,
    },
    # Plain rotary positions: transformers 5.23 and mlx-lm 0.32 each compute something else
    # for phimoe's LongRoPE, the former short factors at every length, the latter long ones.
    "phimoe": {
        "architectures": ["PhimoeForCausalLM"],
        "intermediate_size": 64,
        "num_local_experts": _EXPERTS,
        "num_experts_per_tok": 2,
        "router_jitter_noise": 0.01,
        "input_jitter_noise": 0.0,
        "attention_bias": True,
        "lm_head_bias": True,
        "rope_scaling": None,
        "sliding_window": None,
    },
}


def write_tiny_checkpoint(folder: Path, architecture: str, *, seed: int = 0) -> Path:
    """Write a random model of 2 layers and width 64 as a Hugging Face folder.

    The same arguments write the same bytes. Greedy continuations vary, and most of their
    steps are decided by more than rounding.

    Args:
        folder: Where to write; made if it does not exist.
        architecture: One of `TINY_ARCHITECTURES`. mistral and gemma3_text have windows of 16
            tokens, phi3 LongRoPE (32 tokens with short factors, 128 in all), phimoe 4 experts.
        seed: Seed of the weights.

    Returns:
        ``folder``, which then holds config.json, generation_config.json, model.safetensors,
        tokenizer.json and tokenizer_config.json.

    Raises:
        ValueError: ``architecture`` is none of `TINY_ARCHITECTURES`.
    """
    if architecture not in _CONFIGS:
        known = ", ".join(TINY_ARCHITECTURES)
        raise ValueError(f"There is no tiny {architecture!r}. Choose one of: {known}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": architecture, **_COMMON, **_CONFIGS[architecture]}
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "generation_config.json",
        {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    _write_json(folder / "tokenizer.json", tokenizer_document())
    _write_json(folder / "tokenizer_config.json", tokenizer_config_document())
    random = np.random.default_rng([seed, TINY_ARCHITECTURES.index(architecture)])
    tensors = dict(_Weights(config, random).tensors())
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    return folder


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8", newline="\n")


def safetensors_bytes(tensors: dict[str, FloatArray]) -> bytes:
    """A safetensors file: the header's length in 8 bytes, the header in JSON, the data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, values in tensors.items():
        end = offset + values.nbytes
        header[name] = {"dtype": "F32", "shape": values.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # So that the data is aligned.
    data = [values.astype("<f4").tobytes() for values in tensors.values()]
    return b"".join([len(text).to_bytes(8, "little"), text, *data])


class _Weights:
    """The random tensors of one checkpoint.

    Args:
        config: Its config.json.
        random: Where the values come from.
    """

    def __init__(self, config: dict[str, Any], random: np.random.Generator) -> None:
        self._config = config
        self._random = random
        self._architecture: str = config["model_type"]
        head_size = config.get("head_dim", _HIDDEN // _HEADS)
        self._queries = _HEADS * head_size
        self._keys = _KV_HEADS * head_size
        self._head_size = head_size

    def tensors(self) -> Iterator[tuple[str, FloatArray]]:
        """Names and values, in the order of the file."""
        # A small embedding: what a token adds to the stream must not outweigh what the layers
        # add, or a model whose head is its embedding says every token again and again.
        tied, gemma = self._config["tie_word_embeddings"], self._architecture == "gemma3_text"
        scale = 0.15 if gemma else 0.3  # Gemma multiplies it by 8, the root of the width.
        yield "model.embed_tokens.weight", self._normal(VOCAB_SIZE, _HIDDEN, scale=scale)
        for layer in range(_LAYERS):
            yield from self._block(f"model.layers.{layer}")
        yield from self._norm("model.norm", extra=1.5 if gemma else 0.0)
        if not tied:
            yield "lm_head.weight", self._normal(VOCAB_SIZE, _HIDDEN, scale=0.4)
        if self._config.get("lm_head_bias"):
            yield "lm_head.bias", self._normal(VOCAB_SIZE, scale=0.2)

    def _block(self, scope: str) -> Iterator[tuple[str, FloatArray]]:
        yield from self._norm(f"{scope}.input_layernorm")
        yield from self._attention(f"{scope}.self_attn")
        if self._architecture == "gemma3_text":
            # Norms on the way out set how much a layer adds.
            yield from self._norm(f"{scope}.post_attention_layernorm", extra=3.0)
            yield from self._norm(f"{scope}.pre_feedforward_layernorm")
            yield from self._norm(f"{scope}.post_feedforward_layernorm", extra=3.0)
        else:
            yield from self._norm(f"{scope}.post_attention_layernorm")
        if self._architecture == "phimoe":
            yield from self._experts(f"{scope}.block_sparse_moe")
        else:
            yield from self._mlp(f"{scope}.mlp")

    def _attention(self, scope: str) -> Iterator[tuple[str, FloatArray]]:
        # Scores of several units, so that what a head attends to depends on the tokens.
        query = self._linear(self._queries, _HIDDEN, gain=2.0)
        key = self._linear(self._keys, _HIDDEN, gain=2.0)
        value = self._linear(self._keys, _HIDDEN, gain=1.5)
        if self._architecture == "phi3":
            yield f"{scope}.qkv_proj.weight", np.concatenate([query, key, value])
        else:
            yield f"{scope}.q_proj.weight", query
            yield f"{scope}.k_proj.weight", key
            yield f"{scope}.v_proj.weight", value
        if self._architecture in {"qwen2", "phimoe"}:
            yield f"{scope}.q_proj.bias", self._normal(self._queries, scale=0.5)
            yield f"{scope}.k_proj.bias", self._normal(self._keys, scale=0.5)
            yield f"{scope}.v_proj.bias", self._normal(self._keys, scale=0.5)
        if self._architecture in {"qwen3", "gemma3_text"}:
            yield from self._norm(f"{scope}.q_norm", self._head_size, extra=1.0)
            yield from self._norm(f"{scope}.k_norm", self._head_size, extra=1.0)
        yield f"{scope}.o_proj.weight", self._linear(_HIDDEN, self._queries, gain=1.5)
        if self._architecture == "phimoe":
            yield f"{scope}.o_proj.bias", self._normal(_HIDDEN, scale=0.1)

    def _mlp(self, scope: str) -> Iterator[tuple[str, FloatArray]]:
        gate = self._linear(_INNER, _HIDDEN, gain=1.5)
        up = self._linear(_INNER, _HIDDEN, gain=1.5)
        if self._architecture == "phi3":
            yield f"{scope}.gate_up_proj.weight", np.concatenate([gate, up])
        else:
            yield f"{scope}.gate_proj.weight", gate
            yield f"{scope}.up_proj.weight", up
        yield f"{scope}.down_proj.weight", self._linear(_HIDDEN, _INNER, gain=1.5)

    def _experts(self, scope: str) -> Iterator[tuple[str, FloatArray]]:
        inner: int = self._config["intermediate_size"]
        yield f"{scope}.gate.weight", self._linear(_EXPERTS, _HIDDEN, gain=2.0)
        for expert in range(_EXPERTS):
            # Mixtral's names: w1 is the gate, w3 the up and w2 the down projection.
            yield f"{scope}.experts.{expert}.w1.weight", self._linear(inner, _HIDDEN, gain=1.5)
            yield f"{scope}.experts.{expert}.w2.weight", self._linear(_HIDDEN, inner, gain=1.5)
            yield f"{scope}.experts.{expert}.w3.weight", self._linear(inner, _HIDDEN, gain=1.5)

    def _norm(
        self, scope: str, width: int = _HIDDEN, *, extra: float = 0.0
    ) -> Iterator[tuple[str, FloatArray]]:
        # Gemma stores weights that one is added to; phimoe's norms are LayerNorms with biases.
        centre = np.float32((self._architecture != "gemma3_text") + extra)
        yield f"{scope}.weight", centre + self._normal(width, scale=0.2)
        if self._architecture == "phimoe":
            yield f"{scope}.bias", self._normal(width, scale=0.1)

    def _linear(self, rows: int, columns: int, *, gain: float) -> FloatArray:
        return self._normal(rows, columns, scale=gain / columns**0.5)

    def _normal(self, *shape: int, scale: float) -> FloatArray:
        return self._random.standard_normal(shape, dtype=np.float32) * np.float32(scale)
