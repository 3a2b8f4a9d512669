"""Long prompts in float activations, on the weights of a graph that computes in 8-bit ones.

MatMulNBits with ``accuracy_level`` 4 rounds the activations to 8 bits. That is what makes one
token fast; for many at once it is slower than a product in floats on processors without
instructions for 8-bit dot products. With level 1 the kernel expands the weights to floats, once
for a run, and multiplies in floats: a fixed cost, and less for each token. The same file serves
both: what differs is one attribute of each node.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from phirt.backends.onnx_nodes import integer_fields
from phirt.backends.onnxruntime.cache import SharedCache
from phirt.backends.onnxruntime.graph import DecoderGraph

__all__ = ["FloatPrefill", "float_graph"]

_ATTRIBUTE = "accuracy_level"
_INT8, _FLOAT32 = 4, 1


def float_graph(graph: bytes) -> bytes | None:
    """A graph with its 8-bit products made products in floats; None where it has none.

    Args:
        graph: A serialized model whose weights lie in other files.
    """
    data = bytearray(graph)
    found = False
    for field in integer_fields(graph, operator="MatMulNBits", attribute=_ATTRIBUTE):
        if field.value == _INT8:
            # Both are varints of one byte, so that nothing else moves.
            data[field.start] = _FLOAT32
            found = True
    return bytes(data) if found else None


class FloatPrefill:
    """The second session on a model's files.

    Args:
        ort: The onnxruntime module.
        inference: The session, of what `float_graph` has made.
        graph: Its inputs and outputs.
        least: How many tokens a run must have to come here.
    """

    def __init__(self, ort: Any, inference: Any, graph: DecoderGraph, *, least: int) -> None:
        self._ort = ort
        self._inference = inference
        self._graph = graph
        self.least = least

    def run(
        self, token_ids: Sequence[int], past: int, cache: SharedCache, row: int, run_options: Any
    ) -> None:
        """Write keys and values of tokens that follow ``past`` others into a row of a cache.

        Logits are not computed: the LM head would be expanded for one row.

        Args:
            token_ids: The tokens.
            past: How many tokens the row holds.
            cache: The cache, with room for all of them.
            row: The row.
            run_options: onnxruntime's.
        """
        graph, count, total = self._graph, len(token_ids), past + len(token_ids)
        binding = self._inference.io_binding()
        cache.bind(binding, row, 1)
        binding.bind_cpu_input(graph.input_ids, np.array(token_ids, np.int64)[None])
        if graph.position_ids is not None:
            binding.bind_cpu_input(graph.position_ids, np.arange(past, total, dtype=np.int64)[None])
        if graph.attention_mask is not None:
            binding.bind_cpu_input(graph.attention_mask, np.ones((1, total), np.int64))
        # Counted from the end, from +count on: nothing.
        none = self._ort.OrtValue.ortvalue_from_numpy(np.array([-count], np.int64))
        binding.bind_ortvalue_input(graph.num_logits_to_keep, none)
        binding.bind_output(graph.logits, "cpu")
        self._inference.run_with_iobinding(binding, run_options)

    def close(self) -> None:
        """Let go of the session."""
        self._inference = None
