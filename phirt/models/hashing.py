"""The identity of a file's content."""

from __future__ import annotations

import hashlib
from pathlib import Path

from phirt.types import Progress, ProgressCallback

__all__ = ["sha256_of"]

_BLOCK_BYTES = 1 << 20


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
