"""Whether a disk is full, and how much room there is on it."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

__all__ = ["check_room", "free_bytes", "is_disk_full", "megabytes"]


def is_disk_full(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, says that a disk or quota is full."""
    full = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in full:
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def check_room(folder: Path, needed_bytes: int) -> None:
    """Raise the `OSError` of a full disk where a folder's disk has less room than is needed."""
    if shutil.disk_usage(folder).free < needed_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def free_bytes(path: Path) -> int:
    """Room on the disk of a path, which need not exist."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def megabytes(size: int) -> str:
    """``"1,234 MB"``."""
    return f"{size / 1e6:,.0f} MB"
