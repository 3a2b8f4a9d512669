"""GGUF's header: metadata and the table of tensors, walked with the bounds checked first.

Every number in the header is a claim of whoever wrote the file. It is compared with what the
file can hold before anything is allocated or repeated that many times, so a hostile file
costs no more than an honest one of its size.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. All integers are
little-endian:

    magic "GGUF" | version u32 | tensor count u64 | key count u64
    key count times:    key string | type u32 | value
    tensor count times: name string | rank u32 | dimensions u64... | encoding u32 | offset u64
    padding to the alignment | tensor data

A string is a u64 length and that many bytes of UTF-8; an array an element type (u32), a u64
count and the elements.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from math import prod
from typing import BinaryIO, TypeAlias

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from phirt.build.gguf.cursor import U32, U64, Cursor
from phirt.errors import UnsupportedModelError

__all__ = ["ArraySpan", "GgufHeader", "MetadataValue", "TensorInfo", "ValueType", "read_header"]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_ARRAY_LENGTH = 1 << 20
_MAX_RANK = 4  # GGML_MAX_DIMS


class ValueType(IntEnum):
    """Type of a metadata value, by its number in the file."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_SCALARS = {
    ValueType.UINT8: struct.Struct("<B"),
    ValueType.INT8: struct.Struct("<b"),
    ValueType.UINT16: struct.Struct("<H"),
    ValueType.INT16: struct.Struct("<h"),
    ValueType.UINT32: struct.Struct("<I"),
    ValueType.INT32: struct.Struct("<i"),
    ValueType.FLOAT32: struct.Struct("<f"),
    ValueType.BOOL: struct.Struct("<B"),
    ValueType.UINT64: struct.Struct("<Q"),
    ValueType.INT64: struct.Struct("<q"),
    ValueType.FLOAT64: struct.Struct("<d"),
}

# The fewest bytes that one entry can take: empty name, one value byte; empty name, rank 1.
_SMALLEST_PAIR = 8 + 4 + 1
_SMALLEST_TENSOR = 8 + 4 + 8 + 4 + 8


@dataclass(frozen=True, slots=True)
class ArraySpan:
    """Where an array of metadata lies; its elements are decoded when somebody asks.

    Attributes:
        element_type: Type of every element; never `ValueType.ARRAY`.
        count: Number of elements.
        offset: First byte of the first element, from the start of the file.
        nbytes: Bytes of all elements together.
    """

    element_type: ValueType
    count: int
    offset: int
    nbytes: int


MetadataValue: TypeAlias = int | float | bool | bytes | ArraySpan
"""A metadata value. Strings are bytes here: only a reader of the key knows if they must be text."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One row of the table of tensors, checked against the file's size.

    Attributes:
        name: Name in llama.cpp's convention, such as ``"blk.0.attn_q.weight"``.
        shape: Dimensions, slowest first (the file lists them fastest first).
        encoding: GGML's name of the encoding, such as ``"Q4_1"``.
        offset: First byte of the data, from the start of the file.
        nbytes: Bytes of data.
    """

    name: str
    shape: tuple[int, ...]
    encoding: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Everything in front of the tensor data.

    Attributes:
        version: GGUF version, 2 or 3.
        metadata: Values by key.
        tensors: Tensors by name, in the order of the file.
    """

    version: int
    metadata: Mapping[str, MetadataValue]
    tensors: Mapping[str, TensorInfo]


def read_header(file: BinaryIO, *, size: int, name: str) -> GgufHeader:
    """Walk the header of a GGUF file.

    Args:
        file: The file, opened for reading in binary.
        size: Its size in bytes.
        name: What messages call it.

    Raises:
        ModelFormatError: The header contradicts itself, the format or the file's size.
        UnsupportedModelError: It is another version, big-endian, or holds a tensor in an
            encoding that the ``gguf`` package does not know.
    """
    cursor = Cursor(file, size=size, name=name)
    version = _read_preamble(cursor)
    tensor_count = cursor.count("the number of tensors", smallest=_SMALLEST_TENSOR)
    pair_count = cursor.count("the number of keys", smallest=_SMALLEST_PAIR)
    metadata = _read_metadata(cursor, pair_count)
    alignment = _alignment(cursor, metadata)
    rows = _read_tensor_table(cursor, tensor_count)
    data_start = -(-cursor.position // alignment) * alignment
    tensors = _place_tensors(cursor, rows, data_start=data_start, alignment=alignment)
    return GgufHeader(version=version, metadata=metadata, tensors=tensors)


def _read_preamble(cursor: Cursor) -> int:
    if (magic := cursor.take(4, "the magic number")) != _MAGIC:
        cursor.fail(f"the file starts with {magic!r}, not {_MAGIC!r}: it is not GGUF", at=0)
    version = cursor.unsigned(U32, "the version")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        found = f"big-endian, version {swapped}" if swapped in (1, 2, 3) else f"version {version}"
        raise UnsupportedModelError(
            f"{cursor.name}: GGUF {found}. phirt reads little-endian versions 2 and 3; "
            "convert the model again with a current llama.cpp."
        )
    return version


def _read_metadata(cursor: Cursor, count: int) -> dict[str, MetadataValue]:
    metadata: dict[str, MetadataValue] = {}
    for index in range(count):
        start = cursor.position
        key = cursor.text(f"key {index + 1} of {count}")
        if key in metadata:
            cursor.fail(f"key {key!r} occurs twice", at=start)
        metadata[key] = _read_value(cursor, key)
    return metadata


def _read_value(cursor: Cursor, key: str) -> MetadataValue:
    what = f"the value of {key!r}"
    value_type = _value_type(cursor, what)
    if value_type is ValueType.STRING:
        return cursor.string(what)
    if value_type is ValueType.ARRAY:
        return _read_array(cursor, what)
    start = cursor.position
    value = cursor.scalar(_SCALARS[value_type], what)
    if value_type is not ValueType.BOOL:
        return value
    if value not in (0, 1):
        cursor.fail(f"{what} is a boolean of {value}", at=start)
    return bool(value)


def _read_array(cursor: Cursor, what: str) -> ArraySpan:
    element_type = _value_type(cursor, what)
    if element_type is ValueType.ARRAY:
        cursor.fail(f"{what} is an array of arrays, which GGUF writers do not make")
    width = 8 if element_type is ValueType.STRING else _SCALARS[element_type].size
    start = cursor.position
    count = cursor.count(f"the length of {what}", smallest=width)
    if count > _MAX_ARRAY_LENGTH:
        cursor.fail(f"{what} has {count:,} elements, more than {_MAX_ARRAY_LENGTH:,}", at=start)
    offset = cursor.position
    if element_type is ValueType.STRING:
        cursor.skip_strings(count, what)
    else:
        cursor.require(count * width, what)
        cursor.position += count * width
    return ArraySpan(element_type, count, offset, cursor.position - offset)


def _value_type(cursor: Cursor, what: str) -> ValueType:
    start = cursor.position
    number = cursor.unsigned(U32, f"the type of {what}")
    try:
        return ValueType(number)
    except ValueError:
        cursor.fail(f"{what} has type {number}, which GGUF does not define", at=start)


def _alignment(cursor: Cursor, metadata: Mapping[str, MetadataValue]) -> int:
    value = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0 or value & (value - 1):
        cursor.fail(f"general.alignment is {value!r}, not a power of two")
    return value


@dataclass(frozen=True, slots=True)
class _TableRow:
    """A row of the table as it stands: nothing but its own bytes has been checked."""

    name: str
    shape: tuple[int, ...]
    encoding: int
    offset: int
    position: int


def _read_tensor_table(cursor: Cursor, count: int) -> list[_TableRow]:
    rows: list[_TableRow] = []
    names: set[str] = set()
    for index in range(count):
        start = cursor.position
        name = cursor.text(f"the name of tensor {index + 1} of {count}")
        if name in names:
            cursor.fail(f"tensor {name!r} occurs twice", at=start)
        names.add(name)
        what = f"tensor {name!r}"
        rank = cursor.unsigned(U32, f"the rank of {what}")
        if not 1 <= rank <= _MAX_RANK:
            cursor.fail(f"{what} has {rank:,} dimensions, not 1 to {_MAX_RANK}", at=start)
        shape = [cursor.unsigned(U64, f"a dimension of {what}") for _ in range(rank)]
        encoding = cursor.unsigned(U32, f"the encoding of {what}")
        offset = cursor.unsigned(U64, f"the offset of {what}")
        rows.append(_TableRow(name, tuple(reversed(shape)), encoding, offset, start))
    return rows


def _place_tensors(
    cursor: Cursor, rows: list[_TableRow], *, data_start: int, alignment: int
) -> dict[str, TensorInfo]:
    """Turn offsets into places in the file and see that each tensor has its own."""
    tensors: dict[str, TensorInfo] = {}
    for row in rows:
        what = f"tensor {row.name!r}"
        try:
            encoding = GGMLQuantizationType(row.encoding)
        except ValueError:
            raise UnsupportedModelError(
                f"{cursor.name}: {what} is stored in encoding number {row.encoding}, which the "
                "installed gguf package does not know. Upgrade gguf or use another file."
            ) from None
        block_length, block_bytes = GGML_QUANT_SIZES[encoding]
        if min(row.shape) == 0 or row.shape[-1] % block_length:
            cursor.fail(
                f"{what} has shape {row.shape}: its rows do not divide into blocks of "
                f"{block_length} ({encoding.name})",
                at=row.position,
            )
        nbytes = prod(row.shape) // block_length * block_bytes
        offset = data_start + row.offset
        if row.offset % alignment:
            cursor.fail(
                f"{what} lies at offset {row.offset:,}, not a multiple of {alignment:,}",
                at=row.position,
            )
        if offset + nbytes > cursor.size:
            cursor.fail(
                f"{what} of shape {row.shape} ({encoding.name}) ends at byte {offset + nbytes:,}, "
                "past the end of the file",
                at=row.position,
            )
        tensors[row.name] = TensorInfo(row.name, row.shape, encoding.name, offset, nbytes)
    _refuse_overlap(cursor, tensors)
    return tensors


def _refuse_overlap(cursor: Cursor, tensors: Mapping[str, TensorInfo]) -> None:
    end, owner = 0, ""
    for info in sorted(tensors.values(), key=lambda info: info.offset):
        if info.offset < end:
            cursor.fail(f"tensor {info.name!r} overlaps tensor {owner!r}", at=info.offset)
        end, owner = info.offset + info.nbytes, info.name
