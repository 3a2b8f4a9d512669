"""Builds a model in a process of its own, and prints the most memory that it had at once.

python -m tests.build.streamed_build SOURCE OUT FORMAT PRECISION
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import phirt
from phirt.testing.tiny_tokenizer import (
    EOS_TOKEN_ID,
    PAD_TOKEN_ID,
    tokenizer_config_document,
    tokenizer_document,
)

HIDDEN, INNER, HEADS, VOCABULARY = 3072, 8192, 32, 32_064
LARGEST_TENSOR_BYTES = 2 * VOCABULARY * HIDDEN


def write_phi3_shaped(folder: Path, *, layers: int) -> Path:
    """A Phi-3.5-mini of fewer layers in bfloat16, all zeros: files with nothing in them.

    Its widths are the real ones, and of its 3.8 billion weights each layer has 113 million.
    """
    folder.mkdir()
    config: dict[str, Any] = {
        "model_type": "phi3",
        "architectures": ["Phi3ForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 131_072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0] * (HIDDEN // HEADS // 2),
            "long_factor": [2.0] * (HIDDEN // HEADS // 2),
        },
        "rope_theta": 10_000.0,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "sliding_window": 262_144,
        "tie_word_embeddings": False,
        "bos_token_id": PAD_TOKEN_ID,
        "eos_token_id": EOS_TOKEN_ID,
        "pad_token_id": PAD_TOKEN_ID,
        "torch_dtype": "bfloat16",
    }
    for name, document in (
        ("config.json", config),
        ("tokenizer.json", tokenizer_document()),
        ("tokenizer_config.json", tokenizer_config_document()),
    ):
        (folder / name).write_text(json.dumps(document), encoding="utf-8")
    header: dict[str, Any] = {}
    end = 0
    for name, shape in _shapes(layers).items():
        start, end = end, end + 2 * _product(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)  # takes no room where files may have holes
    return folder


def _shapes(layers: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(layers):
        scope = f"model.layers.{layer}"
        shapes |= {
            f"{scope}.input_layernorm.weight": (HIDDEN,),
            f"{scope}.self_attn.qkv_proj.weight": (3 * HIDDEN, HIDDEN),
            f"{scope}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{scope}.post_attention_layernorm.weight": (HIDDEN,),
            f"{scope}.mlp.gate_up_proj.weight": (2 * INNER, HIDDEN),
            f"{scope}.mlp.down_proj.weight": (HIDDEN, INNER),
        }
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def _product(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


def main(source: str, out: str, layout: str, precision: str) -> None:
    """Build it, and print the peak in bytes."""
    phirt.build_model(source, out, format=layout, precision=precision)
    # VmHWM is this program's own; getrusage would report the parent's, carried over exec.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    print(int(status.split("VmHWM:")[1].split()[0]) * 1024)  # noqa: T201  # what it is for


if __name__ == "__main__":
    main(*sys.argv[1:])
