"""What a decoder graph itself says of windows and of LongRoPE.

onnxruntime-genai's Model Builder writes no config.json, and its genai_config.json is silent
on LongRoPE's boundary and unclear on windows. Both decide which numbers are right, and both
can be read from the graph's nodes.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from phirt.models.protobuf import BYTES, Buffer, bytes_of, fields, packed_varints, signed

__all__ = ["GraphFacts", "read_graph_facts"]

# Field numbers of onnx.proto (ONNX 1.20).
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_OUTPUT, _NODE_OP_TYPE, _NODE_ATTRIBUTE = 1, 2, 4, 5
_ATTRIBUTE_NAME, _ATTRIBUTE_INT, _ATTRIBUTE_TENSOR = 1, 3, 5
_TENSOR_TYPE, _TENSOR_INT64_DATA, _TENSOR_NAME, _TENSOR_RAW_DATA = 2, 7, 8, 9
_INT64 = 7


@dataclass(frozen=True, slots=True)
class GraphFacts:
    """What a decoder graph computes, beyond its configuration.

    Attributes:
        window: The narrowest window that an attention node masks by itself, or None.
        rope_boundary: The length beyond which the graph takes LongRoPE's long factors, or
            None.
    """

    window: int | None
    rope_boundary: int | None


@dataclass(slots=True)
class _Node:
    op_type: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    integers: dict[str, int] = field(default_factory=dict)
    tensor: int | None = None


def read_graph_facts(model_path: Path) -> GraphFacts:
    """Read the nodes of an ONNX file that `check_onnx_files` has passed.

    Args:
        model_path: The file.
    """
    nodes: list[_Node] = []
    scalars: dict[str, int] = {}
    with (
        model_path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        for graph in fields(data, 0, len(data)):
            if graph.number != _MODEL_GRAPH or graph.wire != BYTES:
                continue
            for item in fields(data, graph.start, graph.end):
                if item.number == _GRAPH_NODE:
                    nodes.append(_read_node(data, item.start, item.end))
                elif item.number == _GRAPH_INITIALIZER:
                    name, value = _read_scalar(data, item.start, item.end)
                    if value is not None:
                        scalars[name] = value
    windows = (node.integers.get("local_window_size", -1) for node in nodes)
    return GraphFacts(
        window=min((window for window in windows if window > 0), default=None),
        rope_boundary=_boundary(nodes, scalars),
    )


def _boundary(nodes: list[_Node], scalars: dict[str, int]) -> int | None:
    """The constant of ``Greater(length, constant)``, which chooses a rotary table.

    The length is gathered from the shape of the attention mask, by Model Builder and by phirt.
    """
    gathered = {node.outputs[0] for node in nodes if node.op_type == "Gather" and node.outputs}
    constants = scalars | {
        node.outputs[0]: node.tensor
        for node in nodes
        if node.op_type == "Constant" and node.outputs and node.tensor is not None
    }
    for node in nodes:
        if node.op_type == "Greater" and len(node.inputs) == 2 and node.inputs[0] in gathered:
            return constants.get(node.inputs[1])
    return None


def _read_node(data: Buffer, start: int, end: int) -> _Node:
    node = _Node()
    for item in fields(data, start, end):
        if item.number == _NODE_INPUT:
            node.inputs.append(_text(bytes_of(data, item)))
        elif item.number == _NODE_OUTPUT:
            node.outputs.append(_text(bytes_of(data, item)))
        elif item.number == _NODE_OP_TYPE:
            node.op_type = _text(bytes_of(data, item))
        elif item.number == _NODE_ATTRIBUTE:
            _read_attribute(data, item.start, item.end, node)
    return node


def _read_attribute(data: Buffer, start: int, end: int, node: _Node) -> None:
    name, integer = "", None
    for item in fields(data, start, end):
        if item.number == _ATTRIBUTE_NAME:
            name = _text(bytes_of(data, item))
        elif item.number == _ATTRIBUTE_INT:
            integer = signed(item.value)
        elif item.number == _ATTRIBUTE_TENSOR:
            _, node.tensor = _read_scalar(data, item.start, item.end)
    if integer is not None:
        node.integers[name] = integer


def _read_scalar(data: Buffer, start: int, end: int) -> tuple[str, int | None]:
    """Name of a tensor, and its value where it is one int64."""
    name, kind, values = "", 0, list[int]()
    for item in fields(data, start, end):
        if item.number == _TENSOR_NAME:
            name = _text(bytes_of(data, item))
        elif item.number == _TENSOR_TYPE:
            kind = item.value
        elif item.number == _TENSOR_INT64_DATA:
            values += map(signed, packed_varints(data, item))
        elif item.number == _TENSOR_RAW_DATA and item.end - item.start == 8:
            values += np.frombuffer(bytes_of(data, item), "<i8").tolist()
    return name, values[0] if kind == _INT64 and len(values) == 1 else None


def _text(content: bytes) -> str:
    return content.decode("utf-8", errors="replace")
