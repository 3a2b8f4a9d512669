"""Compiled models on disk, so that the second load need not compile.

OpenVINO writes what it compiled, weights and all, into a folder, and believes what it finds
there: a blob with a flipped bit loads, and computes something else (tried with 2026.4). So
a checksum of every file stands beside it, and a file without a right one is deleted.
"""

from __future__ import annotations

import hashlib
import logging
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

__all__ = ["cache_key", "checked_cache"]

_logger = logging.getLogger(__name__)

_CHECKSUM_SUFFIX = ".crc32"
_CHUNK_BYTES = 1 << 22
_LARGEST_GRAPH = 1 << 26  # bytes
_LOCK_SECONDS = 60


def cache_key(graph: Path, *facts: str) -> str:
    """The name of a cache folder: a hash of all that a compiled model depends on.

    Args:
        graph: The graph's file, whose beginning is hashed: that is all of one that does not
            hold its weights. Of it and the files beside it, sizes and times are hashed, too.
        facts: Whatever else decides: identity of the weights, version of the runtime.
    """
    digest = hashlib.sha256("\0".join(facts).encode())
    with graph.open("rb") as stream:
        digest.update(stream.read(_LARGEST_GRAPH))
    for file in sorted(graph.parent.glob(f"{graph.stem}*")):
        status = file.stat()
        digest.update(f"\0{file.name}\0{status.st_size}\0{status.st_mtime_ns}".encode())
    return digest.hexdigest()[:32]


@contextmanager
def checked_cache(folder: Path) -> Iterator[Path | None]:
    """A folder for compiled models, checked before and sealed after.

    One process at a time uses it.

    Args:
        folder: The folder, made if it is not there.

    Yields:
        The folder, or None where it cannot be used: a load without a cache is slower, and
        nothing else.
    """
    lock = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "lock")
        lock.acquire(timeout=_LOCK_SECONDS)
        for file in _files(folder):
            if not _is_sealed(file):
                file.unlink()
    except (OSError, Timeout) as error:
        _logger.info("No cache of compiled models: %s", error)
        if lock is not None:
            lock.release()
        yield None
        return
    try:
        yield folder
        _seal(folder)
    finally:
        lock.release()


def _seal(folder: Path) -> None:
    try:
        for file in _files(folder):
            if not _checksum_file(file).exists():
                _checksum_file(file).write_text(_checksum(file), encoding="ascii")
    except OSError as error:
        _logger.info("What was compiled is not kept: %s", error)


def _files(folder: Path) -> list[Path]:
    return [
        file
        for file in folder.iterdir()
        if file.suffix != _CHECKSUM_SUFFIX and file.name != "lock" and file.is_file()
    ]


def _checksum_file(file: Path) -> Path:
    return file.with_name(file.name + _CHECKSUM_SUFFIX)


def _is_sealed(file: Path) -> bool:
    seal = _checksum_file(file)
    try:
        if seal.read_bytes() == _checksum(file).encode():
            return True
    except FileNotFoundError:
        return False
    seal.unlink()
    return False


def _checksum(file: Path) -> str:
    """Length and CRC-32: the guard is against a disk's faults, not against an attacker."""
    crc = length = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
            length += len(chunk)
    return f"{length} {crc:08x}"
