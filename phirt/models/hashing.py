"""The identity of a file's content."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import secrets
import sys
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path

from phirt.errors import ModelError
from phirt.models.safe_json import read_json
from phirt.types import Progress, ProgressCallback

__all__ = ["BackgroundDigest", "remembered_sha256", "sha256_of"]

_WAITING_CHUNKS = 16

_BLOCK_BYTES = 1 << 20
# A file written this recently may be written again within one tick of its file system's
# clock, which its time of modification would not show.
_SETTLED_NS = 3_000_000_000


def sha256_of(path: Path, *, progress: ProgressCallback | None = None) -> str:
    """SHA-256 of a file's content, in lower-case hex.

    Args:
        path: The file.
        progress: Told how far it has come, stage ``"hash"``, in bytes.
    """
    digest = hashlib.sha256()
    completed, total = 0, path.stat().st_size
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            completed += len(block)
            if progress is not None:
                progress(Progress("hash", completed, total, "bytes"))
    return digest.hexdigest()


def remembered_sha256(
    path: Path, records: Path, *, progress: ProgressCallback | None = None
) -> str:
    """`sha256_of`, read again only if the file's size or time of modification has changed.

    Hashing gigabytes would cost seconds at every load.

    Args:
        path: The file.
        records: Folder in which to remember; made when there is something to remember.
        progress: As for `sha256_of`.
    """
    path = path.resolve()
    status = path.stat()
    known = {"path": str(path), "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    if sys.platform != "win32":  # where this is the time of creation
        # Whoever copies or unpacks a file may set its time of modification, but not this one.
        known["ctime_ns"] = status.st_ctime_ns
    record = records / f"{hashlib.sha256(os.fsencode(path)).hexdigest()}.json"
    try:
        found = read_json(record)
    except (ModelError, OSError):
        found = {}
    sha256 = found.pop("sha256", None)
    if isinstance(sha256, str) and found == known:
        return sha256
    sha256 = sha256_of(path, progress=progress)
    if time.time_ns() - status.st_mtime_ns > _SETTLED_NS:
        # Only a convenience: whether the records can be written is not this load's concern.
        with suppress(OSError):
            records.mkdir(parents=True, exist_ok=True)
            partial = record.with_suffix(f".{secrets.token_hex(8)}")
            partial.write_text(json.dumps({**known, "sha256": sha256}), encoding="utf-8")
            partial.replace(record)
    return sha256


class BackgroundDigest:
    """A hash that is computed on a thread of its own, beside whoever brings the bytes.

    hashlib lets go of the interpreter's lock while it hashes, so that a download and its hash
    take the time of the slower one and not of both. The thread ends when this is collected.

    Args:
        digest: The hash to feed.
    """

    def __init__(self, digest: hashlib._Hash) -> None:
        self._digest = digest
        self._chunks: queue.SimpleQueue[bytes | threading.Event | None] = queue.SimpleQueue()
        # Bounds what waits: a fast line must not fill the memory.
        self._room = threading.Semaphore(_WAITING_CHUNKS)
        threading.Thread(
            target=_hash_all, args=(digest, self._chunks, self._room), daemon=True
        ).start()
        weakref.finalize(self, self._chunks.put, None)

    def update(self, chunk: bytes) -> None:
        """Take a chunk, which must not be changed afterwards; waits if too many are waiting."""
        self._room.acquire()
        self._chunks.put(chunk)

    def hexdigest(self) -> str:
        """The hash of all chunks so far."""
        done = threading.Event()
        self._chunks.put(done)
        done.wait()
        return self._digest.hexdigest()


def _hash_all(
    digest: hashlib._Hash,
    chunks: queue.SimpleQueue[bytes | threading.Event | None],
    room: threading.Semaphore,
) -> None:
    while (chunk := chunks.get()) is not None:
        if isinstance(chunk, threading.Event):
            chunk.set()
        else:
            digest.update(chunk)
            room.release()
