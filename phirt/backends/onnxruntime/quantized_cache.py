"""A graph whose attention keeps its KV cache in 8 bits.

GroupQueryAttention rounds what it appends to the cache, channel by channel, by scales that are
part of the graph: value = scale * integer, from -128 to 127. Graphs of floats are rewritten as
they are loaded, so that one artifact serves both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from phirt.errors import UnsupportedModelError
from phirt.models.protobuf import (
    BYTES,
    Field,
    bytes_of,
    copy_of,
    encode_bytes,
    encode_number,
    fields,
)
from phirt.protocols import KVCache
from phirt.types import FloatArray

__all__ = ["check_version", "quantized_graph", "scales_of"]

# A text that is unlike the calibration's may go beyond its ranges; what goes further is cut off.
_MARGIN = np.float32(1.1)
_LARGEST = np.float32(127)
_LEAST_SCALE = np.float32(1e-8)
# 1.26 opens the graph and fails at the first run; 1.31 was tried, and what lies between was not.
_LEAST_VERSION = (1, 31)

# Field numbers and values of onnx.proto.
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_GRAPH_OUTPUT = 12
_GRAPH_VALUES = (11, _GRAPH_OUTPUT, 13)  # inputs, outputs, and what lies between
_NODE_INPUT, _NODE_OUTPUT, _NODE_TYPE, _NODE_ATTRIBUTE = 1, 2, 4, 5
_ATTRIBUTE_NAME, _ATTRIBUTE_INT, _ATTRIBUTE_TEXT, _ATTRIBUTE_KIND = 1, 3, 4, 20
_KIND_INT, _KIND_TEXT = 2, 3
_VALUE_NAME, _VALUE_TYPE = 1, 2
_TYPE_TENSOR, _TENSOR_ELEMENT = 1, 1
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW = 1, 2, 8, 9
_FLOAT, _INT8 = 1, 3

# Inputs of GroupQueryAttention: the cache's two, and their scales.
_PAST = (3, 4)
_FIRST_SCALE = 12


def check_version(ort: Any) -> None:
    """Refuse an onnxruntime that opens such a graph and fails when it runs it.

    Raises:
        UnsupportedModelError: It is too old.
    """
    numbers = re.findall(r"[0-9]+", ort.__version__)[:2]
    if tuple(map(int, numbers)) < _LEAST_VERSION:
        least = ".".join(map(str, _LEAST_VERSION))
        raise UnsupportedModelError(
            f"onnxruntime {ort.__version__} keeps no KV cache of 8 bits on the CPU; {least} does. "
            "Update it, or load without kv_precision."
        )


def scales_of(ranges: KVCache) -> tuple[FloatArray, ...]:
    """What an integer stands for: of keys and values of each layer, (kv_heads, 1, head_size).

    Args:
        ranges: The largest magnitudes, as `phirt.backends.kv_ranges.find_ranges` gives them.
    """
    return tuple(
        np.maximum(largest * (_MARGIN / _LARGEST), _LEAST_SCALE)
        for layer in ranges.layers
        for largest in (layer.key, layer.value)
    )


def quantized_graph(graph: bytes, scales: Mapping[str, FloatArray]) -> bytes:
    """A graph of float32 with its KV cache in 8 bits.

    Args:
        graph: A serialized model whose weights lie in other files.
        scales: By the names of the cache's inputs.

    Raises:
        UnsupportedModelError: Something else than GroupQueryAttention reads the cache, or the
            cache is of another type than float32.
    """
    parts = [
        encode_bytes(_MODEL_GRAPH, _quantized(graph, field, scales))
        if field.number == _MODEL_GRAPH
        else copy_of(graph, field)
        for field in fields(graph, 0, len(graph))
    ]
    return b"".join(parts)


def _quantized(data: bytes, graph: Field, scales: Mapping[str, FloatArray]) -> bytes:
    nodes = [field for field in fields(data, graph.start, graph.end) if field.number == _GRAPH_NODE]
    reads = {node: _texts(data, node, _NODE_INPUT) for node in nodes}
    readers = [node for node in nodes if not scales.keys().isdisjoint(reads[node])]
    for node in readers:
        _check_reader(data, node, reads[node], scales)
    found = {name for node in readers for name in reads[node]}
    if missing := sorted(scales.keys() - found):
        raise UnsupportedModelError(
            f"The graph has no attention that reads {missing[0]}. Load it without kv_precision."
        )
    # The cache that a node writes is of the type of the one that it reads.
    written = {name for node in readers for name in _texts(data, node, _NODE_OUTPUT)[1:3]}
    outputs = {
        name
        for field in fields(data, graph.start, graph.end)
        if field.number == _GRAPH_OUTPUT
        for name in _texts(data, field, _VALUE_NAME)
    }
    read_on = written & set().union(*reads.values())
    if strange := sorted(read_on | (written - outputs)):
        raise UnsupportedModelError(
            f"The graph goes on with the KV cache {strange[0]} that attention has written: only "
            "one that it gives out as it is can be of 8 bits. Load it without kv_precision."
        )
    parts = []
    for field in fields(data, graph.start, graph.end):
        if field in readers:
            parts.append(encode_bytes(_GRAPH_NODE, _with_scales(data, field, reads[field])))
        elif field.number in _GRAPH_VALUES:
            parts.append(encode_bytes(field.number, _as_int8(data, field, written | scales.keys())))
        else:
            parts.append(copy_of(data, field))
    parts += [encode_bytes(_GRAPH_INITIALIZER, _tensor(*each)) for each in scales.items()]
    return b"".join(parts)


def _check_reader(
    data: bytes, node: Field, inputs: list[str], scales: Mapping[str, FloatArray]
) -> None:
    kind = _texts(data, node, _NODE_TYPE)
    read = [name for name in inputs if name in scales]
    if kind == ["GroupQueryAttention"] and inputs[_PAST[0] : _PAST[1] + 1] == read:
        return
    raise UnsupportedModelError(
        f"The graph reads its KV cache {read[0]} with {''.join(kind) or 'no operator'}: only "
        "GroupQueryAttention has one of 8 bits. Load it without kv_precision."
    )


def _with_scales(data: bytes, node: Field, inputs: list[str]) -> bytes:
    """A node of attention, which also reads the scales of the cache that it reads."""
    if len(inputs) > _FIRST_SCALE:
        raise UnsupportedModelError("The graph's attention has scales of its own already.")
    names = [""] * (_FIRST_SCALE - len(inputs)) + [_scale_name(inputs[index]) for index in _PAST]
    attributes = [
        *(_attribute(f"{part}_quant_type", b"PER_CHANNEL") for part in "kv"),
        _attribute("kv_cache_bit_width", 8),
    ]
    return b"".join(
        [
            data[node.start : node.end],
            *(encode_bytes(_NODE_INPUT, name.encode()) for name in names),
            *(encode_bytes(_NODE_ATTRIBUTE, attribute) for attribute in attributes),
        ]
    )


def _scale_name(cache: str) -> str:
    return f"phirt/scale/{cache}"


def _attribute(name: str, value: int | bytes) -> bytes:
    if isinstance(value, int):
        content, kind = encode_number(_ATTRIBUTE_INT, value), _KIND_INT
    else:
        content, kind = encode_bytes(_ATTRIBUTE_TEXT, value), _KIND_TEXT
    named = encode_bytes(_ATTRIBUTE_NAME, name.encode())
    return named + content + encode_number(_ATTRIBUTE_KIND, kind)


def _tensor(cache: str, scales: FloatArray) -> bytes:
    """The scales as a constant, (1, kv_heads, 1, head_size)."""
    return b"".join(
        [
            *(encode_number(_TENSOR_DIMS, size) for size in (1, *scales.shape)),
            encode_number(_TENSOR_TYPE, _FLOAT),
            encode_bytes(_TENSOR_NAME, _scale_name(cache).encode()),
            encode_bytes(_TENSOR_RAW, scales.astype("<f4").tobytes()),
        ]
    )


def _as_int8(data: bytes, value: Field, cached: set[str]) -> bytes:
    """What describes a tensor; one of the cache is of int8."""
    content = bytearray(data[value.start : value.end])
    name = _texts(data, value, _VALUE_NAME)
    if not cached.intersection(name):
        return bytes(content)
    for kind in _in(data, value, _VALUE_TYPE):
        for tensor in _in(data, kind, _TYPE_TENSOR):
            for element in fields(data, tensor.start, tensor.end):
                if element.number != _TENSOR_ELEMENT:
                    continue
                if element.value != _FLOAT:
                    raise UnsupportedModelError(
                        f"The graph's KV cache {name[0]} is not of float32, and phirt makes only "
                        "such a one one of 8 bits. Load it without kv_precision."
                    )
                # Both are varints of one byte, so that nothing else moves.
                content[element.start - value.start] = _INT8
    return bytes(content)


def _in(data: bytes, message: Field, number: int) -> list[Field]:
    return [
        field
        for field in fields(data, message.start, message.end)
        if field.number == number and field.wire == BYTES
    ]


def _texts(data: bytes, message: Field, number: int) -> list[str]:
    return [bytes_of(data, field).decode() for field in _in(data, message, number)]
