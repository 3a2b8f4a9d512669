"""Decoders in plain operators, by the convention of Optimum's and transformers.js's exports.

``config.json``, ``onnx/model.onnx`` with past and present as different tensors, and none of
ONNX Runtime's own operators: what an exporter that traces a model writes.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from phirt.build.safetensors_checkpoint import SafetensorsCheckpoint
from phirt.models.decoder_config import DecoderConfig

_TEXT_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def write_export(
    checkpoint: Path,
    out: Path,
    *,
    position_ids: bool = True,
    merged: bool = False,
    element: int = TensorProto.FLOAT,
) -> Path:
    """Export a Hugging Face folder.

    Args:
        checkpoint: The folder.
        out: An existing folder to write to.
        position_ids: Whether positions are an input, or counted by the graph.
        merged: Whether ``use_cache_branch`` says that there is a cache.
        element: Type of cache and logits (the rest stays float32).

    Returns:
        ``out``.
    """
    for name in _TEXT_FILES:
        shutil.copy(checkpoint / name, out / name)
    (out / "onnx").mkdir()
    with SafetensorsCheckpoint(checkpoint) as source:
        export = _Export(source, position_ids=position_ids, merged=merged, element=element)
        onnx.save(export.model(), out / "onnx" / "model.onnx")
    return out


class _Export:
    """One graph, node by node; every method returns the name of its result."""

    def __init__(
        self, source: SafetensorsCheckpoint, *, position_ids: bool, merged: bool, element: int
    ) -> None:
        self._source = source
        self._config: DecoderConfig = source.config
        self._float = element
        self._merged = merged
        self._nodes: list[onnx.NodeProto] = []
        self._tensors: dict[str, onnx.TensorProto] = {}
        self._inputs = [_int64("input_ids", "tokens"), _int64("attention_mask", "total")]
        if position_ids:
            self._inputs.append(_int64("position_ids", "tokens"))
        if merged:
            branch = helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1])
            self._inputs.append(branch)
        vocab = ["batch", "tokens", self._config.vocab_size]
        self._outputs = [helper.make_tensor_value_info("logits", self._float, vocab)]

    def model(self) -> onnx.ModelProto:
        config = self._config
        self._write_positions()
        x = self._node("Gather", self._weight("model.embed_tokens.weight"), "input_ids")
        x = self._node("Mul", x, self._constant(np.float32(config.embedding_scale)))
        for layer in range(config.num_layers):
            x = self._write_layer(layer, x)
        x = self._norm(x, "model.norm.weight")
        head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
        logits = self._node("MatMul", x, self._weight(f"{head}.weight", turned=True))
        self._nodes.append(
            helper.make_node("Cast", [logits], ["logits"], name="logits", to=self._float)
        )
        graph = helper.make_graph(
            self._nodes, "decoder", self._inputs, self._outputs, list(self._tensors.values())
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)

    def _write_positions(self) -> None:
        total = self._size("attention_mask", 1)
        tokens = self._size("input_ids", 1)
        start = self._node("Sub", total, tokens)
        one = self._constant(np.array(1))
        own = self._node("Range", start, total, one)
        keys = self._node("Range", self._constant(np.array(0)), total, one)
        declared = [value.name for value in self._inputs]
        counted = self._node("Unsqueeze", own, self._constant(np.array([0])))
        self._positions = "position_ids" if "position_ids" in declared else counted
        queries = self._node("Unsqueeze", own, self._constant(np.array([1])))
        self._distance = self._node("Sub", queries, keys)
        shown = self._node("Greater", "attention_mask", self._constant(np.array(0)))
        self._shown = self._node("Unsqueeze", shown, self._constant(np.array([1, 2])))
        self._biases: dict[int | None, str] = {}

    def _bias(self, window: int | None) -> str:
        """0 where a position attends, and far below elsewhere: (batch, 1, tokens, total)."""
        if window not in self._biases:
            seen = self._node("GreaterOrEqual", self._distance, self._constant(np.array(0)))
            if window is not None:
                near = self._node("Less", self._distance, self._constant(np.array(window)))
                seen = self._node("And", seen, near)
            seen = self._node("And", seen, self._shown)
            zero, low = self._constant(np.float32(0)), self._constant(np.float32(-1e9))
            self._biases[window] = self._node("Where", seen, zero, low)
        return self._biases[window]

    def _write_layer(self, layer: int, x: str) -> str:
        scope, config = f"model.layers.{layer}", self._config
        attended = self._attention(layer, self._norm(x, f"{scope}.input_layernorm.weight"))
        after = f"{scope}.post_attention_layernorm.weight"
        if config.sandwich_norms:
            x = self._node("Add", x, self._norm(attended, after))
            after = f"{scope}.pre_feedforward_layernorm.weight"
        else:
            x = self._node("Add", x, attended)
        inner = self._norm(x, after)
        gate = self._product(inner, f"{scope}.mlp.gate_proj")
        up = self._product(inner, f"{scope}.mlp.up_proj")
        down = self._product(
            self._node("Mul", self._activation(gate), up), f"{scope}.mlp.down_proj"
        )
        if config.sandwich_norms:
            down = self._norm(down, f"{scope}.post_feedforward_layernorm.weight")
        return self._node("Add", x, down)

    def _attention(self, layer: int, x: str) -> str:
        config, scope = self._config, f"model.layers.{layer}.self_attn"
        query = self._heads(x, f"{scope}.q_proj", config.num_heads)
        key = self._heads(x, f"{scope}.k_proj", config.num_kv_heads)
        value = self._heads(x, f"{scope}.v_proj", config.num_kv_heads)
        if config.qk_norm:
            query = self._norm(query, f"{scope}.q_norm.weight")
            key = self._norm(key, f"{scope}.k_norm.weight")
        query, key = self._rotate(query, layer), self._rotate(key, layer)
        key = self._repeat(self._extend(key, f"{layer}.key"))
        value = self._repeat(self._extend(value, f"{layer}.value"))
        turned = self._node("Transpose", key, perm=[0, 1, 3, 2])
        scores = self._node("MatMul", query, turned)
        scores = self._node("Mul", scores, self._constant(np.float32(config.scale)))
        scores = self._node("Add", scores, self._bias(config.window_of(layer)))
        mixed = self._node("MatMul", self._node("Softmax", scores, axis=-1), value)
        mixed = self._node("Transpose", mixed, perm=[0, 2, 1, 3])
        width = config.num_heads * config.head_size
        flat = self._node("Reshape", mixed, self._constant(np.array([0, 0, width])))
        return self._product(flat, f"{scope}.o_proj")

    def _extend(self, new: str, part: str) -> str:
        """Past and new, declared as present."""
        config = self._config
        shape = ["batch", config.num_kv_heads, "past", config.head_size]
        past, present = f"past_key_values.{part}", f"present.{part}"
        self._inputs.append(helper.make_tensor_value_info(past, self._float, shape))
        grown = [*shape[:2], "total", shape[3]]
        self._outputs.append(helper.make_tensor_value_info(present, self._float, grown))
        held = self._held(past) if self._merged else past
        stored = self._node("Cast", new, to=self._float)
        joined = helper.make_node("Concat", [held, stored], [present], name=present, axis=2)
        self._nodes.append(joined)
        return self._node("Cast", present, to=TensorProto.FLOAT)

    def _held(self, past: str) -> str:
        """The past, or nothing of it where ``use_cache_branch`` is false."""
        zero, axis = self._constant(np.array([0])), self._constant(np.array([2]))
        whole = helper.make_node("Identity", [past], [f"{past}/whole"])
        none = helper.make_node("Slice", [past, zero, zero, axis], [f"{past}/none"])
        branches = [
            helper.make_graph(
                [node], name, [], [helper.make_tensor_value_info(node.output[0], self._float, None)]
            )
            for name, node in (("cached", whole), ("empty", none))
        ]
        return self._node(
            "If", "use_cache_branch", then_branch=branches[0], else_branch=branches[1]
        )

    def _rotate(self, x: str, layer: int) -> str:
        config = self._config
        rope = config.rope_of(layer)
        tables = rope.tables(config.context_length)
        cos, sin = (
            self._node(
                "Unsqueeze",
                self._node("Gather", self._constant(table), self._positions),
                self._constant(np.array([1])),
            )
            for table in tables
        )
        first = self._columns(x, 0, rope.dim // 2)
        second = self._columns(x, rope.dim // 2, rope.dim)
        parts = [
            self._node("Sub", self._node("Mul", first, cos), self._node("Mul", second, sin)),
            self._node("Add", self._node("Mul", second, cos), self._node("Mul", first, sin)),
        ]
        if rope.dim < config.head_size:
            parts.append(self._columns(x, rope.dim, config.head_size))
        return self._node("Concat", *parts, axis=-1)

    def _columns(self, x: str, start: int, end: int) -> str:
        bounds = [self._constant(np.array([value])) for value in (start, end, -1)]
        return self._node("Slice", x, *bounds)

    def _repeat(self, x: str) -> str:
        """Keys or values once for every query head of their group."""
        config = self._config
        groups = config.num_heads // config.num_kv_heads
        apart = self._node("Unsqueeze", x, self._constant(np.array([2])))
        copies = self._node("Concat", *[apart] * groups, axis=2)
        shape = np.array([0, config.num_heads, -1, config.head_size])
        return self._node("Reshape", copies, self._constant(shape))

    def _heads(self, x: str, name: str, heads: int) -> str:
        shape = self._constant(np.array([0, 0, heads, self._config.head_size]))
        apart = self._node("Reshape", self._product(x, name), shape)
        return self._node("Transpose", apart, perm=[0, 2, 1, 3])

    def _product(self, x: str, name: str) -> str:
        product = self._node("MatMul", x, self._weight(f"{name}.weight", turned=True))
        if f"{name}.bias" not in set(self._source.names()):
            return product
        return self._node("Add", product, self._weight(f"{name}.bias"))

    def _norm(self, x: str, name: str) -> str:
        config = self._config
        square = self._node("Mul", x, x)
        mean = self._node("ReduceMean", square, self._constant(np.array([-1])))
        shifted = self._node("Add", mean, self._constant(np.float32(config.rms_norm_eps)))
        scaled = self._node("Div", x, self._node("Sqrt", shifted))
        weight = self._source.tensor(name).float32() + np.float32(config.norm_offset)
        return self._node("Mul", scaled, self._constant(weight))

    def _activation(self, x: str) -> str:
        if self._config.activation == "silu":
            return self._node("Mul", x, self._node("Sigmoid", x))
        cube = self._node("Mul", x, self._node("Mul", x, x))
        bent = self._node("Mul", cube, self._constant(np.float32(0.044715)))
        inner = self._node("Add", x, bent)
        factor = self._constant(np.float32(np.sqrt(2 / np.pi)))
        curve = self._node("Tanh", self._node("Mul", inner, factor))
        half = self._node("Mul", x, self._constant(np.float32(0.5)))
        return self._node("Mul", half, self._node("Add", curve, self._constant(np.float32(1))))

    def _size(self, tensor: str, axis: int) -> str:
        shape = self._node("Shape", tensor)
        return self._node("Gather", shape, self._constant(np.array(axis)))

    def _weight(self, name: str, *, turned: bool = False) -> str:
        key = f"{name}/turned" if turned else name
        if key not in self._tensors:
            values = self._source.tensor(name).float32()
            self._tensors[key] = numpy_helper.from_array(
                np.ascontiguousarray(values.T if turned else values), key
            )
        return key

    def _constant(self, values: NDArray[np.generic] | np.generic) -> str:
        name = f"constant_{len(self._tensors)}"
        self._tensors[name] = numpy_helper.from_array(np.asarray(values), name)
        return name

    def _node(self, op_type: str, *inputs: str, **attributes: object) -> str:
        name = f"{op_type}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(op_type, inputs, [name], name=name, **attributes))
        return name


def _int64(name: str, length: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", length])
