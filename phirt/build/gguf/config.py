"""A decoder's shape and constants, from GGUF metadata."""

from __future__ import annotations

import numpy as np
from gguf.constants import TokenType

from phirt.build.gguf.fields import MAX_CONTEXT, MAX_WIDTH, ArchitectureFields
from phirt.build.gguf.file import GgufFile
from phirt.build.gguf.rotary import read_local_rotary, read_rotary
from phirt.errors import ModelFormatError, UnsupportedModelError
from phirt.models.decoder_config import DecoderConfig

__all__ = ["read_config"]

# What general.architecture may be, and what Hugging Face calls it. Llama 2 and 3, Mistral and
# SmolLM2 are all "llama"; Qwen 2.5 is "qwen2", Phi-3.5 and Phi-4-mini are "phi3".
_ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "phi3": "phi3",
    "gemma3": "gemma3_text",
}

# What llama.cpp takes for granted of gemma3 (src/models/gemma3.cpp): one layer in six attends
# to everything, and the largest model, known by its layers, scales scores by its width.
_GEMMA3_PATTERN = 6
_GEMMA3_27B_LAYERS = 62

# Texts under which llama.cpp recognizes tokens that end a generation where the metadata does
# not name them (llama-vocab.cpp, the search for end-of-generation tokens). Only those that
# mark the end of a turn or text; here they must be control tokens as well.
_END_TEXTS = frozenset(
    {
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end_of_text|>",
        "<|im_end|>",
        "<|endoftext|>",
        "<|end|>",
        "<end_of_turn>",
        "<EOT>",
        "_<EOT>",
        "<｜end▁of▁sentence｜>",  # noqa: RUF001 - the token is spelled with full-width bars
    }
)


def read_config(file: GgufFile, *, tokens: list[str]) -> DecoderConfig:
    """The decoder's configuration.

    Args:
        file: The file.
        tokens: Its vocabulary.

    Raises:
        UnsupportedModelError: The architecture, or a feature that it uses, is not supported.
        ModelFormatError: A number is missing or cannot be right.
    """
    architecture = file.string("general.architecture")
    if architecture is None:
        raise ModelFormatError(f"{file.path.name}: general.architecture is missing.")
    if architecture not in _ARCHITECTURES:
        raise UnsupportedModelError(
            f"{file.path.name}: architecture {architecture!r:.80} is not supported; "
            f"phirt converts {', '.join(_ARCHITECTURES)}."
        )
    fields = ArchitectureFields(file, architecture)
    _refuse_unsupported(fields)
    gemma3 = architecture == "gemma3"
    hidden_size = fields.size("embedding_length", most=MAX_WIDTH)
    num_heads = fields.size("attention.head_count", most=MAX_WIDTH)
    num_kv_heads = fields.size("attention.head_count_kv", most=MAX_WIDTH, default=num_heads)
    head_size = _head_size(fields, hidden_size, num_heads)
    context_length = fields.size("context_length", most=MAX_CONTEXT)
    if num_heads % num_kv_heads:
        fields.fail(f"{num_heads} query heads cannot share {num_kv_heads} key and value heads")
    if not tokens:
        fields.fail("tokenizer.ggml.tokens is missing or empty")
    num_layers = fields.size("block_count", most=len(file.header.tensors))
    windows = _windows(fields, context_length, num_layers)
    return DecoderConfig(
        architecture=_ARCHITECTURES[architecture],
        vocab_size=len(tokens),
        hidden_size=hidden_size,
        intermediate_size=fields.size("feed_forward_length", most=MAX_WIDTH),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        context_length=context_length,
        rms_norm_eps=fields.positive("attention.layer_norm_rms_epsilon"),
        rope=read_rotary(fields, head_size=head_size, context_length=context_length),
        local_rope=read_local_rotary(fields, head_size=head_size) if gemma3 and windows else None,
        tie_word_embeddings="output.weight" not in file.header.tensors,
        windows=windows,
        activation="gelu_tanh" if gemma3 else "silu",
        qkv_bias=architecture == "qwen2",
        qk_norm=architecture in {"qwen3", "gemma3"},
        norm_offset=1.0 if gemma3 else 0.0,
        sandwich_norms=gemma3,
        embedding_scale=hidden_size**0.5 if gemma3 else 1.0,
        attention_scale=(
            (hidden_size // num_heads) ** -0.5
            if gemma3 and num_layers == _GEMMA3_27B_LAYERS
            else None
        ),
        bos_token_id=file.token_id("bos", vocab_size=len(tokens)),
        eos_token_ids=_eos_token_ids(file, tokens),
        pad_token_id=file.token_id("padding", vocab_size=len(tokens)),
    )


def _refuse_unsupported(fields: ArchitectureFields) -> None:
    """Refuse what would silently compute something else if it were overlooked."""
    file = fields.file
    if experts := file.integer(fields.key("expert_count")):
        fields.refuse(f"a mixture of {experts:,} experts")
    if file.flag(fields.key("attention.causal")) is False:
        fields.refuse("attention that is not causal")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if cap := file.real(fields.key(name)):
            fields.refuse(f"{fields.key(name)} ({cap:g})")
    if (parts := file.integer("split.count") or 1) > 1:
        fields.refuse(f"a model split into {parts:,} files (llama-gguf-split --merge joins them)")


def _head_size(fields: ArchitectureFields, hidden_size: int, num_heads: int) -> int:
    """Width of one head, the same for queries, keys and values."""
    key_length = fields.file.integer(fields.key("attention.key_length"))
    if key_length is None and hidden_size % num_heads:
        fields.fail(f"a width of {hidden_size:,} does not divide into {num_heads:,} heads")
    head_size = fields.size(
        "attention.key_length", most=MAX_WIDTH, default=hidden_size // num_heads
    )
    if head_size % 2:
        fields.fail(f"heads of {head_size:,} do not divide into rotary pairs")
    value_size = fields.size("attention.value_length", most=MAX_WIDTH, default=head_size)
    if value_size != head_size:
        fields.refuse(f"keys of {head_size:,} with values of {value_size:,}")
    return head_size


def _windows(
    fields: ArchitectureFields, context_length: int, num_layers: int
) -> tuple[int | None, ...]:
    """The sliding window of every layer; empty where every layer attends to everything."""
    key = fields.key("attention.sliding_window")
    window = fields.file.integer(key)
    if window is None and fields.architecture == "phi3":
        # llama.cpp's converter writes it since August 2024, and 0 for none. llama.cpp itself
        # has switched the window of phi3 off, and says that results may suffer.
        fields.refuse(f"a phi3 without {key}, which may or may not have a window,")
    window = window or 0
    if window < 0:
        fields.fail(f"{key} is {window:,}")
    if fields.architecture == "gemma3":
        return _gemma3_windows(fields, window, num_layers)
    if not 0 < window < context_length:
        return ()
    if fields.architecture not in {"llama", "phi3"}:
        fields.refuse(f"a window in {fields.architecture}, whose files do not say of which layers")
    return (window,) * num_layers


def _gemma3_windows(
    fields: ArchitectureFields, window: int, num_layers: int
) -> tuple[int | None, ...]:
    # However wide: layers with a window have a rotary embedding of their own.
    if not window:
        return ()
    window = fields.size("attention.sliding_window", most=MAX_CONTEXT)
    pattern = fields.size(
        "attention.sliding_window_pattern", most=MAX_WIDTH, default=_GEMMA3_PATTERN
    )
    return tuple(None if layer % pattern == 0 else window for layer in range(1, num_layers + 1))


def _eos_token_ids(file: GgufFile, tokens: list[str]) -> tuple[int, ...]:
    """Every id that ends a generation: those named so, and those whose text says so."""
    roles = ("eos", "eot", "eom")
    named = (file.token_id(role, vocab_size=len(tokens)) for role in roles)
    ids = {token_id for token_id in named if token_id is not None}
    types = file.numbers("tokenizer.ggml.token_type")
    if types is not None and len(types) == len(tokens):
        control = np.flatnonzero(types == TokenType.CONTROL)
        ids.update(int(index) for index in control if tokens[index] in _END_TEXTS)
    return tuple(sorted(ids))
