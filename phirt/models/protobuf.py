"""Protobuf's wire format: fields read by number, in place, nothing copied; and a few written.

The `onnx` package could parse a model too. For the int4 graph of a 135M model (226 kB, 343
nodes, 365 initializers) importing it costs 55 ms and parsing 1 ms, where a check by this walk
takes 13 ms in all; it copies weights that are embedded in the graph, up to 2 GB, only to look
at their shapes; and running a model would need it installed. The wire format has been frozen
since 2008 and needs one page.
Reference: the "Encoding" chapter of the Protocol Buffers documentation.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeAlias

__all__ = [
    "BYTES",
    "VARINT",
    "Buffer",
    "Field",
    "WireError",
    "bytes_of",
    "copy_of",
    "encode_bytes",
    "encode_number",
    "fields",
    "open_buffer",
    "packed_varints",
    "signed",
]

Buffer: TypeAlias = bytes | mmap.mmap
"""What is walked: indexing gives an int, slicing gives bytes."""

VARINT = 0
BYTES = 2
_FIXED = {1: 8, 5: 4}
_MASK = (1 << 64) - 1
_MOST_READ = 16 << 20


class WireError(ValueError):
    """The bytes are not a protobuf message."""


class Field(NamedTuple):
    """One field of a message.

    Attributes:
        number: Field number.
        wire: Wire type: 0 varint, 1 eight bytes, 2 length-delimited, 5 four bytes.
        value: The value of a varint, as unsigned 64 bits; 0 otherwise.
        start: Where the content begins.
        end: One past where it ends.
    """

    number: int
    wire: int
    value: int
    start: int
    end: int


_new = tuple.__new__  # what the class's own constructor calls, in a third of the time


def fields(data: Buffer, start: int, end: int) -> Iterator[Field]:
    """The fields of the message in ``data[start:end]``, in order.

    Raises:
        WireError: The message is truncated or not one.
    """
    position = start
    while position < end:
        # Most numbers are of one byte, and a call for each would be most of the walk.
        tag = data[position]
        if tag < 0x80:
            position += 1
        else:
            tag, position = _varint(data, position, end)
        number, wire = tag >> 3, tag & 7
        if number == 0:
            raise WireError(f"field number 0 at byte {position}")
        if wire == VARINT:
            begin = position
            value, position = _varint(data, position, end)
            yield _new(Field, (number, wire, value, begin, position))
            continue
        if wire == BYTES:
            if position < end and (size := data[position]) < 0x80:
                position += 1
            else:
                size, position = _varint(data, position, end)
        elif wire in _FIXED:
            size = _FIXED[wire]
        else:  # 3 and 4 are groups, which no ONNX writer uses
            raise WireError(f"wire type {wire} at byte {position}")
        if size > end - position:
            raise WireError(
                f"a field of {size:,} bytes at byte {position}, where {end - position:,} are left"
            )
        yield _new(Field, (number, wire, 0, position, position + size))
        position += size


@contextmanager
def open_buffer(path: Path) -> Iterator[Buffer]:
    """The bytes of a file: read where they are few, as without weights in them, else mapped.

    Raises:
        OSError: It cannot be read.
        ValueError: It cannot be mapped.
    """
    with path.open("rb") as file:
        # Indexing bytes takes half the time of indexing a mapped file.
        if path.stat().st_size <= _MOST_READ:
            yield file.read()
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data


def packed_varints(data: Buffer, field: Field) -> Iterator[int]:
    """The values of a repeated integer field, packed or not, as unsigned 64 bits."""
    if field.wire == VARINT:
        yield field.value
        return
    position = field.start
    while position < field.end:
        value, position = _varint(data, position, field.end)
        yield value


def signed(value: int) -> int:
    """An unsigned 64-bit value as the signed one that it encodes."""
    return value - (1 << 64) if value >> 63 else value


def bytes_of(data: Buffer, field: Field) -> bytes:
    """The content of a length-delimited field, copied."""
    return data[field.start : field.end]


def encode_number(number: int, value: int) -> bytes:
    """A field that holds an integer of at least 0."""
    return _encode_varint(number << 3 | VARINT) + _encode_varint(value)


def encode_bytes(number: int, content: bytes) -> bytes:
    """A length-delimited field: bytes, a text in UTF-8, or a message."""
    return _encode_varint(number << 3 | BYTES) + _encode_varint(len(content)) + content


def copy_of(data: Buffer, field: Field) -> bytes:
    """A field as it stands, with its number."""
    content = data[field.start : field.end]
    if field.wire == BYTES:
        return encode_bytes(field.number, content)
    return _encode_varint(field.number << 3 | field.wire) + content


def _encode_varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _varint(data: Buffer, position: int, end: int) -> tuple[int, int]:
    if position < end and (byte := data[position]) < 0x80:  # most are of one byte
        return byte, position + 1
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            raise WireError(f"the message ends inside a number, at byte {position}")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & _MASK, position
    raise WireError(f"a number of more than ten bytes, before byte {position}")
