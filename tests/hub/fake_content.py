"""What the fake hub keeps: repositories, their commits and files, and its own faults.

A file is bytes that are there, or as many as are wanted, made as they are sent.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

__all__ = ["Content", "Fault", "Generated", "Literal", "Repo", "Request", "Snapshot", "git_sha1"]

_BLOCK_BYTES = 1 << 20
_LFS_SUFFIXES = (".safetensors", ".gguf", ".onnx", ".onnx.data", ".onnx_data", ".bin", ".pt")
_LFS_BYTES = 1 << 20


def git_sha1(data: bytes) -> str:
    """The name that git gives a file of that content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Literal:
    """Content that is there."""

    data: bytes = field(repr=False)

    @property
    def size(self) -> int:
        return len(self.data)

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    def blocks(self, start: int, end: int) -> Iterator[memoryview]:
        """The bytes from `start` up to `end`, in pieces."""
        view = memoryview(self.data)
        for begin in range(start, end, _BLOCK_BYTES):
            yield view[begin : min(begin + _BLOCK_BYTES, end)]


@dataclass(frozen=True)
class Generated:
    """One random megabyte, over and over: of any size, and never in memory at once."""

    size: int
    seed: int = 0

    @cached_property
    def _block(self) -> bytes:
        return random.Random(self.seed).randbytes(_BLOCK_BYTES)  # noqa: S311 - not a secret

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for block in self.blocks(0, self.size):
            digest.update(block)
        return digest.hexdigest()

    def blocks(self, start: int, end: int) -> Iterator[memoryview]:
        """The bytes from `start` up to `end`, in pieces."""
        view = memoryview(self._block)
        while start < end:
            offset = start % _BLOCK_BYTES
            count = min(_BLOCK_BYTES - offset, end - start)
            yield view[offset : offset + count]
            start += count


Content = Literal | Generated


@dataclass(frozen=True, slots=True)
class Request:
    """A request that one of the two servers received; header names are in lower case."""

    host: str
    method: str
    path: str
    headers: Mapping[str, str]


@dataclass(slots=True)
class Fault:
    """How to misbehave, where, how often, and after how many bytes of a file."""

    kind: str
    on: str
    times: int | None
    skip: int
    after: int
    options: dict[str, Any]


@dataclass(frozen=True)
class Snapshot:
    """The files of one commit."""

    commit: str
    files: Mapping[str, Content]

    def is_lfs(self, path: str) -> bool:
        return path.endswith(_LFS_SUFFIXES) or self.files[path].size > _LFS_BYTES

    def blob_id(self, path: str) -> str:
        """git's name of the file, or of the pointer that stands for it."""
        content = self.files[path]
        if self.is_lfs(path):
            return git_sha1(f"version 1\noid sha256:{content.sha256}\n".encode())
        return git_sha1(b"".join(content.blocks(0, content.size)))

    def etag(self, path: str) -> str:
        return self.files[path].sha256 if self.is_lfs(path) else self.blob_id(path)


@dataclass
class Repo:
    """A repository: its commits, and which revisions name them."""

    name: str
    license: str | None = None
    gated: bool = False
    private: bool = False
    commits: dict[str, Snapshot] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)

    def find(self, revision: str) -> Snapshot | None:
        return self.commits.get(self.revisions.get(revision, revision))
