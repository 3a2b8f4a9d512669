"""Writes a folder beside its place and moves it there whole.

Whoever looks sees a finished folder or none, also after a kill or a power cut. That rests
on one atomic rename, not on locks: a lock only spares the second process the work, and on
a file system where locking does nothing the loser of the rename discards its copy.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from filelock import FileLock, Timeout

__all__ = ["Fill", "Find", "stage"]

Fill: TypeAlias = Callable[[Path], object]
"""Writes the content into an empty folder, which is given to it."""

Find: TypeAlias = Callable[[], Path | None]
"""Returns the finished folder, or None where there is none or it is damaged."""

_logger = logging.getLogger(__name__)

_ABANDONED_AFTER_S = 24 * 3600.0
_RENAME_TRIES = 6


def stage(target: Path, fill: Fill, *, find: Find, root: Path) -> Path:
    """Fill a new folder and move it to ``target``, unless somebody else did it first.

    Args:
        target: Where the folder goes; its name is unique within ``root``.
        fill: Writes the content. Whatever it raises propagates, and nothing is left.
        find: Looks whether ``target`` is there and sound. A damaged one is replaced.
        root: The store, on the same file system. ``tmp/`` and ``locks/`` are used in it.

    Returns:
        What ``find`` returned.

    Raises:
        OSError: The file system refused something.
        RuntimeError: What ``fill`` wrote is not what ``find`` calls finished.
    """
    label = f"{target.parent.name}-{target.name}"
    for folder in (target.parent, root / "tmp", root / "locks"):
        folder.mkdir(parents=True, exist_ok=True)
    with _locked(root / "locks" / f"{label}.lock"):
        found = find()
        if found is not None:
            return found
        _sweep(root / "tmp")
        work = root / "tmp" / f"{label}@{_host()}.{os.getpid()}.{secrets.token_hex(4)}"
        try:
            content = work / "content"
            content.mkdir(parents=True)
            fill(content)
            _sync_tree(content)
            _publish(content, target, find=find, aside=work)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        found = find()
        if found is None:
            raise RuntimeError(f"{target} was written, but is not complete")
        return found


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock where the file system has locks; go on without where it has none."""
    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=1)
        except Timeout:
            _logger.info("Waiting for another process that is installing %s", path.stem)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        _logger.debug("No lock at %s: %s", path, error)
    try:
        yield
    finally:
        lock.release()  # does nothing if the lock was never held


def _publish(content: Path, target: Path, *, find: Find, aside: Path) -> None:
    for attempt in range(_RENAME_TRIES):
        try:
            content.rename(target)
        except OSError:
            if find() is not None:  # somebody else was first; theirs is as good
                return
            if attempt == _RENAME_TRIES - 1:
                raise
            if target.exists():  # damaged: its owner's copy is replaced by this one
                target.rename(aside / f"damaged-{attempt}")
            else:  # Windows: a virus scanner holds a new file open for a moment
                time.sleep(0.05 * 2**attempt)
        else:
            _sync(target.parent)
            return


def _sync_tree(folder: Path) -> None:
    """Have a folder's content on the disk before its name is."""
    for parent, _, names in os.walk(folder):
        for name in names:
            _sync(Path(parent, name))
        _sync(Path(parent))


def _sync(path: Path) -> None:
    if sys.platform == "win32" and path.is_dir():
        return  # Windows opens no folders, and orders the change of a name itself
    # Windows flushes only what is open for writing.
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep(folder: Path) -> None:
    """Remove what processes that died have left behind."""
    for entry in folder.iterdir():
        if _is_abandoned(entry):
            _logger.debug("Removing the leftover %s", entry)
            shutil.rmtree(entry, ignore_errors=True)


def _is_abandoned(entry: Path) -> bool:
    host, _, rest = entry.name.rpartition("@")[2].partition(".")
    pid = rest.partition(".")[0]
    if host == _host() and pid.isdecimal() and not _process_exists(int(pid)):
        return True
    # On this machine another process may have got the number, and of another machine's
    # processes nothing is known: age decides.
    try:
        newest = max(path.lstat().st_mtime for path in (entry, *entry.rglob("*")))
    except OSError:  # it is being removed
        return False
    return time.time() - newest > _ABANDONED_AFTER_S


def _host() -> str:
    """Identifies the space in which a process number means something.

    Two machines may share a store on a network, and two containers a store on one machine.
    """
    try:
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        namespace = ""
    return hashlib.sha256(f"{platform.node()}\0{namespace}".encode()).hexdigest()[:12]


if sys.platform == "win32":

    def _process_exists(pid: int) -> bool:
        # os.kill(pid, 0) would be a Ctrl-C to the process here.
        import ctypes

        synchronize, invalid_parameter = 0x0010_0000, 87
        kernel = ctypes.WinDLL("kernel32", use_last_error=True)
        kernel.OpenProcess.restype = ctypes.c_void_p
        handle = kernel.OpenProcess(synchronize, False, pid)
        if not handle:
            return ctypes.get_last_error() != invalid_parameter
        still_running = bool(kernel.WaitForSingleObject(ctypes.c_void_p(handle), 0) != 0)
        kernel.CloseHandle(ctypes.c_void_p(handle))
        return still_running

else:

    def _process_exists(pid: int) -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except (PermissionError, OverflowError):
            return True
        return True
