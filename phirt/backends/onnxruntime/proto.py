"""Two tiny ONNX models, written in protobuf's wire format.

They serve the adapter itself, so running a model must not need the `onnx` package for
them. Field numbers are those of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["identity_model", "top_model"]

_INT64 = 7
_IR_VERSION = 10
_OPSET = 18


def identity_model(element: int) -> bytes:
    """``y = Identity(x)``, for tensors of one element type and any shape."""
    return _model([_node("Identity", ["x"], ["y"])], [_value("x", element)], [_value("y", element)])


def top_model(element: int) -> bytes:
    """The ``k`` largest of the last axis of ``logits``, their ids, and the log-sum-exp of all.

    Inputs: ``logits`` (…, vocab) of one element type, ``k`` (1,) int64. Outputs: ``values``
    and ``ids`` (…, k), largest first and equal ones by ascending id; ``logsumexp`` (…).
    """
    nodes = [
        _node("TopK", ["logits", "k"], ["values", "ids"]),
        _node("ReduceLogSumExp", ["logits", "axes"], ["logsumexp"], keepdims=0),
    ]
    return _model(
        nodes,
        [_value("logits", element), _value("k", _INT64)],
        [_value("values", element), _value("ids", _INT64), _value("logsumexp", element)],
        initializers=[_int64s("axes", [-1])],
    )


def _model(
    nodes: Sequence[bytes],
    inputs: Sequence[bytes],
    outputs: Sequence[bytes],
    *,
    initializers: Sequence[bytes] = (),
) -> bytes:
    graph = b"".join(_bytes(1, node) for node in nodes) + _bytes(2, b"graph")
    graph += b"".join(_bytes(5, tensor) for tensor in initializers)
    graph += b"".join(_bytes(11, value) for value in inputs)
    graph += b"".join(_bytes(12, value) for value in outputs)
    return _varint(1, _IR_VERSION) + _bytes(7, graph) + _bytes(8, _varint(2, _OPSET))


def _node(op_type: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: int) -> bytes:
    node = b"".join(_bytes(1, name.encode()) for name in inputs)
    node += b"".join(_bytes(2, name.encode()) for name in outputs)
    node += _bytes(3, op_type.encode()) + _bytes(4, op_type.encode())
    for name, value in attributes.items():  # field 20 is the type, 2 an integer
        node += _bytes(5, _bytes(1, name.encode()) + _varint(3, value) + _varint(20, 2))
    return node


def _value(name: str, element: int) -> bytes:
    tensor = _bytes(1, _varint(1, element))
    return _bytes(1, name.encode()) + _bytes(2, tensor)


def _int64s(name: str, values: Sequence[int]) -> bytes:
    raw = b"".join(value.to_bytes(8, "little", signed=True) for value in values)
    return _varint(1, len(values)) + _varint(2, _INT64) + _bytes(8, name.encode()) + _bytes(9, raw)


def _varint(field: int, value: int) -> bytes:
    return _number(field << 3) + _number(value)


def _bytes(field: int, content: bytes) -> bytes:
    return _number(field << 3 | 2) + _number(len(content)) + content


def _number(value: int) -> bytes:
    encoded = b""
    while value > 0x7F:
        encoded += bytes([value & 0x7F | 0x80])
        value >>= 7
    return encoded + bytes([value])
