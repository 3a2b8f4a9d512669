"""Writes a Hugging Face folder as a GGUF file, the way that llama.cpp's converter does.

What follows is its ``conversion/`` folder (``base.py``, ``llama.py``, ``phi.py``, ``gemma.py``),
for the architectures of `phirt.testing.write_tiny_checkpoint`. Names of tensors come from the
``gguf`` package's own table. Nothing of phirt takes part.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter, RopeScalingType, get_tensor_name_map
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType, TokenType
from gguf.quants import quantize

from phirt.types import FloatArray

__all__ = ["convert_to_gguf"]

_ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "phi3": MODEL_ARCH.PHI3,
    "gemma3_text": MODEL_ARCH.GEMMA3,
}


def convert_to_gguf(folder: Path, path: Path, *, encoding: str = "F32") -> Path:
    """Write the checkpoint of a folder to ``path`` and return it.

    Args:
        folder: config.json, model.safetensors and tokenizer.json.
        path: The file to write.
        encoding: Of the matrices; vectors are always F32.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[_ARCHITECTURES[config["model_type"]]])
    writer.add_name("tiny")
    _add_shape(writer, config)
    if config["model_type"] == "phi3":
        _add_phi3(writer, config)
    else:
        _add_rotary(writer, config)
    # llama.cpp's converter leaves mistral's out; other converters write it.
    window = config.get("sliding_window")
    has_windows = config.get("sliding_window_pattern") != 1
    if config["model_type"] in {"gemma3_text", "mistral"} and window is not None and has_windows:
        writer.add_sliding_window(window)
    _add_vocabulary(writer, folder, config)
    for name, values in _tensors(folder, config):
        kind = GGMLQuantizationType[encoding if values.ndim > 1 else "F32"]
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _head_size(config: dict[str, Any]) -> int:
    size: int = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return size


def _add_shape(writer: GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if config["model_type"] in {"llama", "mistral"}:
        writer.add_rope_dimension_count(_head_size(config))


def _add_rotary(writer: GGUFWriter, config: dict[str, Any]) -> None:
    scaling = config.get("rope_scaling")
    if scaling is not None:
        assert scaling["rope_type"] == "linear"
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])


def _add_phi3(writer: GGUFWriter, config: dict[str, Any]) -> None:
    share = config.get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(
        int(share * config["hidden_size"]) // config["num_attention_heads"]
    )
    writer.add_sliding_window(config["sliding_window"] or 0)
    context = config["max_position_embeddings"]
    original = config.get("original_max_position_embeddings", context)
    writer.add_rope_scaling_orig_ctx_len(original)
    scaling = config.get("rope_scaling")
    if scaling is None:
        return
    factor = context / original
    scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    writer.add_rope_scaling_attn_factors(scale)
    for kind in ("long", "short"):
        divisors = np.array(scaling[f"{kind}_factor"], np.float32)
        writer.add_tensor(f"rope_factors_{kind}.weight", divisors)


def _add_vocabulary(writer: GGUFWriter, folder: Path, config: dict[str, Any]) -> None:
    document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary: dict[str, int] = document["model"]["vocab"]
    special = {token["content"] for token in document["added_tokens"]}
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2" if config["model_type"].startswith("qwen") else "gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [TokenType.CONTROL if token in special else TokenType.NORMAL for token in tokens]
    )
    writer.add_token_merges([" ".join(pair) for pair in document["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])


def _tensors(folder: Path, config: dict[str, Any]) -> Iterator[tuple[str, FloatArray]]:
    """llama.cpp's names and values."""
    from safetensors.numpy import load_file

    model_type = config["model_type"]
    names = get_tensor_name_map(_ARCHITECTURES[model_type], config["num_hidden_layers"])
    for name, stored in load_file(folder / "model.safetensors").items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        values = stored
        if model_type in {"llama", "mistral"} and name.endswith(("q_proj.weight", "k_proj.weight")):
            values = _interleave_pairs(stored, _head_size(config))
        if model_type == "gemma3_text" and name.endswith("norm.weight"):
            values = stored + np.float32(1)
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        yield gguf_name, values


def _interleave_pairs(values: FloatArray, head_size: int) -> FloatArray:
    """Rows of q or k, from halves of a head to neighbouring pairs."""
    heads = values.reshape(-1, 2, head_size // 2, values.shape[-1])
    return heads.swapaxes(1, 2).reshape(values.shape)
