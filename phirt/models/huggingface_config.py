"""config.json: what Hugging Face's libraries say about a decoder.

It is read in two ways. `read_config_facts` takes from any causal language model the few
facts that running it needs, since the runtime knows how to compute it. `read_decoder_config`
says how to compute it, for six dense architectures, and refuses whatever would compute
something else if it were overlooked. Where a field is absent, the default is that of
`transformers` 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from phirt.errors import ModelFormatError, UnsupportedModelError
from phirt.models.decoder_config import DecoderConfig
from phirt.models.huggingface_fields import (
    DECODER_ARCHITECTURES,
    MAX_CONTEXT,
    MAX_HEAD_SIZE,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_VOCAB,
    MAX_WIDTH,
    SLIDING,
    DecoderFields,
    layer_windows,
)
from phirt.models.huggingface_rope import longrope_boundary, read_local_rotary, read_rotary
from phirt.models.safe_json import JsonFields, read_json

__all__ = [
    "CONFIG_NAME",
    "DECODER_ARCHITECTURES",
    "ConfigFacts",
    "config_facts",
    "decoder_config",
    "read_config_facts",
    "read_decoder_config",
]

CONFIG_NAME = "config.json"

_MAX_CONFIG_BYTES = 4 << 20

# Where a model of several parts keeps its decoder's fields.
_TEXT_PARTS = ("text_config", "llm_config", "language_config")

# The same facts under the names that older architectures give them.
_VOCAB = ("vocab_size",)
_CONTEXT = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "n_ctx",
)
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "attn_config.kv_n_heads")
_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")

# Fields that change what is computed wherever they are set.
_REFUSED = (
    "add_cross_attention",
    "alibi",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "is_encoder_decoder",
    "mlp_bias",
    "model_file",
    "n_routed_experts",
    "num_experts",
    "num_local_experts",
    "per_layer_config",
    "quantization",
    "quantization_config",
    "text_config",
    "use_bidirectional_attention",
)
_ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFacts:
    """What running a causal language model needs to know about it.

    Attributes:
        architecture: ``model_type``, such as ``"llama"``.
        vocab_size: Logits per position.
        context_length: Longest sequence that the model was made for, in tokens.
        eos_token_ids: Every id that ends a generation; may be empty.
        bos_token_id: Beginning-of-sequence id, or None.
        pad_token_id: Padding id, or None.
        num_layers: Decoder blocks.
        num_kv_heads: Key and value heads (of the first block, where blocks differ).
        head_size: Width of one head (likewise).
        rope_boundary: Longest sequence with LongRoPE's short factors, or None.
        window: Narrowest attention window of any layer in tokens, or None where every
            layer attends to the whole context.
    """

    architecture: str
    vocab_size: int
    context_length: int
    eos_token_ids: frozenset[int] = frozenset()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    num_layers: int
    num_kv_heads: int
    head_size: int
    rope_boundary: int | None = None
    window: int | None = None


def read_config_facts(path: Path) -> ConfigFacts:
    """Read the facts about any causal language model.

    Args:
        path: The config.json.

    Raises:
        ModelNotFoundError: There is no such file.
        ModelFormatError: It is damaged, or a number is beyond what any decoder needs.
        UnsupportedModelError: It does not say what a decoder with a KV cache is made of.
    """
    return config_facts(read_json(path, max_bytes=_MAX_CONFIG_BYTES), source=str(path))


def config_facts(document: Mapping[str, Any], *, source: str) -> ConfigFacts:
    """`read_config_facts` of a document that is read already.

    Args:
        document: The config.json.
        source: What to call it in an error: the file's path.
    """
    whole = JsonFields(document, source=source)
    part: Mapping[str, Any] = document
    for name in _TEXT_PARTS:
        part = whole.mapping(name) or part
    architecture = whole.optional_string("model_type", max_length=100)
    if architecture is None:
        raise ModelFormatError(f"{source} lacks the field 'model_type'.")
    reader = DecoderFields(part, source=source)
    fields = reader.fields
    vocab_size = reader.first(_VOCAB, maximum=MAX_VOCAB)
    context_length = reader.first(_CONTEXT, maximum=MAX_CONTEXT)
    num_heads = reader.first(_HEADS, maximum=MAX_HEADS)
    head_size = fields.optional_integer("head_dim", minimum=1, maximum=MAX_HEAD_SIZE)
    if head_size is None:
        head_size = reader.first(_WIDTHS, maximum=MAX_WIDTH) // num_heads
    ids: set[int] = set()
    for each in (whole, fields):
        ids.update(each.integers("eos_token_id", minimum=0, maximum=vocab_size - 1))
    return ConfigFacts(
        architecture=architecture,
        vocab_size=vocab_size,
        context_length=context_length,
        eos_token_ids=frozenset(ids),
        bos_token_id=reader.token_id("bos_token_id", vocab_size),
        pad_token_id=reader.token_id("pad_token_id", vocab_size),
        num_layers=reader.first(_LAYERS, maximum=MAX_LAYERS),
        num_kv_heads=_num_kv_heads(reader, num_heads),
        head_size=head_size,
        rope_boundary=longrope_boundary(reader.data, source=source),
        window=_narrowest_window(reader, context_length),
    )


def read_decoder_config(path: Path) -> DecoderConfig:
    """Read how to compute a dense decoder.

    Args:
        path: The config.json.

    Raises:
        ModelNotFoundError: There is no such file.
        ModelFormatError: It is damaged, or numbers in it contradict each other.
        UnsupportedModelError: It is none of `DECODER_ARCHITECTURES`, or asks for something
            that phirt does not compute.
    """
    return decoder_config(read_json(path, max_bytes=_MAX_CONFIG_BYTES), source=str(path))


def decoder_config(document: Mapping[str, Any], *, source: str) -> DecoderConfig:
    """`read_decoder_config` of a document that is read already.

    Args:
        document: The config.json.
        source: What to call it in an error: the file's path.
    """
    architecture = JsonFields(document, source=source).string("model_type", max_length=100)
    if architecture not in DECODER_ARCHITECTURES:
        raise UnsupportedModelError(
            f"{source}: phirt does not compute the architecture {architecture!r:.80}, only "
            f"{', '.join(DECODER_ARCHITECTURES)}."
        )
    reader = DecoderFields(document, source=source)
    _refuse_unknown(reader, architecture)
    gemma3 = architecture == "gemma3_text"
    hidden_size = reader.size("hidden_size", maximum=MAX_WIDTH)
    num_heads = reader.size("num_attention_heads", maximum=MAX_HEADS)
    head_size = _head_size(reader, hidden_size, num_heads)
    windows = layer_windows(reader, architecture)
    vocab_size = reader.size("vocab_size", maximum=MAX_VOCAB)
    has_biases = architecture != "qwen2" and reader.fields.boolean("attention_bias")
    fields = reader.fields
    eos = fields.integers("eos_token_id", minimum=0, maximum=vocab_size - 1)
    return DecoderConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=reader.size("intermediate_size", maximum=MAX_WIDTH),
        num_layers=reader.size("num_hidden_layers", maximum=MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=_dividing_kv_heads(reader, num_heads),
        head_size=head_size,
        context_length=reader.size("max_position_embeddings", maximum=MAX_CONTEXT),
        rms_norm_eps=reader.epsilon(),
        rope=read_rotary(reader.data, head_size=head_size, source=source),
        local_rope=(
            read_local_rotary(reader.data, head_size=head_size, source=source) if gemma3 else None
        ),
        tie_word_embeddings=fields.boolean("tie_word_embeddings"),
        windows=windows,
        activation="gelu_tanh" if gemma3 else "silu",
        qkv_bias=architecture == "qwen2" or has_biases,
        output_bias=has_biases,
        qk_norm=architecture in {"qwen3", "gemma3_text"},
        norm_offset=1.0 if gemma3 else 0.0,
        sandwich_norms=gemma3,
        embedding_scale=hidden_size**0.5 if gemma3 else 1.0,
        attention_scale=_attention_scale(reader, head_size) if gemma3 else None,
        bos_token_id=reader.token_id("bos_token_id", vocab_size),
        eos_token_ids=tuple(dict.fromkeys(eos)),
        pad_token_id=reader.token_id("pad_token_id", vocab_size),
    )


def _num_kv_heads(reader: DecoderFields, num_heads: int) -> int:
    found = reader.optional_first(_KV_HEADS, maximum=MAX_HEADS)
    if found is not None:
        return found
    # Falcon and GPT-BigCode say it with a flag; Falcon's newer blocks ignore the flag.
    one = reader.data.get("multi_query") is True and not reader.data.get("new_decoder_architecture")
    return 1 if one else num_heads


def _narrowest_window(reader: DecoderFields, context_length: int) -> int | None:
    """The narrowest window that is narrower than the context, of any architecture."""
    architecture = reader.data.get("model_type")
    if architecture in DECODER_ARCHITECTURES:
        windows = layer_windows(reader, str(architecture))
    else:
        kinds = reader.data.get("layer_types")
        full = isinstance(kinds, list) and bool(kinds) and SLIDING not in kinds
        unused = full or reader.data.get("use_sliding_window") is False
        windows = () if unused else (reader.window(),)
    return min((w for w in windows if w is not None and w < context_length), default=None)


def _refuse_unknown(reader: DecoderFields, architecture: str) -> None:
    """Refuse what would silently compute something else if it were overlooked."""
    for name in _REFUSED:
        value = reader.data.get(name)
        if value:
            reader.refuse(f"{name} = {value!s:.60}")
    if architecture in {"mistral", "phi3"} and reader.fields.boolean("attention_bias"):
        reader.refuse(f"biases in the attention of {architecture}")
    gemma3 = architecture == "gemma3_text"
    name = "hidden_activation" if gemma3 else "hidden_act"
    activation = reader.fields.optional_string(name, max_length=100) or "silu"
    if _ACTIVATIONS.get(activation) != ("gelu_tanh" if gemma3 else "silu"):
        reader.refuse(f"the activation {activation!r} in {architecture}")
    kinds = reader.data.get("architectures")
    if isinstance(kinds, list) and kinds and not any(str(k).endswith("ForCausalLM") for k in kinds):
        reader.refuse(f"{kinds[0]!s:.80}, which is not a causal language model")


def _head_size(reader: DecoderFields, hidden_size: int, num_heads: int) -> int:
    head_size = reader.fields.optional_integer("head_dim", minimum=1, maximum=MAX_HEAD_SIZE)
    if head_size is None:
        if hidden_size % num_heads:
            reader.fail(f"a width of {hidden_size:,} does not divide into {num_heads:,} heads")
        head_size = hidden_size // num_heads
    if head_size % 2:
        reader.fail(f"heads of {head_size:,} do not divide into rotary pairs")
    return head_size


def _dividing_kv_heads(reader: DecoderFields, num_heads: int) -> int:
    name = "num_key_value_heads"
    found = reader.fields.optional_integer(name, minimum=1, maximum=MAX_HEADS) or num_heads
    if num_heads % found:
        reader.fail(f"{num_heads} query heads cannot share {found} key and value heads")
    return found


def _attention_scale(reader: DecoderFields, head_size: int) -> float | None:
    scalar = reader.fields.number("query_pre_attn_scalar", minimum=1e-6, maximum=1e12)
    return None if scalar == head_size else scalar**-0.5
