"""A GGUF file as a `Checkpoint`: Hugging Face's names, shapes and order of rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from phirt.build.checkpoint import OpenCheckpoint
from phirt.build.gguf.config import read_config
from phirt.build.gguf.file import GgufFile
from phirt.build.gguf.header import TensorInfo
from phirt.build.gguf.rotary import ROPE_TENSORS
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


@dataclass(frozen=True, slots=True)
class _Stored:
    """What a tensor of the file is, and must look like.

    Attributes:
        shape: Its shape.
        parts: Names and rows of what it holds: itself, or the projections that phi3 keeps in
            one.
        heads: Heads whose rows llama.cpp's converter reorders, or 0.
        added: What its converter adds to every value.
    """

    shape: tuple[int, ...]
    parts: tuple[tuple[str, int], ...]
    heads: int = 0
    added: float = 0.0


def _collect_tensors(file: GgufFile, config: DecoderConfig) -> dict[str, GgufTensor]:
    """Find every tensor that the configuration calls for, and nothing else."""
    left = {name: info for name, info in file.header.tensors.items() if name not in ROPE_TENSORS}
    tensors: dict[str, GgufTensor] = {}
    for gguf_name, stored in _expected(config).items():
        info = left.pop(gguf_name, None)
        if info is None:
            raise ModelFormatError(
                f"{file.path.name}: tensor {gguf_name!r} is missing. The file is not a whole "
                f"{config.architecture} model; fetch it again or use another."
            )
        _check(file, info, stored)
        order = (
            rotary_row_order(heads=stored.heads, head_size=config.head_size)
            if stored.heads
            else None
        )
        start = 0
        for name, rows in stored.parts:
            span = (start, start + rows) if len(stored.shape) > 1 else None
            tensors[name] = GgufTensor(
                file, info, name=name, row_order=order, span=span, added=stored.added
            )
            start += rows
    if left:
        unknown = ", ".join(repr(name) for name in sorted(left)[:3])
        raise UnsupportedModelError(
            f"{file.path.name}: {len(left)} tensors are not part of a plain {config.architecture} "
            f"decoder and would be ignored, such as {unknown}. phirt does not support this variant."
        )
    return tensors


def _check(file: GgufFile, info: TensorInfo, stored: _Stored) -> None:
    if info.shape != stored.shape:
        raise ModelFormatError(
            f"{file.path.name}: tensor {info.name!r} has shape {info.shape}, and the "
            f"metadata calls for {stored.shape}. Use another file."
        )
    # What an addition is taken back from is written as floats, whatever the file's encoding.
    known = ("F32",) if stored.added else ENCODINGS
    if info.encoding not in known:
        raise UnsupportedModelError(
            f"{file.path.name}: tensor {info.name!r} is stored as {info.encoding}; phirt "
            f"reads {', '.join(known)}. Use a file of one of these."
        )


def _expected(config: DecoderConfig) -> dict[str, _Stored]:
    """Every tensor that the file must hold, by llama.cpp's name."""
    vocabulary = (config.vocab_size, config.hidden_size)
    table = {"token_embd.weight": _whole("model.embed_tokens.weight", *vocabulary)}
    for index in range(config.num_layers):
        scope = f"model.layers.{index}"
        layer = _expected_norms(config, scope) | _expected_attention(config, f"{scope}.self_attn")
        layer |= _expected_mlp(config, scope)
        table |= {f"blk.{index}.{name}": stored for name, stored in layer.items()}
    table["output_norm.weight"] = _norm(config, "model.norm")
    if not config.tie_word_embeddings:
        table["output.weight"] = _whole("lm_head.weight", *vocabulary)
    return table


def _expected_attention(config: DecoderConfig, scope: str) -> dict[str, _Stored]:
    width = config.hidden_size
    queries, keys = (n * config.head_size for n in (config.num_heads, config.num_kv_heads))
    rows = {"q": queries, "k": keys, "v": keys}
    output = _whole(f"{scope}.o_proj.weight", width, queries)
    if config.architecture == "phi3":
        parts = {f"{scope}.{part}_proj.weight": count for part, count in rows.items()}
        return {"attn_qkv.weight": _fused(parts, width), "attn_output.weight": output}
    # llama.cpp's converter reorders the rows of q and k in llama alone.
    heads = {"q": config.num_heads, "k": config.num_kv_heads, "v": 0}
    rotates_pairs = config.architecture == "llama"
    table: dict[str, _Stored] = {}
    for part, count in rows.items():
        projection = f"{scope}.{part}_proj"
        table[f"attn_{part}.weight"] = _Stored(
            (count, width),
            ((f"{projection}.weight", count),),
            heads=heads[part] if rotates_pairs else 0,
        )
        if config.qkv_bias:
            table[f"attn_{part}.bias"] = _whole(f"{projection}.bias", count)
    if config.qk_norm:
        for part in "qk":
            norm = _norm(config, f"{scope}.{part}_norm", width=config.head_size)
            table[f"attn_{part}_norm.weight"] = norm
    return table | {"attn_output.weight": output}


def _expected_mlp(config: DecoderConfig, scope: str) -> dict[str, _Stored]:
    width, inner = config.hidden_size, config.intermediate_size
    down = _whole(f"{scope}.mlp.down_proj.weight", width, inner)
    gate, up = (f"{scope}.mlp.{part}_proj.weight" for part in ("gate", "up"))
    if config.architecture == "phi3":
        return {"ffn_up.weight": _fused({gate: inner, up: inner}, width), "ffn_down.weight": down}
    return {
        "ffn_gate.weight": _whole(gate, inner, width),
        "ffn_up.weight": _whole(up, inner, width),
        "ffn_down.weight": down,
    }


def _expected_norms(config: DecoderConfig, scope: str) -> dict[str, _Stored]:
    names = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    if config.sandwich_norms:
        names = {
            "attn_norm": "input_layernorm",
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        }
    return {f"{key}.weight": _norm(config, f"{scope}.{name}") for key, name in names.items()}


def _whole(name: str, *shape: int) -> _Stored:
    return _Stored(shape, ((name, shape[0]),))


def _fused(parts: dict[str, int], columns: int) -> _Stored:
    return _Stored((sum(parts.values()), columns), tuple(parts.items()))


def _norm(config: DecoderConfig, name: str, *, width: int | None = None) -> _Stored:
    # The converter adds Gemma's offset to the weights themselves.
    width = width or config.hidden_size
    return _Stored((width,), ((f"{name}.weight", width),), added=config.norm_offset)
