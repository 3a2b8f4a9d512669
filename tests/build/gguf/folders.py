"""Tiny Hugging Face folders of every architecture that a GGUF file can have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from phirt.testing import write_tiny_checkpoint
from phirt.testing.checkpoints import safetensors_bytes

__all__ = ["MODELS", "Model", "write_folder"]

WINDOW = 16


@dataclass(frozen=True)
class Model:
    """A tiny checkpoint.

    Attributes:
        architecture: Hugging Face's ``model_type``.
        config: What its config.json says instead of the usual.
        layers: Decoder blocks.
    """

    architecture: str
    config: Mapping[str, Any] = field(default_factory=dict)
    layers: int = 2


MODELS = {
    "llama": Model("llama"),
    "mistral": Model("mistral", {"sliding_window": None}),
    "mistral-window": Model("mistral", {"sliding_window": WINDOW}),
    "qwen2": Model("qwen2"),
    "qwen3": Model("qwen3"),
    "phi3": Model("phi3"),  # Short factors to 32 tokens, long ones beyond.
    "phi3-256": Model(  # llama.cpp's cache has 256 at least, which decides on the factors.
        "phi3", {"original_max_position_embeddings": 256, "max_position_embeddings": 512}
    ),
    "phi3-window": Model("phi3", {"rope_scaling": None, "sliding_window": WINDOW}),
    "phi3-partial": Model(  # As in Phi-4-mini; half of a head, here, and heads twice as wide.
        "phi3",
        {"num_attention_heads": 2, "num_key_value_heads": 1, "partial_rotary_factor": 0.5},
    ),
    "gemma3": Model(
        "gemma3_text",
        {
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
            "sliding_window_pattern": 6,
            "query_pre_attn_scalar": 32,  # The head size: the files do not say.
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        layers=6,
    ),
    "gemma3-full": Model(  # Its files name no window, and every layer attends to everything.
        "gemma3_text",
        {
            "layer_types": ["full_attention"] * 2,
            "sliding_window_pattern": 1,
            "query_pre_attn_scalar": 32,
        },
    ),
}


def write_folder(folder: Path, model: Model) -> Path:
    """Write a model, whose matrices half precision holds exactly, and return its folder.

    `write_tiny_checkpoint` knows models of two layers; deeper ones take theirs from as many
    seeds as it needs.
    """
    from safetensors.numpy import load_file

    write_tiny_checkpoint(folder, model.architecture)
    tensors = load_file(folder / "model.safetensors")
    for seed in range(1, model.layers // 2):
        other = load_file(
            write_tiny_checkpoint(folder / f"seed{seed}", model.architecture, seed=seed)
            / "model.safetensors"
        )
        for name, values in other.items():
            if name.startswith("model.layers."):
                layer, rest = name.removeprefix("model.layers.").split(".", 1)
                tensors[f"model.layers.{int(layer) + 2 * seed}.{rest}"] = values
    rounded = {
        name: values.astype(np.float16).astype(np.float32) if values.ndim > 1 else values
        for name, values in tensors.items()
    }
    (folder / "model.safetensors").write_bytes(safetensors_bytes(rounded))
    path = folder / "config.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    document |= {"num_hidden_layers": model.layers, **model.config}
    path.write_text(json.dumps(document), encoding="utf-8")
    return folder
