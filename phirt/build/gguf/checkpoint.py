"""A GGUF file as a `Checkpoint`: Hugging Face's names, shapes and order of rows."""

from __future__ import annotations

from pathlib import Path

from phirt.build.checkpoint import OpenCheckpoint
from phirt.build.gguf.config import ROPE_FACTORS, read_config
from phirt.build.gguf.file import GgufFile
from phirt.build.gguf.tensors import ENCODINGS, GgufTensor, rotary_row_order
from phirt.errors import ModelFormatError, UnsupportedModelError
from phirt.models.decoder_config import DecoderConfig

__all__ = ["GgufCheckpoint"]


class GgufCheckpoint(OpenCheckpoint[GgufTensor]):
    """The weights of a GGUF file (a `Checkpoint`).

    Everything but the tensors' bytes is read and checked at once: which tensors there are,
    their shapes against the configuration, their encodings.

    Args:
        path: The file.

    Attributes:
        file: The open file, for what a checkpoint does not cover (tokenizer, chat template).
        tokens: The vocabulary, as the file spells it.

    Raises:
        ModelNotFoundError: There is no such file.
        ModelFormatError: The file contradicts itself or lacks something.
        UnsupportedModelError: Its architecture, a feature or an encoding is not supported.
    """

    def __init__(self, path: Path) -> None:
        self.file = GgufFile(path)
        try:
            self.tokens: list[str] = self.file.strings("tokenizer.ggml.tokens") or []
            config = read_config(self.file, tokens=self.tokens)
            tensors = _collect_tensors(self.file, config)
        except BaseException:
            self.file.close()
            raise
        super().__init__(path.name, self.file, config, tensors)


def _collect_tensors(file: GgufFile, config: DecoderConfig) -> dict[str, GgufTensor]:
    """Find every tensor that the configuration calls for, and nothing else."""
    left = dict(file.header.tensors)
    left.pop(ROPE_FACTORS, None)  # part of the configuration
    tensors: dict[str, GgufTensor] = {}
    for gguf_name, (name, shape) in _expected(config).items():
        info = left.pop(gguf_name, None)
        if info is None:
            raise ModelFormatError(
                f"{file.path.name}: tensor {gguf_name!r} is missing. The file is not a whole "
                f"{config.architecture} model; fetch it again or use another."
            )
        if info.shape != shape:
            raise ModelFormatError(
                f"{file.path.name}: tensor {gguf_name!r} has shape {info.shape}, and the "
                f"metadata calls for {shape}. Use another file."
            )
        if info.encoding not in ENCODINGS:
            raise UnsupportedModelError(
                f"{file.path.name}: tensor {gguf_name!r} is stored as {info.encoding}; phirt "
                f"reads {', '.join(ENCODINGS)}. Use a file of one of these."
            )
        heads = _rotating_heads(gguf_name, config)
        order = rotary_row_order(heads=heads, head_size=config.head_size) if heads else None
        tensors[name] = GgufTensor(file, info, name=name, row_order=order)
    if left:
        unknown = ", ".join(repr(name) for name in sorted(left)[:3])
        raise UnsupportedModelError(
            f"{file.path.name}: {len(left)} tensors are not part of a plain {config.architecture} "
            f"decoder and would be ignored, such as {unknown}. phirt does not support this variant."
        )
    return tensors


def _rotating_heads(gguf_name: str, config: DecoderConfig) -> int | None:
    """Heads of a projection whose rows llama.cpp's converter reorders: in llama alone."""
    if config.architecture == "llama" and gguf_name.endswith(".attn_q.weight"):
        return config.num_heads
    if config.architecture == "llama" and gguf_name.endswith(".attn_k.weight"):
        return config.num_kv_heads
    return None


def _expected(config: DecoderConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Hugging Face's name and the shape of every tensor, by llama.cpp's name."""
    table: dict[str, tuple[str, tuple[int, ...]]] = {
        "token_embd.weight": (
            "model.embed_tokens.weight",
            (config.vocab_size, config.hidden_size),
        )
    }
    layer = _expected_layer(config)
    for index in range(config.num_layers):
        for gguf_name, (name, shape) in layer.items():
            table[f"blk.{index}.{gguf_name}"] = (f"model.layers.{index}.{name}", shape)
    table["output_norm.weight"] = ("model.norm.weight", (config.hidden_size,))
    if not config.tie_word_embeddings:
        table["output.weight"] = ("lm_head.weight", (config.vocab_size, config.hidden_size))
    return table


def _expected_layer(config: DecoderConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    width, inner = config.hidden_size, config.intermediate_size
    queries = config.num_heads * config.head_size
    keys = config.num_kv_heads * config.head_size
    layer: dict[str, tuple[str, tuple[int, ...]]] = {
        "attn_norm.weight": ("input_layernorm.weight", (width,)),
        "attn_q.weight": ("self_attn.q_proj.weight", (queries, width)),
        "attn_k.weight": ("self_attn.k_proj.weight", (keys, width)),
        "attn_v.weight": ("self_attn.v_proj.weight", (keys, width)),
        "attn_output.weight": ("self_attn.o_proj.weight", (width, queries)),
        "ffn_norm.weight": ("post_attention_layernorm.weight", (width,)),
        "ffn_gate.weight": ("mlp.gate_proj.weight", (inner, width)),
        "ffn_up.weight": ("mlp.up_proj.weight", (inner, width)),
        "ffn_down.weight": ("mlp.down_proj.weight", (width, inner)),
    }
    if config.qkv_bias:
        for part, rows in (("q", queries), ("k", keys), ("v", keys)):
            layer[f"attn_{part}.bias"] = (f"self_attn.{part}_proj.bias", (rows,))
    if config.qk_norm:
        for part in "qk":
            norm = f"self_attn.{part}_norm.weight"
            layer[f"attn_{part}_norm.weight"] = (norm, (config.head_size,))
    return layer
