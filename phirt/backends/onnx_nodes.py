"""What an ONNX graph's nodes say that its inputs do not, to every adapter that runs one.

Attention windows, LongRoPE's boundary, and which nodes prove where a model runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from phirt.errors import ModelFormatError
from phirt.models.huggingface_config import ConfigFacts
from phirt.models.protobuf import (
    BYTES,
    VARINT,
    Buffer,
    Field,
    WireError,
    bytes_of,
    fields,
    open_buffer,
    packed_varints,
    signed,
)
from phirt.models.remembered import Remembered

__all__ = ["GraphNodes", "integer_fields", "is_heavy", "read_nodes", "supported_context"]

# Field numbers of onnx.proto.
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_TYPE, _NODE_ATTRIBUTE = 1, 2, 3, 4, 5
_ATTRIBUTE_NAME, _ATTRIBUTE_INT, _ATTRIBUTE_TENSOR = 1, 3, 5
_TENSOR_DIMS, _TENSOR_INTS, _TENSOR_NAME, _TENSOR_RAW = 1, 7, 8, 9
_COSINES = 7  # GroupQueryAttention's input

# The nodes that choose LongRoPE's factors: in Model Builder's graphs by the mask's width or
# by the highest position, and in phirt's by the mask's width.
_CHOOSERS = (
    "/model/rope_caches_subgraph/Greater",
    "/model/pos_ids_reformat/GreaterOrEqual",
    "/model/rope/is_long",
)

_HEAVY = re.compile(r"MatMul|Gemm|Attention|MoE")


def is_heavy(operator: str) -> bool:
    """Whether nodes of an operator must be on the device for a model to count as running there.

    These are products of matrices and attention. The rest, shapes, lengths and masks of a few
    integers, belongs on the CPU: providers leave it there on purpose.

    Args:
        operator: Such as ``"MatMulNBits"`` or ``"GroupQueryAttention"``.
    """
    return _HEAVY.search(operator) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphNodes:
    """Facts about a decoder graph.

    Attributes:
        windows: ``local_window_size`` of each attention node of GroupQueryAttention, in the
            order of the graph; None for full attention.
        least_capacity: Positions that the cache must have room for at least: the widest
            window of a node that rolls its cache on (``sliding_window_cache``), else 0.
        rope_boundary: Longest sequence for which it takes LongRoPE's short factors, or None.
        rotary_dims: Of each attention node that rotates keys itself, halves against each other:
            how many channels of a head it rotates, from the first on. None of one whose keys
            are rotated otherwise, or where its tables do not tell.
    """

    windows: tuple[int | None, ...]
    least_capacity: int
    rope_boundary: int | None
    rotary_dims: tuple[int | None, ...] = ()

    @property
    def window(self) -> int | None:
        """The narrowest window, or None."""
        return min((size for size in self.windows if size is not None), default=None)


def read_nodes(path: Path) -> GraphNodes:
    """Walk a graph's nodes; weights are passed over.

    Raises:
        ModelFormatError: The file is not an ONNX model.
    """
    try:
        with open_buffer(path) as data:
            return _KNOWN.of(data, lambda: _walk(data))
    except (WireError, ValueError, UnicodeDecodeError) as error:
        raise ModelFormatError(f"{path} is not a sound ONNX model: {error}.") from error


_KNOWN: Remembered[GraphNodes] = Remembered()


def _walk(data: Buffer) -> GraphNodes:
    windows: list[int | None] = []
    least_capacity = 0
    chooser: list[str] = []
    constants: dict[str, Field] = {}
    sources: dict[str, str] = {}  # of what a Slice makes
    tables: list[str | None] = []
    for graph in _of(data, 0, len(data), _MODEL_GRAPH):
        for item in fields(data, graph.start, graph.end):
            if item.number == _GRAPH_INITIALIZER:
                constants[_text(data, item, _TENSOR_NAME)] = item
            if item.number != _GRAPH_NODE:
                continue
            kind = _text(data, item, _NODE_TYPE)
            if kind == "GroupQueryAttention":
                attributes = _integers(data, item)
                window = attributes.get("local_window_size", -1)
                windows.append(window if window > 0 else None)
                if attributes.get("sliding_window_cache"):
                    least_capacity = max(least_capacity, window)
                tables.append(_rotary_table(data, item, attributes))
            elif kind == "Slice":
                sources[_text(data, item, _NODE_OUTPUT)] = _text(data, item, _NODE_INPUT)
            elif kind == "Constant":
                for attribute in _of(data, item.start, item.end, _NODE_ATTRIBUTE):
                    for tensor in _of(data, attribute.start, attribute.end, _ATTRIBUTE_TENSOR):
                        constants[_text(data, item, _NODE_OUTPUT)] = tensor
            elif _text(data, item, _NODE_NAME) in _CHOOSERS:
                inputs = _of(data, item.start, item.end, _NODE_INPUT)
                chooser = [bytes_of(data, name).decode() for name in inputs]
    known = [constants[name] for name in chooser if name in constants]
    dims = [None if name is None else constants.get(sources.get(name, name)) for name in tables]
    return GraphNodes(
        windows=tuple(windows),
        least_capacity=least_capacity,
        rope_boundary=_integer(data, known[0]) if known else None,
        rotary_dims=tuple(None if table is None else _rotated(data, table) for table in dims),
    )


def _rotary_table(data: Buffer, node: Field, attributes: Mapping[str, int]) -> str | None:
    """Name of the cosines of a node that rotates one half of a head against the other."""
    names = _of(data, node.start, node.end, _NODE_INPUT)
    if attributes.get("rotary_interleaved") or not attributes.get("do_rotary"):
        return None
    return bytes_of(data, names[_COSINES]).decode() if len(names) > _COSINES else None


def _rotated(data: Buffer, cosines: Field) -> int | None:
    """Channels that a table rotates: it has a column for two of them."""
    sizes = [
        size
        for field in _of(data, cosines.start, cosines.end, _TENSOR_DIMS)
        for size in packed_varints(data, field)
    ]
    return 2 * sizes[-1] if sizes else None


def integer_fields(data: Buffer, *, operator: str, attribute: str) -> Iterator[Field]:
    """Where an integer attribute of every node of an operator stands in a serialized model.

    Raises:
        WireError: It is not an ONNX model.
    """
    for graph in _of(data, 0, len(data), _MODEL_GRAPH):
        for node in _of(data, graph.start, graph.end, _GRAPH_NODE):
            if _text(data, node, _NODE_TYPE) != operator:
                continue
            for item in _of(data, node.start, node.end, _NODE_ATTRIBUTE):
                if _text(data, item, _ATTRIBUTE_NAME) == attribute:
                    yield from _of(data, item.start, item.end, _ATTRIBUTE_INT)


def _integers(data: Buffer, node: Field) -> dict[str, int]:
    """A node's integer attributes."""
    found = {}
    for attribute in _of(data, node.start, node.end, _NODE_ATTRIBUTE):
        for field in _of(data, attribute.start, attribute.end, _ATTRIBUTE_INT):
            found[_text(data, attribute, _ATTRIBUTE_NAME)] = signed(field.value)
    return found


def supported_context(nodes: GraphNodes, facts: ConfigFacts) -> int:
    """The longest sequence for which a graph computes what its model is, in tokens.

    Model Builder 0.18 writes full attention for a model whose configuration gives a window
    without saying which layers have it (mistral), and an export that was traced has the
    rotary factors of the sequence that it was traced with. Up to the window, or the boundary
    of the factors, such a graph is right.
    """
    length = facts.context_length
    if facts.window is not None and nodes.windows and not any(nodes.windows):
        length = min(length, facts.window)
    if facts.rope_boundary is not None and nodes.rope_boundary is None:
        length = min(length, facts.rope_boundary)
    return length


def _integer(data: Buffer, tensor: Field) -> int | None:
    """The first value of an int64 tensor."""
    for raw in _of(data, tensor.start, tensor.end, _TENSOR_RAW):
        return int.from_bytes(data[raw.start : raw.start + 8], "little", signed=True)
    for field in _of(data, tensor.start, tensor.end, _TENSOR_INTS):
        return signed(next(packed_varints(data, field)))
    return None


def _of(data: Buffer, start: int, end: int, number: int) -> list[Field]:
    return [
        field
        for field in fields(data, start, end)
        if field.number == number and field.wire in (BYTES, VARINT)
    ]


def _text(data: Buffer, message: Field, number: int) -> str:
    found = _of(data, message.start, message.end, number)
    return bytes_of(data, found[0]).decode() if found else ""
