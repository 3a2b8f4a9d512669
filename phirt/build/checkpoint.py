"""What a converter reads: a decoder's configuration and its tensors, one at a time.

A reader (of GGUF, of safetensors) yields every checkpoint in one convention, that of Hugging Face
`transformers`: its tensor names (``model.layers.0.self_attn.q_proj.weight``), weights of
shape (out_features, in_features), and rotary pairs split in halves. Projections that a file
keeps fused (Phi-3's ``qkv_proj``, ``gate_up_proj``) appear as the separate ones, which are
rows of them. A reader whose file
keeps another order (GGUF permutes the rows of q and k for interleaved rotary pairs)
undoes it, on the quantized rows themselves, which is exact.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from phirt.models.decoder_config import DecoderConfig
from phirt.types import FloatArray

__all__ = ["Checkpoint", "CheckpointTensor"]


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
        """GGML's name of the encoding: ``"F32"``, ``"BF16"``, ``"Q4_1"``, ``"Q6_K"``."""

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
