"""A checkpoint that tells how much of it was read."""

from __future__ import annotations

from phirt.build.checkpoint import Checkpoint, CheckpointTensor
from phirt.models.decoder_config import DecoderConfig
from phirt.types import Progress, ProgressCallback

__all__ = ["WatchedCheckpoint"]


class WatchedCheckpoint:
    """A `Checkpoint` that reports every tensor that is taken from it.

    Args:
        checkpoint: Where the tensors are.
        progress: Called for every tensor, or None.
    """

    def __init__(self, checkpoint: Checkpoint, progress: ProgressCallback | None) -> None:
        self._checkpoint = checkpoint
        self._progress = progress
        self._names = list(checkpoint.names())
        self._taken: set[str] = set()

    @property
    def config(self) -> DecoderConfig:
        """Shape and constants."""
        return self._checkpoint.config

    def names(self) -> list[str]:
        """Names of all tensors."""
        return self._names

    def tensor(self, name: str) -> CheckpointTensor:
        """One tensor."""
        self._taken.add(name)
        if self._progress is not None:
            self._progress(Progress("convert", len(self._taken), len(self._names), "tensors"))
        return self._checkpoint.tensor(name)
