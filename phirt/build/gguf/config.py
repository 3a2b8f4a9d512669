"""A decoder's shape and constants, from GGUF metadata."""

from __future__ import annotations

from math import isfinite
from typing import NoReturn

import numpy as np
from gguf.constants import TokenType

from phirt.build.gguf.file import GgufFile
from phirt.build.gguf.header import ArraySpan
from phirt.errors import ModelFormatError, UnsupportedModelError
from phirt.models.decoder_config import DecoderConfig
from phirt.models.rotary import Rotary
from phirt.types import FloatArray

__all__ = ["ROPE_FACTORS", "read_config"]

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""What ``general.architecture`` may be. Llama 2 and 3, Mistral and SmolLM2 are all "llama"; Qwen
2.5 is "qwen2"."""

ROPE_FACTORS = "rope_freqs.weight"
"""The tensor in which Llama 3 files keep the divisors of their rotary frequencies."""

# Budgets: several times what any published dense decoder has. A tensor's bytes bound most
# sizes already; the context is bounded by nothing else, and rotary tables are as long as it.
_MAX_WIDTH = 1 << 20
_MAX_CONTEXT = 1 << 22

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
    reader = _ConfigReader(file, architecture)
    reader.refuse_unsupported()
    hidden_size = reader.size("embedding_length", most=_MAX_WIDTH)
    num_heads = reader.size("attention.head_count", most=_MAX_WIDTH)
    num_kv_heads = reader.size("attention.head_count_kv", most=_MAX_WIDTH, default=num_heads)
    head_size = reader.head_size(hidden_size, num_heads)
    context_length = reader.size("context_length", most=_MAX_CONTEXT)
    if num_heads % num_kv_heads:
        reader.fail(f"{num_heads} query heads cannot share {num_kv_heads} key and value heads")
    if not tokens:
        reader.fail("tokenizer.ggml.tokens is missing or empty")
    num_layers = reader.size("block_count", most=len(file.header.tensors))
    window = reader.window(context_length)
    return DecoderConfig(
        architecture=architecture,
        vocab_size=len(tokens),
        hidden_size=hidden_size,
        intermediate_size=reader.size("feed_forward_length", most=_MAX_WIDTH),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        context_length=context_length,
        rms_norm_eps=reader.positive("attention.layer_norm_rms_epsilon"),
        rope=Rotary(
            theta=reader.positive("rope.freq_base", default=10000.0),
            dim=head_size,
            factors=reader.rope_factors(head_size),
        ),
        tie_word_embeddings="output.weight" not in file.header.tensors,
        windows=() if window is None else (window,) * num_layers,
        qkv_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
        bos_token_id=file.token_id("bos", vocab_size=len(tokens)),
        eos_token_ids=reader.eos_token_ids(tokens),
        pad_token_id=file.token_id("padding", vocab_size=len(tokens)),
    )


class _ConfigReader:
    """Reads the keys of one architecture and checks what they say."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self._file = file
        self._architecture = architecture

    def fail(self, problem: str) -> NoReturn:
        """Raise for a number that cannot be right."""
        raise ModelFormatError(f"{self._file.path.name}: {problem}. Use another file.")

    def refuse(self, feature: str) -> NoReturn:
        """Raise for a sound model that needs what phirt cannot do."""
        raise UnsupportedModelError(f"{self._file.path.name}: {feature} is not supported.")

    def refuse_unsupported(self) -> None:
        """Refuse what would silently compute something else if it were overlooked."""
        if experts := self._file.integer(self._key("expert_count")):
            self.refuse(f"a mixture of {experts:,} experts")
        if self._file.flag(self._key("attention.causal")) is False:
            self.refuse("attention that is not causal")
        if (parts := self._file.integer("split.count") or 1) > 1:
            self.refuse(f"a model split into {parts:,} files (llama-gguf-split --merge joins them)")

    def size(self, name: str, *, most: int, default: int | None = None) -> int:
        """A positive integer of at most ``most``."""
        key = self._key(name)
        if isinstance(self._file.header.metadata.get(key), ArraySpan):
            self.refuse(f"a {key} that differs between layers")
        value = self._file.integer(key)
        if value is None:
            value = default
        if value is None:
            self.fail(f"{key} is missing")
        if not 1 <= value <= most:
            self.fail(f"{key} is {value:,}, and must be from 1 to {most:,}")
        return value

    def positive(self, name: str, *, default: float | None = None) -> float:
        """A positive, finite number."""
        key = self._key(name)
        value = self._file.real(key)
        if value is None:
            value = default
        if value is None:
            self.fail(f"{key} is missing")
        if not (isfinite(value) and value > 0):
            self.fail(f"{key} is {value}, and must be positive and finite")
        return value

    def head_size(self, hidden_size: int, num_heads: int) -> int:
        """Width of one head, the same for queries, keys and values, all of it rotating."""
        if (
            self._file.integer(self._key("attention.key_length")) is None
            and hidden_size % num_heads
        ):
            self.fail(f"a width of {hidden_size:,} does not divide into {num_heads:,} heads")
        head_size = self.size(
            "attention.key_length", most=_MAX_WIDTH, default=hidden_size // num_heads
        )
        if head_size % 2:
            self.fail(f"heads of {head_size:,} do not divide into rotary pairs")
        value_size = self.size("attention.value_length", most=_MAX_WIDTH, default=head_size)
        if value_size != head_size:
            self.refuse(f"keys of {head_size:,} with values of {value_size:,}")
        rope_dim = self.size("rope.dimension_count", most=_MAX_WIDTH, default=head_size)
        if rope_dim != head_size:
            self.refuse(f"rotating {rope_dim:,} of {head_size:,} dimensions of a head")
        return head_size

    def window(self, context_length: int) -> int | None:
        """The sliding window, where it is narrower than the context."""
        window = self._file.integer(self._key("attention.sliding_window")) or 0
        if window < 0:
            self.fail(f"{self._key('attention.sliding_window')} is {window:,}")
        if not 0 < window < context_length:
            return None
        if self._architecture != "llama":
            self.refuse(f"a window in {self._architecture}, whose files do not say of which layers")
        return window

    def rope_factors(self, head_size: int) -> FloatArray | None:
        """Divisors of the rotary frequencies: Llama 3's tensor times the linear factor."""
        scale = self._linear_scale()
        info = self._file.header.tensors.get(ROPE_FACTORS)
        if info is None:
            return None if scale == 1 else np.full(head_size // 2, scale, dtype=np.float32)
        if info.encoding != "F32" or info.shape != (head_size // 2,):
            self.fail(
                f"{ROPE_FACTORS} is {info.encoding} of shape {info.shape}, "
                f"and must be F32 of ({head_size // 2},)"
            )
        factors = self._file.read(info.offset, info.nbytes).view("<f4") * np.float32(scale)
        if not (np.isfinite(factors).all() and (factors > 0).all()):
            self.fail(f"{ROPE_FACTORS} holds a divisor that is not positive and finite")
        return np.asarray(factors, dtype=np.float32)

    def _linear_scale(self) -> float:
        # llama.cpp takes a missing type for linear, and a factor of 0 for no scaling.
        kind = self._file.string(self._key("rope.scaling.type")) or "linear"
        if kind == "none":
            return 1.0
        if kind != "linear":
            self.refuse(f"rotary scaling of type {kind!r:.80}")
        for name in ("rope.scaling.factor", "rope.scale_linear"):
            if self._file.real(self._key(name)):
                return self.positive(name)
        return 1.0

    def eos_token_ids(self, tokens: list[str]) -> tuple[int, ...]:
        """Every id that ends a generation: those named so, and those whose text says so."""
        roles = ("eos", "eot", "eom")
        named = (self._file.token_id(role, vocab_size=len(tokens)) for role in roles)
        ids = {token_id for token_id in named if token_id is not None}
        types = self._file.numbers("tokenizer.ggml.token_type")
        if types is not None and len(types) == len(tokens):
            control = np.flatnonzero(types == TokenType.CONTROL)
            ids.update(int(index) for index in control if tokens[index] in _END_TEXTS)
        return tuple(sorted(ids))

    def _key(self, name: str) -> str:
        return f"{self._architecture}.{name}"
