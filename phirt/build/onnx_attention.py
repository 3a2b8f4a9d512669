"""Attention as nodes: projections, norms of heads, and ONNX Runtime's GroupQueryAttention.

That node rotates queries and keys, appends to the cache and attends, in one kernel. Its
``local_window_size`` W lets position i attend to positions i - W + 1 to i, as
`transformers` counts a window; -1 is full attention.
"""

from __future__ import annotations

import numpy as np
import onnx

from phirt.build.checkpoint import Checkpoint
from phirt.build.onnx_graph import GraphBuilder
from phirt.build.onnx_linear import LinearWriter
from phirt.build.onnx_norm import NormWriter
from phirt.build.onnx_rope import RopeWriter
from phirt.errors import UnsupportedModelError
from phirt.models.decoder_config import DecoderConfig

__all__ = ["AttentionWriter", "check_attention_supported"]

_ROTARY_STEP = 16  # GroupQueryAttention takes heads and rotating parts of such multiples.


def check_attention_supported(config: DecoderConfig) -> None:
    """Refuse head sizes that GroupQueryAttention does not take.

    Raises:
        UnsupportedModelError: It does not.
    """
    for rope in (config.rope, config.local_rope or config.rope):
        dim = rope.dim
        if config.head_size % _ROTARY_STEP or dim % _ROTARY_STEP or dim > config.head_size:
            raise UnsupportedModelError(
                f"Heads of this model are {config.head_size} wide, {dim} of it rotary; ONNX "
                f"Runtime's attention takes multiples of {_ROTARY_STEP}. Use another runtime."
            )


class AttentionWriter:
    """Writes the attention of every layer, and first what all of them read.

    Args:
        graph: Receives nodes and weights.
        checkpoint: Configuration and weights.
        linear: Writes the projections.
        norms: Writes the norms of heads.
        mask: Name of the attention mask, (batch, total length).
    """

    def __init__(
        self,
        graph: GraphBuilder,
        checkpoint: Checkpoint,
        linear: LinearWriter,
        norms: NormWriter,
        *,
        mask: str,
    ) -> None:
        self._graph = graph
        self._checkpoint = checkpoint
        self._config = checkpoint.config
        self._linear = linear
        self._norms = norms
        lengths = graph.node(
            "ReduceSum", [mask, graph.constant([1])], name="/model/lengths", keepdims=0
        )
        last = graph.node("Sub", [lengths, graph.constant([1])], name="/model/last_positions")
        int32 = onnx.TensorProto.INT32
        self._seqlens = graph.node("Cast", [last], name="/model/seqlens_k", to=int32)
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
            sensitive=True,  # They caused half of the KL of SmolLM2 in 4 bits.
        )
        if config.qkv_bias:
            biases = [f"{tensors}.{part}_proj.bias" for part in "qkv"]
            packed = self._add_bias(packed, biases, name=f"{scope}/qkv_bias")
        window = config.window_of(layer)
        return self._graph.contrib(
            "GroupQueryAttention",
            [
                *(self._normed_heads(layer, packed) if config.qk_norm else (packed, "", "")),
                f"past_key_values.{layer}.key",
                f"past_key_values.{layer}.value",
                self._seqlens,
                self._total,
                *self._rope.tables(layer),
            ],
            [f"{scope}/output", f"present.{layer}.key", f"present.{layer}.value"],
            name=f"{scope}/GroupQueryAttention",
            num_heads=config.num_heads,
            kv_num_heads=config.num_kv_heads,
            scale=config.scale,
            local_window_size=-1 if window is None else window,
            do_rotary=1,
            rotary_interleaved=0,
        )

    def project_output(self, layer: int, attended: str) -> str:
        """Write a layer's output projection of what `attend` returned, or of some positions."""
        scope, tensors = f"/model/layers.{layer}/attn", f"model.layers.{layer}.self_attn.o_proj"
        output = self._linear.project(
            attended, [f"{tensors}.weight"], name=f"{scope}/o_proj", sensitive=False
        )
        if self._config.output_bias:
            output = self._add_bias(output, [f"{tensors}.bias"], name=f"{scope}/o_bias")
        return output

    def _normed_heads(self, layer: int, packed: str) -> tuple[str, str, str]:
        """Queries, keys and values, the first two normalized head by head."""
        graph, config, scope = self._graph, self._config, f"/model/layers.{layer}/attn"
        queries, keys = (n * config.head_size for n in (config.num_heads, config.num_kv_heads))
        parts = [f"{scope}/{part}" for part in "qkv"]
        sizes = graph.constant([queries, keys, keys])
        graph.node("Split", [packed, sizes], parts, name=f"{scope}/Split", axis=-1)

        def normed(part: str, width: int) -> str:
            name = f"{scope}/{part}_norm"
            split = graph.constant([0, 0, -1, config.head_size])
            heads = graph.node("Reshape", [f"{scope}/{part}", split], name=f"{name}/heads")
            tensor = f"model.layers.{layer}.self_attn.{part}_norm.weight"
            scaled = self._norms.norm(heads, tensor, name=name)
            joined = graph.constant([0, 0, width])
            return graph.node("Reshape", [scaled, joined], name=f"{name}/joined")

        return normed("q", queries), normed("k", keys), parts[2]

    def _add_bias(self, x: str, tensors: list[str], *, name: str) -> str:
        biases = [self._checkpoint.tensor(tensor).float32() for tensor in tensors]
        bias = self._graph.initializer(f"{name}.bias", np.concatenate(biases))
        return self._graph.node("Add", [x, bias], name=name)
