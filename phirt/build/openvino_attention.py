"""Attention of a decoder as OpenVINO's plugins fuse it: rotary positions, masks, states."""

from __future__ import annotations

from typing import Any

import numpy as np

from phirt.backends.openvino.runtime import import_openvino
from phirt.build.openvino_weights import MatrixWriter
from phirt.models.decoder_config import DecoderConfig
from phirt.models.rotary import Rotary

ov = import_openvino()
ops = ov.opset13

__all__ = ["AttentionWriter", "integers", "rms_norm"]

# Small enough that no score survives it, and finite in float16, in which GPUs compute.
_MASKED = np.float32(-65504)


def integers(*values: int) -> Any:
    """A constant of int64, shape (n,)."""
    return ops.constant(np.array(values, np.int64))


def scalar(value: int) -> Any:
    """A constant of int64 without axes."""
    return ops.constant(np.int64(value))


def rms_norm(x: Any, weight: Any, epsilon: float) -> Any:
    """``x / sqrt(mean(x ** 2) + epsilon) * weight``, as plugins recognise it."""
    power = ops.power(x, ops.constant(np.float32(2)))
    mean = ops.reduce_mean(power, integers(-1), True)
    root = ops.sqrt(ops.add(mean, ops.constant(np.float32(epsilon))))
    return ops.multiply(ops.multiply(x, ops.divide(ops.constant(np.float32(1)), root)), weight)


class AttentionWriter:
    """Writes the attention of every layer.

    What layers share (masks, cosines and sines) is written once.

    Args:
        config: The decoder.
        matrices: Writes the projections.
        inputs: The graph's ``input_ids``, ``attention_mask``, ``position_ids``, ``beam_idx``.

    Attributes:
        sinks: The states' assignments, which a graph lists beside its results.
    """

    def __init__(
        self, config: DecoderConfig, matrices: MatrixWriter, inputs: dict[str, Any]
    ) -> None:
        self._config = config
        self._matrices = matrices
        self._inputs = inputs
        self._masks: dict[int | None, Any] = {}
        self._rotations: dict[int, tuple[Any, Any]] = {}
        self.sinks: list[Any] = []
        self._batch = ops.gather(ops.shape_of(inputs["input_ids"]), scalar(0), scalar(0))

    def write(self, layer: int, x: Any) -> Any:
        """The attention's result before the o projection.

        Args:
            layer: Its index.
            x: The normalized input, (batch, positions, hidden).

        Returns:
            Shape (batch, positions, query heads * head size).
        """
        config, tensors = self._config, f"model.layers.{layer}.self_attn"
        cosines, sines = self._rotation(config.rope_of(layer))
        heads = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
        parts = {name: self._project(tensors, name, count, x) for name, count in heads.items()}
        query = _rotate(parts["q"], cosines, sines, config.rope_of(layer).dim, config.head_size)
        key = _rotate(parts["k"], cosines, sines, config.rope_of(layer).dim, config.head_size)
        key = self._extend_state(layer, "key", key)
        value = self._extend_state(layer, "value", parts["v"])
        attended = ops.scaled_dot_product_attention(
            query,
            self._repeat(key),
            self._repeat(value),
            self._mask(config.window_of(layer)),
            ops.constant(np.float32(config.scale)),
            False,
            name=f"{tensors}.sdpa",
        )
        merged = ops.transpose(attended, integers(0, 2, 1, 3))
        return ops.reshape(merged, integers(0, 0, config.num_heads * config.head_size), True)

    def _project(self, tensors: str, part: str, heads: int, x: Any) -> Any:
        """Queries, keys or values of every head, (batch, heads, positions, head size)."""
        config = self._config
        bias = f"{tensors}.{part}_proj.bias" if config.qkv_bias else None
        weight = f"{tensors}.{part}_proj.weight"
        packed = self._matrices.project(x, weight, bias=bias)
        split = ops.reshape(packed, integers(0, 0, heads, config.head_size), True)
        if config.qk_norm and part != "v":
            weight = self._matrices.vector(
                f"{tensors}.{part}_norm.weight", offset=config.norm_offset
            )
            split = rms_norm(split, weight, config.rms_norm_eps)
        return ops.transpose(split, integers(0, 2, 1, 3))

    def _extend_state(self, layer: int, part: str, new: Any) -> Any:
        """Append to a state, and return all of it."""
        heads, size = self._config.num_kv_heads, self._config.head_size
        # optimum's name: that of the input and of the output that the state replaces.
        name = f"past_key_values.{layer}.{part}present.{layer}.{part}"
        parts = [ops.unsqueeze(self._batch, scalar(0)), integers(heads, 0, size)]
        empty = ops.broadcast(ops.constant(np.float32(0)), ops.concat(parts, 0))
        shape = ov.PartialShape([-1, heads, -1, size])
        past = ops.read_value(empty, name, ov.Type.f32, shape)
        chosen = ops.gather(past, self._inputs["beam_idx"], scalar(0))
        whole = ops.concat([chosen, new], 2)
        self.sinks.append(ops.assign(whole, name))
        return whole

    def _repeat(self, states: Any) -> Any:
        """Keys or values, repeated for the query heads that share them."""
        config = self._config
        groups = config.num_heads // config.num_kv_heads
        if groups == 1:
            return states
        shape = ops.shape_of(states)
        parts = [
            ops.gather(shape, integers(0, 1), scalar(0)),
            integers(groups),
            ops.gather(shape, integers(2, 3), scalar(0)),
        ]
        repeated = ops.broadcast(
            ops.unsqueeze(states, scalar(2)), ops.concat(parts, 0), broadcast_spec="BIDIRECTIONAL"
        )
        return ops.reshape(repeated, integers(0, config.num_heads, -1, config.head_size), True)

    def _rotation(self, rope: Rotary) -> tuple[Any, Any]:
        """Cosines and sines, (batch, 1, positions, dim)."""
        if id(rope) not in self._rotations:
            positions = ops.convert(self._inputs["position_ids"], "f32")
            angles = ops.multiply(ops.unsqueeze(positions, scalar(-1)), self._frequencies(rope))
            angles = ops.unsqueeze(ops.concat([angles, angles], -1), scalar(1))
            factor = ops.constant(np.float32(rope.attention_factor))
            waves = [ops.cos(angles), ops.sin(angles)]
            if rope.attention_factor != 1:
                waves = [ops.multiply(wave, factor) for wave in waves]
            self._rotations[id(rope)] = (waves[0], waves[1])
        return self._rotations[id(rope)]

    def _frequencies(self, rope: Rotary) -> Any:
        short = ops.constant(rope.frequencies("short")[None, None])
        if rope.boundary is None:
            return short
        # transformers' rule: the longest sequence decides for all positions of the call.
        last = ops.reduce_max(self._inputs["position_ids"], integers(0, 1), False)
        is_long = ops.greater_equal(last, scalar(rope.boundary))
        return ops.select(is_long, ops.constant(rope.frequencies("long")[None, None]), short)

    def _mask(self, window: int | None) -> Any:
        """What is added to the scores, (batch, 1, positions, positions with the past)."""
        if window not in self._masks:
            attention_mask = self._inputs["attention_mask"]
            keys = ops.gather(ops.shape_of(attention_mask), scalar(1), scalar(0))
            count = ops.gather(ops.shape_of(self._inputs["input_ids"]), scalar(1), scalar(0))
            first = ops.subtract(keys, count)
            key_positions = ops.range(scalar(0), keys, scalar(1), "i64")
            positions = ops.unsqueeze(ops.range(first, keys, scalar(1), "i64"), scalar(1))
            visible = ops.less_equal(key_positions, positions)
            if window is not None:
                oldest = ops.subtract(positions, scalar(window))
                visible = ops.logical_and(visible, ops.greater(key_positions, oldest))
            present = ops.not_equal(attention_mask, scalar(0))
            visible = ops.logical_and(ops.unsqueeze(present, integers(1, 2)), visible)
            self._masks[window] = ops.select(
                visible, ops.constant(np.float32(0)), ops.constant(_MASKED)
            )
        return self._masks[window]


def _rotate(x: Any, cosines: Any, sines: Any, dim: int, head_size: int) -> Any:
    """Turn the first ``dim`` elements of every head."""
    if dim < head_size:
        turning = ops.slice(x, integers(0), integers(dim), integers(1), integers(-1))
        rest = ops.slice(x, integers(dim), integers(head_size), integers(1), integers(-1))
        return ops.concat([_rotate(turning, cosines, sines, dim, dim), rest], -1)
    half = dim // 2
    first = ops.slice(x, integers(0), integers(half), integers(1), integers(3))
    second = ops.slice(
        x, integers(half), integers(np.iinfo(np.int64).max), integers(1), integers(3)
    )
    turned = ops.concat([ops.multiply(second, ops.constant(np.float32(-1))), first], -1)
    return ops.add(ops.multiply(x, cosines), ops.multiply(turned, sines))
