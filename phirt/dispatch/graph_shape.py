"""What an ONNX graph's weights say of a decoder that its configuration does not.

Names, shapes and places are read; no weight is. They are those that phirt's converter and
onnxruntime-genai's Model Builder write.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from phirt.models.protobuf import (
    Buffer,
    Field,
    WireError,
    bytes_of,
    fields,
    open_buffer,
    packed_varints,
)
from phirt.models.remembered import Remembered

__all__ = ["GraphShape", "read_graph_shape"]

# Field numbers of onnx.proto.
_MODEL_GRAPH, _GRAPH_INITIALIZER = 7, 5
_TENSOR_DIMS, _TENSOR_NAME, _TENSOR_EXTERNAL = 1, 8, 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2

_GATE = re.compile(r"layers\.0[./]mlp[./]gate(_up)?_proj")
_HEAD = re.compile("lm_head")
_EMBEDDING = re.compile("embed")
_LONGEST_SEARCHED = 4096  # bytes: more are weights, and no copy of them is made
# A part of every name that is looked for: what has none of them need not be read.
_PARTS = (b"gate", b"lm_head", b"embed")


@dataclass(frozen=True, slots=True)
class GraphShape:
    """What the weights of a graph say.

    Attributes:
        intermediate_size: Width of the MLP.
        tied: Whether the LM head is the embedding, byte for byte.
    """

    intermediate_size: int
    tied: bool


@dataclass(frozen=True, slots=True)
class _Weights:
    """An initializer in another file."""

    name: str
    dims: tuple[int, ...]
    offset: int
    length: int


_KNOWN: Remembered[list[_Weights]] = Remembered()


def read_graph_shape(path: Path, *, hidden_size: int) -> GraphShape | None:
    """Read a graph; None where its weights have names that are not known here.

    Args:
        path: The .onnx file.
        hidden_size: Width of the residual stream.
    """
    try:
        with open_buffer(path) as data:
            weights = _KNOWN.of(data, lambda: list(_weights(data)))
    except (OSError, WireError, ValueError):  # to be told by the load, which reads it all
        return None
    gate = _largest(weights, _GATE)
    head = _largest(weights, _HEAD)
    embedding = _largest(weights, _EMBEDDING)
    if gate is None:
        return None
    # (out, in blocks, bytes) where it is quantized, else (out, in) or (in, out).
    others = [size for size in gate.dims[:2] if size != hidden_size] or [hidden_size]
    rows = gate.dims[0] if len(gate.dims) == 3 else others[0]
    return GraphShape(
        intermediate_size=rows // 2 if "gate_up" in gate.name else rows,
        tied=head is None or embedding is None or head.offset == embedding.offset,
    )


def _largest(weights: list[_Weights], pattern: re.Pattern[str]) -> _Weights | None:
    """The largest of some name, beside which are its scales and zero points."""
    found = [each for each in weights if pattern.search(each.name)]
    return max(found, key=lambda each: each.length, default=None)


def _weights(data: Buffer) -> Iterator[_Weights]:
    for graph in _of(data, 0, len(data), _MODEL_GRAPH):
        for tensor in _of(data, graph.start, graph.end, _GRAPH_INITIALIZER):
            if tensor.end - tensor.start < _LONGEST_SEARCHED:
                stored = bytes_of(data, tensor)
                if not any(part in stored for part in _PARTS):
                    continue
            weights = _read(data, tensor)
            if weights.dims:
                yield weights


def _read(data: Buffer, tensor: Field) -> _Weights:
    name = ""
    dims: list[int] = []
    place: dict[bytes, bytes] = {}
    for item in fields(data, tensor.start, tensor.end):
        if item.number == _TENSOR_DIMS:
            dims += packed_varints(data, item)
        elif item.number == _TENSOR_NAME:
            name = bytes_of(data, item).decode()
        elif item.number == _TENSOR_EXTERNAL:
            parts = {part.number: part for part in fields(data, item.start, item.end)}
            if parts.keys() >= {_ENTRY_KEY, _ENTRY_VALUE}:
                key, value = (bytes_of(data, parts[n]) for n in (_ENTRY_KEY, _ENTRY_VALUE))
                place[key] = value
    offset, length = (int(place.get(key, b"0")) for key in (b"offset", b"length"))
    return _Weights(name, tuple(dims), offset, length)


def _of(data: Buffer, start: int, end: int, number: int) -> Iterator[Field]:
    return (item for item in fields(data, start, end) if item.number == number)
