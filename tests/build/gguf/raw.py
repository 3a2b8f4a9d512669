"""Writes GGUF headers byte by byte, so that any number in them can be a lie."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

UINT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 6, 7, 8, 9, 10
F32, Q4_0 = 0, 2


def string(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, elements: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + elements


def tensor(
    name: bytes, dimensions: list[int], *, encoding: int = F32, offset: int = 0, rank: int = -1
) -> bytes:
    """A row of the table of tensors; ``dimensions`` as the file lists them, fastest first."""
    rank = len(dimensions) if rank < 0 else rank
    numbers = struct.pack(f"<{len(dimensions)}Q", *dimensions)
    return string(name) + struct.pack("<I", rank) + numbers + struct.pack("<IQ", encoding, offset)


@dataclass
class Raw:
    """A GGUF file. Counts follow from the entries unless they are given."""

    pairs: list[bytes] = field(default_factory=list)
    tensors: list[bytes] = field(default_factory=list)
    data: bytes = b""
    magic: bytes = b"GGUF"
    version: bytes = struct.pack("<I", 3)
    tensor_count: int | None = None
    pair_count: int | None = None
    alignment: int = 32

    def encode(self) -> bytes:
        tensor_count = len(self.tensors) if self.tensor_count is None else self.tensor_count
        pair_count = len(self.pairs) if self.pair_count is None else self.pair_count
        header = self.magic + self.version + struct.pack("<QQ", tensor_count, pair_count)
        header += b"".join(self.pairs + self.tensors)
        return header + bytes(-len(header) % self.alignment) + self.data
