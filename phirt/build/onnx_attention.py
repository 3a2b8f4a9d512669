"""Attention as nodes: projections, norms of heads, and ONNX Runtime's GroupQueryAttention.

That node rotates queries and keys, appends to the cache and attends, in one kernel; heads of
a size that it does not rotate are rotated before it. Its ``local_window_size`` W lets
position i attend to positions i - W + 1 to i, as `transformers` counts a window; -1 is full
attention.
"""

from __future__ import annotations

import numpy as np
import onnx

from phirt.build.checkpoint import Checkpoint
from phirt.build.onnx_graph import GraphBuilder
from phirt.build.onnx_linear import LinearWriter
from phirt.build.onnx_norm import NormWriter
from phirt.build.onnx_rope import RopeWriter

__all__ = ["AttentionWriter"]

_ROTARY_STEP = 16  # GroupQueryAttention rotates heads and parts of heads of such multiples.


class AttentionWriter:
    """Writes the attention of every layer, and first what all of them read.

    Args:
        graph: Receives nodes and weights.
        checkpoint: Configuration and weights.
        linear: Writes the projections.
        norms: Writes the norms of heads.
        token_ids: Name of the token ids, (batch, positions).
        mask: Name of the attention mask, (batch, total length).
    """

    def __init__(
        self,
        graph: GraphBuilder,
        checkpoint: Checkpoint,
        linear: LinearWriter,
        norms: NormWriter,
        *,
        token_ids: str,
        mask: str,
    ) -> None:
        self._graph = graph
        self._checkpoint = checkpoint
        self._config = checkpoint.config
        self._linear = linear
        self._norms = norms
        self._token_ids = token_ids
        self._positions: str | None = None
        lengths = graph.node(
            "ReduceSum", [mask, graph.constant([1])], name="/model/lengths", keepdims=0
        )
        self._last = graph.node("Sub", [lengths, graph.constant([1])], name="/model/last_positions")
        int32 = onnx.TensorProto.INT32
        self._seqlens = graph.node("Cast", [self._last], name="/model/seqlens_k", to=int32)
        shape = graph.node("Shape", [mask], name="/model/mask_shape")
        total = graph.node("Gather", [shape, graph.constant(1)], name="/model/total", axis=0)
        self._total = graph.node("Cast", [total], name="/model/total_sequence_length", to=int32)
        self._rope = RopeWriter(graph, self._config, mask_shape=shape)

    def attend(self, layer: int, hidden: str) -> str:
        """Write a layer's attention, up to its output projection.

        Args:
            layer: Its index.
            hidden: Its normalized input, (batch, positions, width).

        Returns:
            The heads' results side by side, (batch, positions, heads * head_size).
        """
        config, scope = self._config, f"/model/layers.{layer}/attn"
        tensors = f"model.layers.{layer}.self_attn"
        packed = self._linear.project(
            hidden,
            [f"{tensors}.{part}_proj.weight" for part in "qkv"],
            name=f"{scope}/qkv_proj",
        )
        if config.qkv_bias:
            biases = [f"{tensors}.{part}_proj.bias" for part in "qkv"]
            packed = self._add_bias(packed, biases, name=f"{scope}/qkv_bias")
        tables = self._rope.tables(layer)
        rotates = not (config.head_size % _ROTARY_STEP or config.rope_of(layer).dim % _ROTARY_STEP)
        heads = (packed, "", "")
        if config.qk_norm or not rotates:
            heads = self._split(packed, scope)
        if config.qk_norm:
            heads = self._norm_heads(layer, *heads)
        if not rotates:
            heads = self._rotate(layer, *heads, tables)
        window = config.window_of(layer)
        return self._graph.contrib(
            "GroupQueryAttention",
            [
                *heads,
                f"past_key_values.{layer}.key",
                f"past_key_values.{layer}.value",
                self._seqlens,
                self._total,
                *(tables if rotates else ()),
            ],
            [f"{scope}/output", f"present.{layer}.key", f"present.{layer}.value"],
            name=f"{scope}/GroupQueryAttention",
            num_heads=config.num_heads,
            kv_num_heads=config.num_kv_heads,
            scale=config.scale,
            local_window_size=-1 if window is None else window,
            do_rotary=int(rotates),
            rotary_interleaved=0,
        )

    def project_output(self, layer: int, attended: str) -> str:
        """Write a layer's output projection of what `attend` returned, or of some positions."""
        scope, tensors = f"/model/layers.{layer}/attn", f"model.layers.{layer}.self_attn.o_proj"
        output = self._linear.project(attended, [f"{tensors}.weight"], name=f"{scope}/o_proj")
        if self._config.output_bias:
            output = self._add_bias(output, [f"{tensors}.bias"], name=f"{scope}/o_bias")
        return output

    def _split(self, packed: str, scope: str) -> tuple[str, str, str]:
        """Queries, keys and values, each (batch, positions, heads * head_size)."""
        graph, config = self._graph, self._config
        queries, keys = (n * config.head_size for n in (config.num_heads, config.num_kv_heads))
        q, k, v = (f"{scope}/{part}" for part in "qkv")
        sizes = graph.constant([queries, keys, keys])
        graph.node("Split", [packed, sizes], [q, k, v], name=f"{scope}/Split", axis=-1)
        return q, k, v

    def _norm_heads(self, layer: int, q: str, k: str, v: str) -> tuple[str, str, str]:
        """Normalize queries and keys, head by head."""
        graph, size = self._graph, self._config.head_size

        def normed(x: str, part: str, heads: int) -> str:
            name = f"/model/layers.{layer}/attn/{part}_norm"
            apart = graph.constant([0, 0, heads, size])
            split = graph.node("Reshape", [x, apart], name=f"{name}/heads")
            tensor = f"model.layers.{layer}.self_attn.{part}_norm.weight"
            scaled = self._norms.norm(split, tensor, name=name)
            joined = graph.constant([0, 0, heads * size])
            return graph.node("Reshape", [scaled, joined], name=f"{name}/joined")

        config = self._config
        return normed(q, "q", config.num_heads), normed(k, "k", config.num_kv_heads), v

    def _rotate(
        self, layer: int, q: str, k: str, v: str, tables: tuple[str, str]
    ) -> tuple[str, str, str]:
        """Rotate queries and keys."""
        if self._positions is None:
            self._positions = self._write_positions()
        config, dim = self._config, self._config.rope_of(layer).dim

        def rotated(x: str, part: str, heads: int) -> str:
            return self._graph.contrib(
                "RotaryEmbedding",
                [x, str(self._positions), *tables],
                name=f"/model/layers.{layer}/attn/{part}_rotary",
                # With a size, the node asks how many heads there are; without, the tables tell.
                num_heads=heads,
                rotary_embedding_dim=dim if dim < config.head_size else 0,
            )

        return rotated(q, "q", config.num_heads), rotated(k, "k", config.num_kv_heads), v

    def _write_positions(self) -> str:
        """Write the position of every token, (batch, positions)."""
        graph, scope = self._graph, "/model/positions"
        one = graph.constant(1)
        shape = graph.node("Shape", [self._token_ids], name=f"{scope}/shape")
        count = graph.node("Gather", [shape, one], name=f"{scope}/count", axis=0)
        # Counted from the last one: count - 1 before it, then count - 2, and so on.
        steps = graph.node("Range", [graph.constant(0), count, one], name=f"{scope}/steps")
        before = graph.node("Sub", [count, one], name=f"{scope}/before")
        back = graph.node("Sub", [steps, before], name=f"{scope}/back")
        last = graph.node("Unsqueeze", [self._last, graph.constant([1])], name=f"{scope}/last")
        return graph.node("Add", [last, back], name=scope)

    def _add_bias(self, x: str, tensors: list[str], *, name: str) -> str:
        biases = [self._checkpoint.tensor(tensor).float32() for tensor in tensors]
        bias = self._graph.floats(f"{name}.bias", np.concatenate(biases))
        return self._graph.node("Add", [x, bias], name=name)
