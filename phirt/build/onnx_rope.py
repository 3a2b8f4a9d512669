"""Rotary tables of a decoder, and which of their rows a run reads.

A plain table is handed to attention whole. LongRoPE has two sets of factors, and a sequence
uses one of them for all its positions: the short ones up to the boundary, the long ones
beyond. Both tables lie in one constant, the short above the long, and a run takes as many
rows as its sequence has positions, from the top of one or of the other: a copy of a few
hundred bytes per position, where attention reads hundreds of kilobytes of the cache. To choose
between whole tables (an ``If`` node, as onnxruntime-genai's Model Builder writes) copies all
rows of one at every step: 50 MB and 4 ms in a model of 131,072 positions.

As in the Model Builder's graphs, the attention mask's width is the length of the sequence.
"""

from __future__ import annotations

import numpy as np
import onnx

from phirt.build.onnx_graph import GraphBuilder
from phirt.models.decoder_config import DecoderConfig
from phirt.models.rotary import Rotary

__all__ = ["RopeWriter", "table_rows"]


class RopeWriter:
    """Writes the rotary tables that a decoder's layers read, each once.

    Args:
        graph: Receives nodes and tables.
        config: The decoder.
        mask_shape: Name of the attention mask's shape.
    """

    def __init__(self, graph: GraphBuilder, config: DecoderConfig, *, mask_shape: str) -> None:
        self._graph = graph
        self._config = config
        self._mask_shape = mask_shape
        self._tables: dict[str, tuple[str, str]] = {}

    def tables(self, layer: int) -> tuple[str, str]:
        """Names of the cosines and sines of a layer, each (positions, rope.dim / 2)."""
        rope = self._config.rope_of(layer)
        suffix = "" if rope is self._config.rope else "_local"
        if suffix not in self._tables:
            self._tables[suffix] = self._write(rope, suffix)
        return self._tables[suffix]

    def _write(self, rope: Rotary, suffix: str) -> tuple[str, str]:
        length = self._config.context_length
        names = f"cos_cache{suffix}", f"sin_cache{suffix}"
        boundary = _boundary(rope, length)
        if boundary is None:
            for name, table in zip(names, rope.tables(length), strict=True):
                self._graph.floats(name, table)
            return names
        short, long = rope.tables(boundary), rope.tables(length, "long")
        first, end = self._write_rows(boundary, suffix)
        for name, *parts in zip(names, short, long, strict=True):
            both = self._graph.floats(f"{name}_short_and_long", np.concatenate(parts))
            rows = [both, first, end, self._graph.constant([0])]
            self._graph.node("Slice", rows, [name], name=f"/model/rope{suffix}/{name}")
        return names

    def _write_rows(self, boundary: int, suffix: str) -> tuple[str, str]:
        """Write the first row of this run's table and the one after its last, each (1,)."""
        graph, scope = self._graph, f"/model/rope{suffix}"
        length = graph.node(
            "Gather", [self._mask_shape, graph.constant([1])], name=f"{scope}/length", axis=0
        )
        above = graph.constant([boundary])
        is_long = graph.node("Greater", [length, above], name=f"{scope}/is_long")
        as_int = graph.node("Cast", [is_long], name=f"{scope}/regime", to=onnx.TensorProto.INT64)
        first = graph.node("Mul", [as_int, above], name=f"{scope}/first_row")
        return first, graph.node("Add", [first, length], name=f"{scope}/end_row")


def table_rows(rope: Rotary, context_length: int) -> int:
    """Rows that the tables of a rotary embedding have in the graph."""
    return context_length + (_boundary(rope, context_length) or 0)


def _boundary(rope: Rotary, context_length: int) -> int | None:
    """LongRoPE's boundary, where the context goes beyond it."""
    is_crossed = rope.boundary is not None and context_length > rope.boundary
    return rope.boundary if is_crossed else None
