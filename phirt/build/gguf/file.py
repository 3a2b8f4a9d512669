"""An open GGUF file: its checked header, typed metadata, and bytes on request."""

from __future__ import annotations

import struct
from pathlib import Path
from threading import Lock
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from phirt.build.gguf.header import ArraySpan, GgufHeader, ValueType, read_header
from phirt.errors import ModelFormatError, ModelNotFoundError

__all__ = ["GgufFile"]

_DTYPES = {
    ValueType.UINT8: "<u1",
    ValueType.INT8: "<i1",
    ValueType.UINT16: "<u2",
    ValueType.INT16: "<i2",
    ValueType.UINT32: "<u4",
    ValueType.INT32: "<i4",
    ValueType.FLOAT32: "<f4",
    ValueType.BOOL: "?",
    ValueType.UINT64: "<u8",
    ValueType.INT64: "<i8",
    ValueType.FLOAT64: "<f8",
}


class GgufFile:
    """A GGUF file whose header has been checked.

    Reads go through the file and not through a memory map: a file that shrinks while it is
    mapped kills the process, one that shrinks while it is read is a `ModelFormatError`.
    May be used from several threads. Close it, or use it in a ``with`` statement.

    Args:
        path: The file.

    Attributes:
        path: The file.
        header: Its header.

    Raises:
        ModelNotFoundError: There is no such file.
        ModelFormatError: The header is damaged.
        UnsupportedModelError: The header is of a version or holds encodings unknown here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = Lock()
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise ModelNotFoundError(
                f"GGUF file '{path}' cannot be opened: {error.strerror}. Check the path."
            ) from error
        try:
            size = self._file.seek(0, 2)
            self._file.seek(0)
            self.header: GgufHeader = read_header(self._file, size=size, name=path.name)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Calling it again does nothing."""
        self._file.close()

    def read(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """Bytes of the file, shape (nbytes,). The caller takes both numbers from the header.

        Raises:
            ModelFormatError: The file has become shorter since its header was read.
        """
        data = np.empty(nbytes, dtype=np.uint8)
        with self._lock:
            self._file.seek(offset)
            got = self._file.readinto(data.data)
        if got != nbytes:
            raise ModelFormatError(
                f"{self.path.name}: {nbytes:,} bytes at {offset:,} were there when the file was "
                f"opened, and {got:,} are now. Leave the file alone while it is converted."
            )
        return data

    def integer(self, key: str) -> int | None:
        """An integer of the metadata, or None where the key is absent."""
        value = self.header.metadata.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise self._wrong_type(key, "an integer")
        return value

    def real(self, key: str) -> float | None:
        """A number of the metadata, or None where the key is absent."""
        value = self.header.metadata.get(key)
        if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
            raise self._wrong_type(key, "a number")
        return None if value is None else float(value)

    def flag(self, key: str) -> bool | None:
        """A boolean of the metadata, or None where the key is absent."""
        value = self.header.metadata.get(key)
        if value is not None and not isinstance(value, bool):
            raise self._wrong_type(key, "a boolean")
        return value

    def string(self, key: str) -> str | None:
        """A string of the metadata, or None where the key is absent."""
        value = self.header.metadata.get(key)
        if value is None:
            return None
        if not isinstance(value, bytes):
            raise self._wrong_type(key, "a string")
        return self._decode(value, key)

    def token_id(self, role: str, *, vocab_size: int) -> int | None:
        """Id of the token of a role (``"bos"``, ``"unknown"``), or None where none is named.

        Raises:
            ModelFormatError: The id is not one of the vocabulary's.
        """
        key = f"tokenizer.ggml.{role}_token_id"
        value = self.integer(key)
        if value is not None and not 0 <= value < vocab_size:
            raise ModelFormatError(
                f"{self.path.name}: {key} is {value:,}, and the vocabulary has {vocab_size:,} "
                "tokens. Use another file."
            )
        return value

    def numbers(self, key: str) -> NDArray[Any] | None:
        """A numeric array of the metadata, shape (n,), or None where the key is absent."""
        span = self._span(key)
        if span is None:
            return None
        dtype = _DTYPES.get(span.element_type)
        if dtype is None:
            raise self._wrong_type(key, "an array of numbers")
        return self.read(span.offset, span.nbytes).view(dtype)

    def strings(self, key: str) -> list[str] | None:
        """An array of strings of the metadata, or None where the key is absent."""
        span = self._span(key)
        if span is None:
            return None
        if span.element_type is not ValueType.STRING:
            raise self._wrong_type(key, "an array of strings")
        data = self.read(span.offset, span.nbytes).tobytes()
        unpack = struct.Struct("<Q").unpack_from
        strings: list[str] = []
        position = 0
        try:
            for _ in range(span.count):
                start = position + 8
                position = start + unpack(data, position)[0]
                strings.append(data[start:position].decode("utf-8"))
        except (struct.error, UnicodeDecodeError):
            raise ModelFormatError(
                f"{self.path.name}: element {len(strings)} of {key!r} is not UTF-8. "
                "The file is damaged; fetch it again."
            ) from None
        return strings

    def _span(self, key: str) -> ArraySpan | None:
        value = self.header.metadata.get(key)
        if value is not None and not isinstance(value, ArraySpan):
            raise self._wrong_type(key, "an array")
        return value

    def _decode(self, value: bytes, key: str) -> str:
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise ModelFormatError(
                f"{self.path.name}: the value of {key!r} is not UTF-8. "
                "The file is damaged; fetch it again."
            ) from None

    def _wrong_type(self, key: str, wanted: str) -> ModelFormatError:
        value = self.header.metadata[key]
        found = (
            f"an array of {value.element_type.name}"
            if isinstance(value, ArraySpan)
            else f"{type(value).__name__} {value!r:.40}"
        )
        return ModelFormatError(f"{self.path.name}: {key!r} must be {wanted}, and is {found}.")
