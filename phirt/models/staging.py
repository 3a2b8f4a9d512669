"""Writes a folder beside its place and moves it there whole.

Whoever looks sees a finished folder or none, also after a kill or a power cut. That rests
on one atomic rename, not on locks: a lock only spares the second process the work, and on
a file system where locking does nothing the loser of the rename discards its copy.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeAlias

from filelock import FileLock, Timeout

from phirt.errors import ModelNotFoundError
from phirt.models.kill_points import kill_point
from phirt.models.owners import is_dead, owner_tag

__all__ = [
    "Fill",
    "Find",
    "abandoned",
    "discard",
    "is_idle",
    "lock_of",
    "locked",
    "publish",
    "stage",
    "sweep",
    "sync_tree",
]

Fill: TypeAlias = Callable[[Path], object]
"""Writes the content into an empty folder, which is given to it."""

Find: TypeAlias = Callable[[], Path | None]
"""Returns the finished folder, or None where there is none or it is damaged."""

_logger = logging.getLogger(__name__)

# As `_work_folder` names them: other things in ``tmp/`` are not the store's.
_WORK_FOLDER = re.compile(
    r"(models|sources|copies|openvino|partial)-.+@[0-9a-f]{12}\.\d+\.[0-9a-f]{8}"
)
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
        ModelNotFoundError: Somebody removed it again.
        OSError: The file system refused something.
        RuntimeError: What ``fill`` wrote is not what ``find`` calls finished.
    """
    for folder in (target.parent, root / "tmp"):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(lock_of(target, root)):
        found = find()
        if found is not None:
            return found
        sweep(root)
        work = _work_folder(target, root)
        try:
            content = work / "content"
            content.mkdir(parents=True)
            kill_point("fill")
            fill(content)
            kill_point("sync")
            sync_tree(content)
            made = content.stat()
            publish(content, target, find=find, aside=work)
            kill_point("published")
        finally:
            shutil.rmtree(work, ignore_errors=True)
        found = find()
        if found is None:
            if not _is_at(target, made):
                raise ModelNotFoundError(f"{target} was removed as soon as it was installed.")
            raise RuntimeError(f"{target} was written, but is not complete")
        return found


def _is_at(target: Path, made: os.stat_result) -> bool:
    try:
        return os.path.samestat(target.stat(), made)
    except FileNotFoundError:
        return False


def discard(target: Path, root: Path) -> int:
    """Take a folder out of sight at once and whole, then delete it.

    A reader has it or has it not. On Windows a folder with an open file cannot be moved,
    so that one in use stays as it is.

    Args:
        target: A folder or file of the store.
        root: The store.

    Returns:
        Bytes freed.

    Raises:
        OSError: It is not there, is in use, or the store cannot be written.
    """
    work = _work_folder(target, root)
    work.mkdir(parents=True)
    try:
        kill_point("discard")
        target.rename(work / "discarded")
        kill_point("discarded")
        freed = sum(path.lstat().st_size for path in work.rglob("*") if not path.is_dir())
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return freed


def lock_of(target: Path, root: Path) -> Path:
    """The lock of whoever installs or removes a folder of the store."""
    return root / "locks" / f"{target.parent.name}-{target.name}.lock"


def is_idle(root: Path) -> bool:
    """Whether nobody is installing anything, as far as can be seen."""
    return not any(_entries(root / "tmp"))


def _work_folder(target: Path, root: Path) -> Path:
    owner = f"{owner_tag()}.{secrets.token_hex(4)}"
    return root / "tmp" / f"{target.parent.name}-{target.name}@{owner}"


def _entries(folder: Path) -> list[Path]:
    """The work folders in ``tmp/``, whose names end in ``@`` and their owner."""
    try:
        return [entry for entry in folder.iterdir() if _WORK_FOLDER.fullmatch(entry.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock where the file system has locks; go on without where it has none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=1)
        except Timeout:
            _logger.info("Waiting for another process that works on %s", path.stem)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        _logger.debug("No lock at %s: %s", path, error)
    try:
        yield
    finally:
        lock.release()  # does nothing if the lock was never held


def publish(content: Path, target: Path, *, find: Find, aside: Path) -> None:
    """Move a finished folder to its place, by one rename.

    Args:
        content: The folder, on the file system of its place.
        target: The place.
        find: Looks whether somebody else's, as good, is there already.
        aside: A folder that takes in what is at the place and is not as good.

    Raises:
        OSError: The file system refused it.
    """
    for attempt in range(_RENAME_TRIES):
        try:
            kill_point("publish")
            content.rename(target)
        except OSError:
            if find() is not None:  # somebody else was first; theirs is as good
                return
            if attempt == _RENAME_TRIES - 1:
                raise
            if target.exists():  # damaged: its owner's copy is replaced by this one
                kill_point("replace")
                with suppress(FileNotFoundError):  # somebody else has replaced it just now
                    target.rename(aside / f"damaged-{attempt}")
            else:  # Windows: a virus scanner holds a new file open for a moment
                time.sleep(0.05 * 2**attempt)
        else:
            _sync(target.parent)
            return


def sync_tree(folder: Path) -> None:
    """Have a folder's content on the disk before its name is.

    Args:
        folder: The folder, complete.

    Raises:
        OSError: The file system refused it.
    """
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync(Path(parent, name))
        _sync(Path(parent), is_last=parent == str(folder))


def _sync(path: Path, *, is_last: bool = False) -> None:
    if sys.platform == "win32" and path.is_dir():
        return  # Windows opens no folders, and orders the change of a name itself
    # Windows flushes only what is open for writing.
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if sys.platform == "darwin" and is_last:
            # There fsync reaches the drive and not its platter; this empties the drive's cache.
            import fcntl

            with suppress(OSError):  # not every file system has it
                fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    finally:
        os.close(descriptor)


def sweep(root: Path) -> int:
    """Remove what processes that died have left behind; return the bytes freed."""
    freed = 0
    for entry in abandoned(root):
        _logger.debug("Removing the leftover %s", entry)
        with suppress(OSError):  # somebody else is removing it
            freed += sum(path.lstat().st_size for path in entry.rglob("*"))
        shutil.rmtree(entry, ignore_errors=True)
    return freed


def abandoned(root: Path) -> list[Path]:
    """What processes that died have left behind."""
    return [entry for entry in _entries(root / "tmp") if _is_abandoned(entry)]


def _is_abandoned(entry: Path) -> bool:
    if is_dead(entry.name.rpartition("@")[2]):
        return True
    # On this machine another process may have got the number, and of another machine's
    # processes nothing is known: age decides.
    try:
        newest = max(path.lstat().st_mtime for path in (entry, *entry.rglob("*")))
    except OSError:  # it is being removed
        return False
    return time.time() - newest > _ABANDONED_AFTER_S
