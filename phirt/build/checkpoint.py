"""What a converter reads: a decoder's configuration and its tensors, one at a time.

A reader (GGUF now) yields every checkpoint in one convention, that of Hugging Face
`transformers`: its tensor names (``model.layers.0.self_attn.q_proj.weight``), weights of
shape (out_features, in_features), and rotary pairs split in halves. A reader whose file
keeps another order (GGUF permutes the rows of q and k for interleaved rotary pairs)
undoes it, on the quantized rows themselves, which is exact.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from phirt.types import FloatArray

__all__ = ["Checkpoint", "CheckpointTensor", "DecoderConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """Shape and constants of a dense decoder.

    Attributes:
        architecture: Name as Hugging Face's ``model_type``: ``"llama"``.
        vocab_size: Rows of the embedding.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the gated MLP.
        num_layers: Decoder blocks.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; divides ``num_heads``.
        head_size: Width of one head.
        context_length: Longest sequence that the model was made for, in tokens.
        rms_norm_eps: Epsilon of every RMS norm.
        rope_theta: Base of the rotary frequencies.
        rope_dim: Leading dimensions of a head that rotate; at most ``head_size``.
        rope_factors: Divisors of the rotary frequencies, shape (rope_dim / 2,), as Llama 3
            scales them, or None.
        tie_word_embeddings: Whether the LM head is the embedding.
        window: Sliding attention window in tokens, or None for full attention.
        bos_token_id: Beginning-of-sequence id, or None.
        eos_token_ids: Every id that ends a generation.
        pad_token_id: Padding id, or None.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    context_length: int
    rms_norm_eps: float
    rope_theta: float
    rope_dim: int
    rope_factors: FloatArray | None = field(default=None, compare=False)
    tie_word_embeddings: bool = False
    window: int | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None


class CheckpointTensor(Protocol):
    """One tensor, still in its file's own encoding."""

    @property
    def name(self) -> str:
        """Name in Hugging Face's convention."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in Hugging Face's convention, (out_features, in_features) for weights."""

    @property
    def encoding(self) -> str:
        """GGML's name of the encoding: ``"F32"``, ``"Q4_1"``, ``"Q6_K"``."""

    def blocks(self) -> NDArray[np.uint8]:
        """The encoded rows: shape (rows, bytes per row), read now, from the file."""

    def float32(self) -> FloatArray:
        """The decoded values, of shape `shape`."""


class Checkpoint(Protocol):
    """A decoder's weights on disk."""

    @property
    def config(self) -> DecoderConfig:
        """Shape and constants."""

    def names(self) -> Iterable[str]:
        """Names of all tensors."""

    def tensor(self, name: str) -> CheckpointTensor:
        """One tensor. Raises `ModelFormatError` if the checkpoint has no such tensor."""
