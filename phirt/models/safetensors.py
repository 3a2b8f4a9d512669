"""Safetensors files, mapped into memory: what they hold is checked before anything is read.

The format (https://github.com/huggingface/safetensors#format): 8 bytes, the length of the
header, little-endian; the header, a JSON object of name to dtype, shape and byte range;
the data, without holes. The checks are those of the official library and a few more, of
numbers that no model needs.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from threading import Lock
from typing import Any, NoReturn, Self

import numpy as np
from numpy.typing import NDArray

from phirt.errors import ModelFormatError, ModelNotFoundError, UnsupportedModelError
from phirt.models.paths import plain_name_fault, resolve_inside
from phirt.models.safe_json import JsonFields, parse_json, read_json
from phirt.types import FloatArray

__all__ = [
    "INDEX_NAME",
    "Header",
    "SafetensorsFolder",
    "TensorEntry",
    "encode_header",
    "open_tensors",
    "read_header",
    "weight_files",
]

INDEX_NAME = "model.safetensors.index.json"

_SINGLE_NAME = "model.safetensors"
_SHARDS = "model*.safetensors"

# The format allows headers of 100 MB, which would cost gigabytes to parse. The longest seen
# (of one file with 100,000 tensors) is a tenth of this.
_MAX_HEADER_BYTES = 16 << 20
_MAX_DIMENSIONS = 16
_MAX_DIMENSION = 1 << 32
_MAX_OFFSET = 1 << 48
_ALIGNMENT = 8  # The header is padded to it, so that readers can map the tensors.

# Bits per element. Those below 8 are packed.
_BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor, as a file's header describes it.

    Attributes:
        dtype: Element type in the format's words, such as ``"BF16"``.
        shape: Its sizes.
        offset: Its first byte in the file.
        nbytes: How many it has.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself, and nothing of it that its size contradicts.

    Attributes:
        metadata: Its ``__metadata__``.
        tensors: Its tensors by name, in the order of their bytes.
    """

    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorEntry]


@contextmanager
def open_tensors(path: Path) -> Iterator[BufferedReader]:
    """Open a file of tensors for as long as the ``with`` statement lasts.

    Raises:
        ModelNotFoundError: There is no such file.
        ModelFormatError: It is not a regular file, or reading it fails.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would block
            _fail(path, "it is not a regular file")
        with path.open("rb") as file:
            yield file
    except FileNotFoundError as error:
        raise ModelNotFoundError(f"{path.parent} lacks {path.name}, a file of tensors.") from error
    except OSError as error:
        raise ModelFormatError(f"{path} cannot be read: {error.strerror or error}.") from error


def read_header(file: BufferedReader, path: Path) -> Header:
    """Read and check the header of a file that was just opened.

    Raises:
        ModelFormatError: It is damaged, or contradicts the file's size.
    """
    prefix = file.read(8)
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > size - 8:
        _fail(path, f"its {size:,} bytes end before its header does")
    if length > _MAX_HEADER_BYTES:
        _fail(path, f"its header has {length:,} bytes; {_MAX_HEADER_BYTES:,} are allowed")
    header = file.read(length)
    if not header.startswith(b"{"):
        _fail(path, "its header is not JSON")
    entries = parse_json(header, source=str(path))
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _fail(path, "__metadata__ must be an object of strings")
    found = [(_read_entry(name, entry, path), name) for name, entry in entries.items()]
    first = 8 + length
    available = size - first
    end = 0
    tensors: dict[str, TensorEntry] = {}
    for (begin, stop, dtype, shape), name in sorted(found):
        if begin != end:
            _fail(path, f"the tensor {name[:80]!r} begins at byte {begin:,}, not at {end:,}")
        if stop > available:
            _fail(path, f"the tensor {name[:80]!r} ends at byte {stop:,} of {available:,}")
        tensors[name] = TensorEntry(dtype, shape, first + begin, stop - begin)
        end = stop
    if end != available:
        _fail(path, f"its tensors have {end:,} bytes, its data {available:,}")
    return Header(metadata, tensors)


def encode_header(
    metadata: Mapping[str, str], tensors: Sequence[tuple[str, str, Sequence[int]]]
) -> bytes:
    """The first bytes of a safetensors file; the tensors' bytes follow, in their order.

    Args:
        metadata: Its ``__metadata__``.
        tensors: Name, element type and shape of each.
    """
    document: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + math.prod(shape) * _BITS[dtype] // 8
        document[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(document, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    return len(header).to_bytes(8, "little") + header


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a model folder, in order; empty where it has none.

    Those that the index names; without an index ``model.safetensors``, as `transformers`
    does; without that all that match ``model*.safetensors``, as mlx-lm does. Files of other
    names (adapters, optimizers) are not weights of a model.

    Raises:
        ModelFormatError: The index is damaged.
        UnsafeModelError: A file is named or linked to outside the folder.
    """
    return _weight_files(folder, _read_index(folder))


class SafetensorsFolder:
    """The tensors of a model folder's safetensors files.

    Nothing but headers is read until a tensor is asked for. Close it, or use it in a
    ``with`` statement; asking a closed one raises `ValueError`. Arrays that it returned
    may be views of the files, and stay valid: a file is unmapped when the last of them is
    gone.

    Args:
        folder: Holds ``model.safetensors``, or several files and an index.

    Raises:
        ModelNotFoundError: There is no such folder or file, or no safetensors file in it.
        ModelFormatError: A file is damaged, or contradicts the index.
        UnsafeModelError: A file is named or linked to outside the folder.
    """

    def __init__(self, folder: Path) -> None:
        index = _read_index(folder)
        files = _weight_files(folder, index)
        if not files:
            raise ModelNotFoundError(f"{folder} holds no model.safetensors and no {INDEX_NAME}.")
        self._folder = folder
        self._closed = False
        self._lock = Lock()
        self._files: dict[str, BufferedReader] = {}
        self._tensors: dict[str, _Tensor] = {}
        try:
            for file in files:
                for name, tensor in _open(folder, file).items():
                    if name in self._tensors:
                        _fail(file, f"the tensor {name[:80]!r} is in another file too")
                    self._tensors[name] = tensor
            if index is not None:
                self._check_index(index)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files. Calling it again does nothing."""
        self._closed = True
        self._tensors = {}
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files = {}

    def names(self) -> list[str]:
        """Names of all tensors, in the order of their bytes."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor. Raises `ModelFormatError` if there is none of that name."""
        return self._tensor(name).shape

    def dtype(self, name: str) -> str:
        """Element type of a tensor in the format's words, such as ``"BF16"``.

        Raises `ModelFormatError` if there is no tensor of that name.
        """
        return self._tensor(name).dtype

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor, a read-only view of the file.

        Raises `ModelFormatError` if there is no tensor of that name.
        """
        return self._tensor(name).data

    def read(self, name: str, start: int, nbytes: int) -> NDArray[np.uint8]:
        """Some bytes of a tensor, copied from the file.

        For whoever passes over a model once: pages of a mapped file count as the process's
        own memory for as long as the map lives, and a file that shrinks while it is mapped
        kills the process. May be called from several threads.

        Args:
            name: The tensor.
            start: Its first byte that is wanted.
            nbytes: How many are, at most those that it has from there on.

        Raises:
            ModelFormatError: There is no tensor of that name, or the file has become shorter
                since it was opened.
        """
        tensor = self._tensor(name)
        data = np.empty(nbytes, np.uint8)
        path = self._folder / tensor.file
        with self._lock:
            file = self._files.get(tensor.file)
            if file is None:
                file = self._files[tensor.file] = path.open("rb")
            file.seek(tensor.offset + start)
            got = file.readinto(data.data)
        if got != nbytes:
            _fail(path, "it has become shorter while it was read")
        return data

    def float32(self, name: str) -> FloatArray:
        """The values of a tensor. Read-only, and a view of the file, where it holds float32.

        Raises:
            ModelFormatError: There is no tensor of that name.
            UnsupportedModelError: It is neither F32 nor F16 nor BF16.
        """
        tensor = self._tensor(name)
        if tensor.dtype == "F32":
            values = tensor.data.view("<f4")
        elif tensor.dtype == "F16":
            values = tensor.data.view("<f2")
        elif tensor.dtype == "BF16":  # the upper half of a float32
            values = (tensor.data.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
        else:
            raise UnsupportedModelError(
                f"{self._folder}: the tensor {name[:80]!r} is {tensor.dtype}; phirt reads F32, "
                "F16 and BF16."
            )
        # Others' code expects alignment, which the format recommends and does not promise.
        aligned = np.require(values, np.float32, ["ALIGNED"])
        return aligned.reshape(tensor.shape)

    def _tensor(self, name: str) -> _Tensor:
        if self._closed:
            raise ValueError(f"The safetensors files of {self._folder} are closed.")
        try:
            return self._tensors[name]
        except KeyError:
            raise ModelFormatError(f"{self._folder} has no tensor {name[:80]!r}.") from None

    def _check_index(self, index: Mapping[str, str]) -> None:
        for name, file in index.items():
            tensor = self._tensors.get(name)
            if tensor is None or tensor.file != file:
                _fail(self._folder / INDEX_NAME, f"{name[:80]!r} is not in {file}, as it says")
        # As in transformers, what the index does not name is no part of the model.
        self._tensors = {name: self._tensors[name] for name in self._tensors if name in index}


@dataclass(frozen=True, slots=True)
class _Tensor:
    file: str
    offset: int
    dtype: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]


def _fail(path: Path, problem: str) -> NoReturn:
    raise ModelFormatError(f"{path}: {problem}. Fetch or write the file again.")


def _weight_files(folder: Path, index: Mapping[str, str] | None) -> tuple[Path, ...]:
    if index is not None:
        return tuple(folder / name for name in sorted(set(index.values())))
    if (folder / _SINGLE_NAME).exists():
        return (folder / _SINGLE_NAME,)
    return tuple(sorted(folder.glob(_SHARDS)))


def _read_index(folder: Path) -> dict[str, str] | None:
    """File of each tensor, by name; None without an index."""
    path = folder / INDEX_NAME
    if not path.exists():
        return None
    resolve_inside(folder, INDEX_NAME)
    entries = JsonFields(read_json(path), source=str(path)).mapping("weight_map")
    if not entries:
        _fail(path, "it has no weight_map")
    for name, file in entries.items():
        if not isinstance(file, str) or plain_name_fault(file) or not file.endswith(".safetensors"):
            # An index could name any file of the folder, a pickle among them.
            _fail(path, f"it says that {name[:80]!r} is in {str(file)[:80]!r}")
    return entries


def _open(folder: Path, path: Path) -> dict[str, _Tensor]:
    """Map a file and check all of its header."""
    resolve_inside(folder, path.name)
    with open_tensors(path) as file:
        header = read_header(file, path)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    content = np.frombuffer(mapped, np.uint8)
    return {
        name: _Tensor(
            path.name,
            entry.offset,
            entry.dtype,
            entry.shape,
            content[entry.offset : entry.offset + entry.nbytes],
        )
        for name, entry in header.tensors.items()
    }


def _read_entry(name: str, entry: object, path: Path) -> tuple[int, int, str, tuple[int, ...]]:
    """Byte range, dtype and shape of a tensor, which agree with each other."""
    if not isinstance(entry, Mapping):
        _fail(path, f"the tensor {name[:80]!r} is not described")
    dtype = entry.get("dtype")
    bits = _BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        _fail(path, f"the tensor {name[:80]!r} is of the unknown type {str(dtype)[:80]!r}")
    shape = _sizes(entry.get("shape"), _MAX_DIMENSION, f"shape of {name[:80]!r}", path)
    offsets = _sizes(entry.get("data_offsets"), _MAX_OFFSET, f"offsets of {name[:80]!r}", path)
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        _fail(path, f"the offsets of {name[:80]!r} are no range")
    begin, end = offsets
    count = 1
    for size in shape:
        count *= size
    if count * bits != (end - begin) * 8:
        _fail(
            path, f"the tensor {name[:80]!r}, {dtype} of {shape}, cannot have {end - begin:,} bytes"
        )
    return begin, end, str(dtype), shape


def _sizes(value: Any, maximum: int, what: str, path: Path) -> tuple[int, ...]:
    sound = isinstance(value, list) and len(value) <= _MAX_DIMENSIONS
    if not sound or not all(type(item) is int and 0 <= item <= maximum for item in value):
        _fail(path, f"the {what} must be a short list of sizes, not {str(value)[:80]}")
    return tuple(value)
