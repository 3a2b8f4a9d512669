"""A checkpoint's weights in memory, for the decoder in NumPy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from phirt.errors import ModelFormatError, OutOfMemoryError
from phirt.models.decoder_config import DecoderConfig
from phirt.models.safetensors import SafetensorsFolder
from phirt.types import FloatArray

__all__ = ["MemoryWeights", "read_weights"]


class MemoryWeights:
    """Tensors in memory, as float32 (`phirt.backends.reference.decoder.Weights`).

    Args:
        tensors: By Hugging Face's names.
    """

    def __init__(self, tensors: Mapping[str, FloatArray]) -> None:
        self._tensors = tensors

    def embed(self, token_ids: Sequence[int]) -> FloatArray:
        """Rows of the embedding, shape (n, hidden_size)."""
        rows: FloatArray = self._tensors["model.embed_tokens.weight"][np.asarray(token_ids)]
        return rows

    def vector(self, name: str) -> FloatArray:
        """A norm's weight or a bias, shape (width,)."""
        return self._tensors[name]

    def multiply(self, x: FloatArray, name: str) -> FloatArray:
        """``x @ weight.T``."""
        return x @ self._tensors[name].T


def read_weights(path: Path, config: DecoderConfig) -> MemoryWeights:
    """Every tensor of a safetensors folder, fused projections apart.

    Raises:
        ModelFormatError: A tensor that the decoder reads is missing or of another shape.
        OutOfMemoryError: There is no room.
    """
    weights: dict[str, FloatArray] = {}
    try:
        with SafetensorsFolder(path) as file:
            for name in file.names():
                weights.update(_apart(name, np.array(file.float32(name)), config))
    except MemoryError as error:
        raise OutOfMemoryError(
            f"Out of memory while reading {path} as float32. Another backend keeps "
            "the weights in their own precision."
        ) from error
    _check_shapes(weights, config, path)
    return MemoryWeights(weights)


def _apart(name: str, values: FloatArray, config: DecoderConfig) -> dict[str, FloatArray]:
    """A tensor under its own name, or the projections that Phi-3 keeps fused in it."""
    query, key = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    for fused, parts, rows in (
        ("qkv_proj", ("q_proj", "k_proj", "v_proj"), (query, query + key)),
        ("gate_up_proj", ("gate_proj", "up_proj"), (config.intermediate_size,)),
    ):
        if f".{fused}." in name:
            split = np.split(values, rows)
            return {
                name.replace(fused, part): rows_of
                for part, rows_of in zip(parts, split, strict=True)
            }
    return {name: values}


def _check_shapes(weights: Mapping[str, FloatArray], config: DecoderConfig, path: Path) -> None:
    """Refuse tensors that are missing or of another shape than config.json says."""
    for name, shape in _shapes(config).items():
        found = weights[name].shape if name in weights else None
        if found != shape:
            raise ModelFormatError(
                f"{path}: config.json asks for {name} of shape {shape}; "
                + ("there is none." if found is None else f"the file's has {found}.")
            )


def _shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that the decoder reads, and its shape."""
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_size
    query, key = config.num_heads * head, config.num_kv_heads * head
    block: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (key, hidden),
        "self_attn.v_proj.weight": (key, hidden),
        "self_attn.o_proj.weight": (hidden, query),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if config.qkv_bias:
        block |= {f"self_attn.{part}_proj.bias": (key,) for part in "kv"}
        block["self_attn.q_proj.bias"] = (query,)
    if config.output_bias:
        block["self_attn.o_proj.bias"] = (hidden,)
    if config.qk_norm:
        block |= {f"self_attn.{part}_norm.weight": (head,) for part in "qk"}
    if config.sandwich_norms:
        block |= {f"{side}_feedforward_layernorm.weight": (hidden,) for side in ("pre", "post")}
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for layer in range(config.num_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    return shapes
