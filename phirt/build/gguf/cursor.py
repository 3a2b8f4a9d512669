"""Reads a GGUF header forward, checking every claimed size before acting on it."""

from __future__ import annotations

import struct
from typing import BinaryIO, NoReturn

from phirt.errors import ModelFormatError

__all__ = ["U32", "U64", "Cursor"]

# Real headers: 2 MB (SmolLM2), 8 MB (Llama 3), 17 MB (260,000 tokens with their merges).
_MAX_HEADER_BYTES = 32 << 20
_MAX_NAME_BYTES = 1 << 10  # the format allows keys of 64 kB; messages quote them
_FIRST_READ = 1 << 16

U32 = struct.Struct("<I")
U64 = struct.Struct("<Q")


class Cursor:
    """Reads forward through the file's first bytes and never past them.

    Args:
        file: The file, opened for reading in binary, at its start.
        size: Its size in bytes.
        name: What messages call it.

    Attributes:
        position: The next byte to read.
    """

    def __init__(self, file: BinaryIO, *, size: int, name: str) -> None:
        self._file = file
        self._buffer = bytearray()
        self.size = size
        self.name = name
        self.position = 0

    def fail(self, problem: str, *, at: int | None = None) -> NoReturn:
        """Raise for a header that cannot be right."""
        where = self.position if at is None else at
        raise ModelFormatError(
            f"{self.name}: {problem} (at byte {where:,} of {self.size:,}). "
            "The file is damaged, cut short or not made by a GGUF writer; fetch it again."
        )

    def require(self, nbytes: int, what: str) -> None:
        """Check that ``nbytes`` more bytes exist, then have them in the buffer."""
        end = self.position + nbytes
        if end <= len(self._buffer):
            return
        if end > self.size:
            left = self.size - self.position
            self.fail(f"{what} needs {nbytes:,} bytes, but the file has {left:,} left")
        if end > _MAX_HEADER_BYTES:
            self.fail(f"{what} reaches past the header's limit of {_MAX_HEADER_BYTES:,} bytes")
        # Doubling keeps the copies linear in the header's size.
        wanted = min(max(end, 2 * len(self._buffer), _FIRST_READ), self.size, _MAX_HEADER_BYTES)
        self._buffer += self._file.read(wanted - len(self._buffer))
        if end > len(self._buffer):
            self.fail(f"{what} could not be read: the file became shorter meanwhile")

    def take(self, nbytes: int, what: str) -> bytes:
        """The next ``nbytes`` bytes."""
        self.require(nbytes, what)
        taken = bytes(self._buffer[self.position : self.position + nbytes])
        self.position += nbytes
        return taken

    def scalar(self, layout: struct.Struct, what: str) -> int | float:
        """The next number."""
        self.require(layout.size, what)
        value: int | float = layout.unpack_from(self._buffer, self.position)[0]
        self.position += layout.size
        return value

    def unsigned(self, layout: struct.Struct, what: str) -> int:
        """The next unsigned integer."""
        return int(self.scalar(layout, what))

    def count(self, what: str, *, smallest: int) -> int:
        """The next u64 that counts things of at least ``smallest`` bytes each."""
        start = self.position
        value = self.unsigned(U64, what)
        # Bound by the header's own limit, not the file's size: terabytes of zeros are cheap
        # to make (a sparse file), and each would be a valid empty entry.
        most = (min(self.size, _MAX_HEADER_BYTES) - self.position) // smallest
        if value > most:
            self.fail(f"{what} is {value:,}, and at most {most:,} fit", at=start)
        return value

    def string(self, what: str) -> bytes:
        """The next string, undecoded."""
        start = self.position
        length = self.unsigned(U64, f"the length of {what}")
        if length > self.size - self.position:
            left = self.size - self.position
            self.fail(f"{what} is {length:,} bytes long, but {left:,} are left", at=start)
        return self.take(length, what)

    def text(self, what: str) -> str:
        """The next string, as text: a key or a tensor's name."""
        start = self.position
        encoded = self.string(what)
        if len(encoded) > _MAX_NAME_BYTES:
            self.fail(f"{what} is longer than {_MAX_NAME_BYTES:,} bytes", at=start)
        try:
            return encoded.decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8", at=start)

    def skip_strings(self, count: int, what: str) -> None:
        """Step over ``count`` strings.

        A vocabulary and its merges are some 100,000 strings, so this loop is most of the
        walk's time; it is written out instead of calling `string`.
        """
        unpack = U64.unpack_from
        buffer = self._buffer
        position = self.position
        loaded = len(buffer)
        limit = min(self.size, _MAX_HEADER_BYTES)
        for index in range(count):
            if position + 8 > loaded:
                self.position = position
                self.require(8, what)
                loaded = len(buffer)
            end = position + 8 + unpack(buffer, position)[0]
            if end > limit:
                self.fail(
                    f"string {index + 1:,} of {what} would end at byte {end:,}, and the header "
                    f"can reach to {limit:,}",
                    at=position,
                )
            position = end
        self.position = position
