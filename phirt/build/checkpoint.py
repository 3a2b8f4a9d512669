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

from collections.abc import Iterable, Mapping
from typing import Generic, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from phirt.errors import ModelFormatError
from phirt.models.decoder_config import DecoderConfig
from phirt.types import FloatArray

__all__ = ["Checkpoint", "CheckpointTensor", "OpenCheckpoint"]


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

    def rows(self, start: int, stop: int) -> CheckpointTensor:
        """Rows ``start`` to ``stop - 1`` of a matrix, as a tensor of the same name."""


class Checkpoint(Protocol):
    """A decoder's weights on disk."""

    @property
    def config(self) -> DecoderConfig:
        """Shape and constants."""

    def names(self) -> Iterable[str]:
        """Names of all tensors."""

    def tensor(self, name: str) -> CheckpointTensor:
        """One tensor. Raises `ModelFormatError` if the checkpoint has no such tensor."""


class _Closable(Protocol):
    def close(self) -> None:
        """Close it. Calling it again does nothing."""


_Tensor = TypeVar("_Tensor", bound=CheckpointTensor)


class OpenCheckpoint(Generic[_Tensor]):
    """A `Checkpoint` whose tensors were found, in files that stay open until it is closed.

    Close it, or use it in a ``with`` statement.

    Args:
        source: What to call it in a message.
        files: What its tensors read from.
        config: Shape and constants of the decoder.
        tensors: Its tensors by their names in Hugging Face's convention, embedding first.
    """

    def __init__(
        self, source: str, files: _Closable, config: DecoderConfig, tensors: Mapping[str, _Tensor]
    ) -> None:
        self._source = source
        self._files = files
        self._config = config
        self._tensors = tensors

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. Calling it again does nothing."""
        self._files.close()

    @property
    def config(self) -> DecoderConfig:
        """Shape and constants of the decoder."""
        return self._config

    def names(self) -> list[str]:
        """Names of all tensors in Hugging Face's convention, embedding first."""
        return list(self._tensors)

    def tensor(self, name: str) -> _Tensor:
        """One tensor.

        Raises:
            ModelFormatError: The checkpoint has no tensor of that name.
        """
        try:
            return self._tensors[name]
        except KeyError:
            raise ModelFormatError(f"{self._source} has no tensor {name!r}.") from None
