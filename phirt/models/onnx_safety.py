"""Checks an ONNX model's claims about files and sizes before a runtime acts on them.

A runtime opens the files that a model names and allocates what its shapes say. This looks
at every tensor of the model first: those of the graph, of subgraphs in node attributes, of
functions, of training information and of sparse tensors. What a graph computes, and
operators that do not exist, are the runtime's own to judge.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from phirt.errors import ModelFormatError, ModelNotFoundError
from phirt.models.paths import check_links, resolve_inside
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

__all__ = ["check_onnx_files"]

_MAX_GRAPH_BYTES = 1 << 31  # protobuf's own limit
_MAX_FIELDS = 5_000_000  # a decoder of 70 billion parameters has some 200,000
_MAX_NESTING = 64
_MAX_RANK = 32
_MAX_DIM_FIELD_BYTES = 10 * _MAX_RANK
_MAX_TEXT_BYTES = 4096
# Runtimes unpack a sparse initializer at load. At most 2 GiB of the widest type, as of the
# dense ones that a graph can embed.
_MAX_SPARSE_ELEMENTS = 1 << 27
# Tied weights refer to one region twice; a model that refers to one region a thousand times
# asks for a thousand copies of it.
_MAX_REUSE = 4

# Which fields of an ONNX message hold a message that may lead to a tensor: field number ->
# (kind of message, whether it is repeated). Source: onnx.proto of ONNX 1.20.
_CHILDREN: dict[str, dict[int, tuple[str, bool]]] = {
    "model": {7: ("graph", False), 20: ("training", True), 25: ("function", True)},
    "graph": {1: ("node", True), 5: ("tensor", True), 15: ("sparse", True)},
    "node": {5: ("attribute", True)},
    "attribute": {
        5: ("tensor", False),
        6: ("graph", False),
        10: ("tensor", True),
        11: ("graph", True),
        22: ("sparse", False),
        23: ("sparse", True),
    },
    "function": {7: ("node", True), 11: ("attribute", True)},
    "training": {1: ("graph", False), 2: ("graph", False)},
    "sparse": {1: ("tensor", False), 2: ("tensor", False)},
}
_MODEL_REQUIRES = {1: "ir_version", 7: "graph", 8: "opset_import"}

# TensorProto.DataType -> bits of one element.
_STRING = 8
_BITS = (
    dict.fromkeys((2, 3, 9, 17, 18, 19, 20, 24), 8)
    | dict.fromkeys((4, 5, 10, 16), 16)
    | dict.fromkeys((1, 6, 12), 32)
    | dict.fromkeys((7, 11, 13, 14), 64)
    | {15: 128, 21: 4, 22: 4, 23: 4, 25: 2, 26: 2, 27: 6, 28: 6}
)
# float_data, int32_data, int64_data, double_data, uint64_data
_TYPED_DATA = {4, 5, 7, 10, 11}
_MAX_ELEMENTS_PER_BYTE = 4  # two-bit integers, packed


@dataclass(slots=True)
class _Tensor:
    """What a TensorProto says about itself."""

    name: str = "?"
    dims: list[int] = field(default_factory=list)
    data_type: int = 0
    external: bool = False
    entries: list[tuple[str, str]] = field(default_factory=list)
    raw_bytes: int | None = None
    typed_bytes: int = 0
    strings: int = 0


def check_onnx_files(folder: Path, model_file: str) -> None:
    """Check an ONNX file, and every file that it refers to, before a runtime opens it.

    Args:
        folder: The model folder.
        model_file: Plain name of the ONNX file in it.

    Raises:
        ModelNotFoundError: The file, or one that holds its weights, is missing.
        ModelFormatError: It is truncated or not ONNX; an offset or a length lies outside
            its file; a dimension is negative, or a shape does not fit the bytes there are.
        UnsafeModelError: It refers to a file outside the folder, by path or through a
            link, or another entry of the folder is such a link.
    """
    check_links(folder)
    path = resolve_inside(folder, model_file)
    try:
        size = path.stat().st_size
        if size == 0:
            raise ModelFormatError(f"{folder / model_file} is empty.")
        if size >= _MAX_GRAPH_BYTES:
            raise ModelFormatError(f"{folder / model_file} exceeds protobuf's 2 GiB.")
        with open_buffer(path) as data:
            _Checker(folder, folder / model_file, data).check()
    except FileNotFoundError as error:
        if isinstance(error, ModelNotFoundError):
            raise
        raise ModelNotFoundError(f"There is no file {folder / model_file}.") from error
    except OSError as error:
        raise ModelFormatError(f"{folder / model_file} cannot be read: {error}.") from error


# Of the graphs that passed: sizes of the files of external data, by location. All that is
# checked follows from these and from the graph's bytes.
_PASSED: Remembered[Mapping[str, int]] = Remembered()


class _Checker:
    """One pass over one model."""

    def __init__(self, folder: Path, path: Path, data: Buffer) -> None:
        self._folder = folder
        self._path = path
        self._data = data
        self._fields_left = _MAX_FIELDS
        self._sizes: dict[str, int] = {}  # of the files of external data, by location
        self._external_bytes = 0

    def check(self) -> None:
        if self._has_passed(_PASSED.known(self._data)):
            return
        try:
            for start, end in self._tensors():
                self._check_tensor(self._tensor(start, end))
        except WireError as error:
            self._fail(f"is truncated or not an ONNX model: {error}")
        self._check_reuse()
        _PASSED.keep(self._data, self._sizes)

    def _has_passed(self, sizes: Mapping[str, int] | None) -> bool:
        """Whether the same bytes passed beside files of the same sizes, which still are there."""
        return sizes is not None and all(
            self._size_of(location) == size for location, size in sizes.items()
        )

    def _check_reuse(self) -> None:
        held = sum(self._sizes.values())
        if self._external_bytes > _MAX_REUSE * held:
            self._fail(
                f"claims {self._external_bytes:,} bytes of weights from files that hold {held:,}"
            )

    def _fields(self, start: int, end: int) -> Iterator[Field]:
        # A field takes two bytes at the least: a small file cannot have too many.
        if len(self._data) <= 2 * _MAX_FIELDS:
            return fields(self._data, start, end)
        return self._counted(start, end)

    def _counted(self, start: int, end: int) -> Iterator[Field]:
        for item in fields(self._data, start, end):
            self._fields_left -= 1
            if self._fields_left < 0:
                self._fail(f"has more than {_MAX_FIELDS:,} fields")
            yield item

    def _tensors(self) -> Iterator[tuple[int, int]]:
        """Where every TensorProto of the model lies, at any depth."""
        pending = [("model", 0, len(self._data), 0)]
        while pending:
            kind, start, end, depth = pending.pop()
            if kind == "tensor":
                yield start, end
                continue
            if kind == "sparse":
                self._check_sparse(start, end)
            if depth > _MAX_NESTING:
                self._fail(f"is nested more than {_MAX_NESTING} deep")
            seen: set[int] = set()
            children = _CHILDREN[kind]
            for item in self._fields(start, end):
                # Parsers merge the parts of a message that comes in several, so a check of
                # each part alone would prove nothing. No writer does that.
                child = children.get(item.number) if item.wire == BYTES else None
                if child and not child[1] and item.number in seen:
                    self._fail(f"holds a {child[0]} in several parts, at byte {item.start}")
                seen.add(item.number)
                if child:
                    pending.append((child[0], item.start, item.end, depth + 1))
            if kind == "model":
                missing = [name for number, name in _MODEL_REQUIRES.items() if number not in seen]
                if missing:
                    self._fail(f"is truncated or not an ONNX model: it lacks {missing[0]}")

    def _tensor(self, start: int, end: int) -> _Tensor:
        tensor = _Tensor()
        for item in self._fields(start, end):
            if item.number == 1 and item.wire in {VARINT, BYTES}:
                self._extend_dims(tensor.dims, item)
            elif item.wire == VARINT and item.number == 2:
                tensor.data_type = item.value
            elif item.wire == VARINT and item.number == 14:
                tensor.external = item.value == 1
            elif item.wire == BYTES and item.number == 8:
                tensor.name = self._text(item)
            elif item.wire == BYTES and item.number == 9:
                tensor.raw_bytes = item.end - item.start
            elif item.wire == BYTES and item.number == 13:
                tensor.entries.append(self._entry(item))
            elif item.number in _TYPED_DATA:
                tensor.typed_bytes += item.end - item.start
            elif item.number == 6:
                tensor.strings += 1
        return tensor

    def _extend_dims(self, dims: list[int], item: Field) -> None:
        if item.end - item.start > _MAX_DIM_FIELD_BYTES or len(dims) > _MAX_RANK:
            self._fail(f"has a tensor of more than {_MAX_RANK} dimensions")
        dims.extend(map(signed, packed_varints(self._data, item)))

    def _check_sparse(self, start: int, end: int) -> None:
        dims: list[int] = []
        for item in self._fields(start, end):
            if item.number == 3 and item.wire in {VARINT, BYTES}:
                self._extend_dims(dims, item)
        if any(dim < 0 for dim in dims) or math.prod(dims) > _MAX_SPARSE_ELEMENTS:
            self._fail(f"has a sparse tensor of the shape {dims}")

    def _entry(self, item: Field) -> tuple[str, str]:
        texts = {1: "", 2: ""}
        for part in self._fields(item.start, item.end):
            if part.wire == BYTES and part.number in texts:
                texts[part.number] = self._text(part)
        return texts[1], texts[2]

    def _text(self, item: Field) -> str:
        if item.end - item.start > _MAX_TEXT_BYTES:
            self._fail(f"has a name of {item.end - item.start:,} bytes")
        try:
            return bytes_of(self._data, item).decode("utf-8")
        except UnicodeDecodeError:
            self._fail(f"has a name that is not UTF-8, at byte {item.start}")

    def _check_tensor(self, tensor: _Tensor) -> None:
        # Locations first, and all of them, whatever the rest says: which of two a runtime
        # would take, and whether it looks at data_location, is not for a check to guess.
        locations = [value for key, value in tensor.entries if key == "location"]
        for location in locations:
            self._size_of(location)
        if any(dim < 0 for dim in tensor.dims):
            self._fail(f"gives the tensor {tensor.name!r} a negative dimension: {tensor.dims}")
        elements = math.prod(tensor.dims)
        if tensor.external or tensor.entries:
            self._check_external(tensor, locations, elements)
        elif tensor.data_type == _STRING:
            if elements != tensor.strings:
                self._disagree(tensor, f"{tensor.strings:,} strings")
        elif tensor.raw_bytes is not None:
            if tensor.raw_bytes != self._bytes(tensor, elements):
                self._disagree(tensor, f"{tensor.raw_bytes:,} bytes")
        elif elements > _MAX_ELEMENTS_PER_BYTE * tensor.typed_bytes:
            self._disagree(tensor, f"{tensor.typed_bytes:,} bytes")

    def _check_external(self, tensor: _Tensor, locations: list[str], elements: int) -> None:
        if len(locations) != 1:
            self._fail(f"gives the tensor {tensor.name!r} {len(locations)} locations")
        size = self._size_of(locations[0])
        offset = self._number(tensor, "offset")
        length = self._number(tensor, "length")
        expected = self._bytes(tensor, elements)
        if length is not None and length != expected:
            self._disagree(tensor, f"{length:,} bytes in {locations[0]}")
        if (offset or 0) + expected > size:
            self._fail(
                f"places the tensor {tensor.name!r} at bytes {offset or 0:,} to "
                f"{(offset or 0) + expected:,} of {locations[0]}, which has {size:,}"
            )
        self._external_bytes += expected

    def _size_of(self, location: str) -> int:
        """Size of a file of external data, in bytes."""
        if location not in self._sizes:
            target = resolve_inside(self._folder, location)
            if not target.is_file():
                raise ModelNotFoundError(
                    f"{self._path} keeps weights in {location!r}, which is not in its folder. "
                    "The model is incomplete: fetch that file too."
                )
            self._sizes[location] = target.stat().st_size
        return self._sizes[location]

    def _number(self, tensor: _Tensor, key: str) -> int | None:
        values = [value for entry, value in tensor.entries if entry == key]
        if not values:
            return None
        value = values[0]
        if len(values) > 1 or not (value.isascii() and value.isdigit() and len(value) <= 19):
            self._fail(f"gives the tensor {tensor.name!r} the {key} {', '.join(values)[:80]!r}")
        return int(value)

    def _bytes(self, tensor: _Tensor, elements: int) -> int:
        bits = _BITS.get(tensor.data_type)
        if bits is None:
            self._fail(f"gives the tensor {tensor.name!r} the data type {tensor.data_type}")
        return (elements * bits + 7) // 8

    def _disagree(self, tensor: _Tensor, found: str) -> NoReturn:
        self._fail(f"gives the tensor {tensor.name!r} the shape {tensor.dims}, but {found}")

    def _fail(self, problem: str) -> NoReturn:
        raise ModelFormatError(f"{self._path} {problem}. The file is damaged: fetch it again.")
