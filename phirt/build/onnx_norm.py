"""RMS norms as nodes (Zhang and Sennrich 2019)."""

from __future__ import annotations

import numpy as np

from phirt.build.checkpoint import Checkpoint
from phirt.build.onnx_graph import GraphBuilder
from phirt.types import FloatArray

__all__ = ["NormWriter"]


class NormWriter:
    """Writes RMS norms; what Gemma adds to their weights is added here, once and for all.

    Args:
        graph: Receives nodes and weights.
        checkpoint: The weights.
    """

    def __init__(self, graph: GraphBuilder, checkpoint: Checkpoint) -> None:
        self._graph = graph
        self._checkpoint = checkpoint
        self._epsilon = checkpoint.config.rms_norm_eps
        self._offset = np.float32(checkpoint.config.norm_offset)

    def norm(self, x: str, tensor: str, *, name: str) -> str:
        """Normalize the last axis of ``x``; ``tensor`` names the weight."""
        return self._graph.node(
            "SimplifiedLayerNormalization",
            [x, self._weight(tensor)],
            name=name,
            epsilon=self._epsilon,
            axis=-1,
            stash_type=1,
        )

    def add_and_norm(self, residual: str, x: str, tensor: str, *, name: str) -> tuple[str, str]:
        """The norm of ``residual + x``, and that sum."""
        outputs = [f"{name}/output", "", "", f"{name}/residual"]
        self._graph.contrib(
            "SkipSimplifiedLayerNormalization",
            [residual, x, self._weight(tensor)],
            outputs,
            name=name,
            epsilon=self._epsilon,
        )
        return outputs[0], outputs[3]

    def _weight(self, tensor: str) -> str:
        weight: FloatArray = self._checkpoint.tensor(tensor).float32()
        return self._graph.floats(tensor, weight + self._offset if self._offset else weight)
