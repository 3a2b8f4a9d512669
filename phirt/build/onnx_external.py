"""Writes the weights of an ONNX model into one external data file, tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

__all__ = ["Extent", "ExternalData"]

_ALIGNMENT = 4096  # ONNX Runtime maps the file; page-aligned tensors can be mapped one by one.


@dataclass(frozen=True, slots=True)
class Extent:
    """Where one tensor's bytes lie in the external data file.

    Attributes:
        offset: First byte, a multiple of the page size.
        length: Number of bytes.
    """

    offset: int
    length: int


class ExternalData:
    """An external data file that grows by whole tensors and never holds two in memory.

    Used as a context manager; leaving it closes the file.

    Args:
        path: The file to create. It must not exist: a writer never overwrites weights.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("xb")

    @property
    def location(self) -> str:
        """The file's name, as the ONNX model beside it refers to it."""
        return self._path.name

    def append(self, array: NDArray[Any]) -> Extent:
        """Write an array's bytes, little-endian and row-major, at the next page boundary."""
        little_endian = array.astype(array.dtype.newbyteorder("<"), copy=False)
        data = np.ascontiguousarray(little_endian).reshape(-1).view(np.uint8)
        end = self._file.tell()
        offset = -(-end // _ALIGNMENT) * _ALIGNMENT
        self._file.write(b"\0" * (offset - end))
        self._file.write(data.data)
        return Extent(offset=offset, length=data.nbytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()
