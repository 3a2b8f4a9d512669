"""The fields of a config.json, with what `transformers` 5.23 takes for those left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from phirt.errors import ModelFormatError, UnsupportedModelError
from phirt.models.safe_json import JsonFields

__all__ = [
    "DECODER_ARCHITECTURES",
    "FULL",
    "MAX_CONTEXT",
    "MAX_HEADS",
    "MAX_HEAD_SIZE",
    "MAX_LAYERS",
    "MAX_VOCAB",
    "MAX_WIDTH",
    "SLIDING",
    "DecoderFields",
    "layer_windows",
]

DECODER_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3_text")
"""Values of ``model_type`` that `read_decoder_config` takes."""

# Budgets: several times the largest decoder known, so that a damaged or hostile number is
# refused here and not by an allocation.
MAX_LAYERS = 2_048
MAX_HEADS = 4_096
MAX_HEAD_SIZE = 8_192
MAX_WIDTH = 1 << 20
MAX_VOCAB = 1 << 24
MAX_CONTEXT = 1 << 27

# What `transformers` takes for a field that is absent; null is not absent. Gemma 3 is
# published with half of its fields left out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"bos_token_id": 1, "eos_token_id": 2},
    "mistral": {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {
        "head_dim": 128,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "phi3": {
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "pad_token_id": 32000,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    "gemma3_text": {
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131_072,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
    },
}
_DEFAULT_EPS = 1e-6

# Values of ``layer_types``.
FULL, SLIDING = "full_attention", "sliding_attention"


class DecoderFields:
    """A decoder's fields, with the defaults of its architecture."""

    def __init__(self, part: Mapping[str, Any], *, source: str) -> None:
        architecture = part.get("model_type")
        defaults = _DEFAULTS.get(architecture, {}) if isinstance(architecture, str) else {}
        self.data: dict[str, Any] = {**defaults, **part}
        self.fields = JsonFields(self.data, source=source)
        self.source = source

    def size(self, name: str, *, maximum: int) -> int:
        """A positive integer."""
        return self.fields.integer(name, minimum=1, maximum=maximum)

    def first(self, names: tuple[str, ...], *, maximum: int) -> int:
        """The first of several fields that is there; the first item of a list per layer."""
        found = self.optional_first(names, maximum=maximum)
        if found is None:
            raise UnsupportedModelError(
                f"{self.source} has none of the fields {', '.join(names)}: it is not of a "
                "decoder that phirt can run."
            )
        return found

    def optional_first(self, names: tuple[str, ...], *, maximum: int) -> int | None:
        """As `first`, or None."""
        for name in names:
            found = self.fields.integers(name, minimum=1, maximum=maximum)
            if found:
                return found[0]
        return None

    def token_id(self, name: str, vocab_size: int) -> int | None:
        """A token id, or None for none, and for one that the embedding does not have.

        Published models have paddings of -1 and just beyond their vocabulary, which no
        text ever yields.
        """
        value = self.fields.optional_integer(name, minimum=-(1 << 31), maximum=1 << 31)
        return value if value is not None and 0 <= value < vocab_size else None

    def window(self) -> int | None:
        """``sliding_window``, whether or not any layer uses it."""
        return self.fields.optional_integer("sliding_window", minimum=1, maximum=MAX_CONTEXT)

    def epsilon(self) -> float:
        """Epsilon of the RMS norms."""
        value = self.fields.optional_number("rms_norm_eps", minimum=1e-30, maximum=1.0)
        return _DEFAULT_EPS if value is None else value

    def fail(self, problem: str) -> NoReturn:
        """Raise for numbers that cannot be right."""
        raise ModelFormatError(f"{self.source}: {problem}.")

    def refuse(self, feature: str) -> NoReturn:
        """Raise for a sound model that needs what phirt does not compute."""
        raise UnsupportedModelError(f"{self.source}: phirt does not compute {feature}.")


def layer_windows(reader: DecoderFields, architecture: str) -> tuple[int | None, ...]:
    """The window of each layer; empty where every layer has full attention.

    Args:
        reader: The fields.
        architecture: One of `DECODER_ARCHITECTURES`.

    Raises:
        ModelFormatError: The fields contradict each other.
        UnsupportedModelError: A layer is of another type than full or sliding.
    """
    layers = reader.size("num_hidden_layers", maximum=MAX_LAYERS)
    window = None if architecture == "llama" else reader.window()
    if architecture == "gemma3_text":
        pattern = reader.size("sliding_window_pattern", maximum=MAX_LAYERS)
        sliding = [(layer + 1) % pattern != 0 for layer in range(layers)]
    elif architecture in {"qwen2", "qwen3"}:
        window = window if reader.fields.boolean("use_sliding_window") else None
        first = reader.fields.integer("max_window_layers", minimum=0, maximum=1 << 31)
        sliding = [window is not None and layer >= first for layer in range(layers)]
    else:
        sliding = [window is not None] * layers
    if reader.data.get("layer_types") is not None:
        listed = _layer_types(reader, layers)
        if architecture in {"llama", "mistral", "phi3"} and listed != sliding:
            reader.refuse(f"layer_types in {architecture}, whose layers are all alike")
        sliding = listed
    if any(sliding) and window is None:
        reader.fail("layer_types has layers with a window, and no sliding_window is in use")
    windows = tuple(window if slides else None for slides in sliding)
    # Gemma 3's layers with a window have another rotary embedding, however wide it is.
    return windows if architecture == "gemma3_text" else _without_idle(windows, reader)


def _without_idle(windows: tuple[int | None, ...], reader: DecoderFields) -> tuple[int | None, ...]:
    """Empty where no window is narrower than the context."""
    context = reader.size("max_position_embeddings", maximum=MAX_CONTEXT)
    return windows if any(w is not None and w < context for w in windows) else ()


def _layer_types(reader: DecoderFields, layers: int) -> list[bool]:
    """Per layer, whether ``layer_types`` gives it a window."""
    kinds = reader.data["layer_types"]
    if not isinstance(kinds, list) or len(kinds) != layers:
        reader.fail(f"layer_types must list a type for each of {layers:,} layers")
    unknown = [kind for kind in kinds if kind not in (FULL, SLIDING)]
    if unknown:
        reader.refuse(f"layers of type {unknown[0]!s:.80}")
    return [kind == SLIDING for kind in kinds]
