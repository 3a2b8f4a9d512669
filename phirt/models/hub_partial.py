"""Files on their way: what a download leaves behind, and the next one goes on with.

    ROOT/partial/DIGEST/HOST.PID.RANDOM     of a process that is fetching it
    ROOT/partial/DIGEST/free.RANDOM         left by one that gave up

A file belongs to one process, which its name says. Another takes it over by renaming it,
which succeeds for one of many and needs no lock, if its owner gave it up, has ended, or is on
another machine and has not written for long. An owner that was only stopped finds its file
gone before it writes again.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from phirt.models.owners import is_dead, is_here, owner_tag

__all__ = ["PartialFile", "claimable", "claimable_bytes"]

_FREE = "free"
# Of another machine's processes nothing is known, and of this one's a number may have been
# given out again.
_IDLE_ELSEWHERE_S = 600.0
_IDLE_HERE_S = 24 * 3600.0
_TRIES = 20


class PartialFile:
    """The part of one file that is there, claimed for this process.

    As a context manager it gives the file up at the end, for the next download to go on
    with, unless it was moved to its place.

    Args:
        place: The folder of the file's content, ``ROOT/partial/DIGEST``.

    Attributes:
        path: Where it is.
    """

    def __init__(self, place: Path) -> None:
        self._place = place
        self.path = self._claim()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with suppress(OSError):
            self.path.rename(self._place / f"{_FREE}.{secrets.token_hex(8)}")

    @property
    def is_ours(self) -> bool:
        """Whether nobody has taken it over, or removed it."""
        return self.path.exists()

    def renew(self) -> None:
        """Begin with another, empty file; remove this one."""
        self.discard()
        self.path = self._create()

    def discard(self) -> None:
        """Remove it: nobody is to go on with it."""
        self.path.unlink(missing_ok=True)
        self._tidy()

    def move_to(self, target: Path) -> None:
        """Move it to its place, complete, replacing what is there."""
        self.path.replace(target)
        self._tidy()

    def _claim(self) -> Path:
        own = self._new_name()
        left = sorted(claimable(self._place), key=_size, reverse=True)
        for entry in left:
            # Somebody may be quicker; Windows moves no file that is open.
            with suppress(OSError):
                entry.rename(own)
                own.touch()
                for other in left:
                    if other != entry:
                        other.unlink(missing_ok=True)
                return own
        return self._create()

    def _create(self) -> Path:
        for attempt in range(_TRIES):
            path = self._new_name()
            try:
                self._place.mkdir(parents=True, exist_ok=True)
                path.touch(exist_ok=False)
            except (FileNotFoundError, FileExistsError):
                # Somebody has just removed the empty folder: before the file was made in it, or
                # between pathlib's attempt to make the folder and its look at what is there.
                if attempt == _TRIES - 1:
                    raise
            else:
                return path
        raise AssertionError

    def _new_name(self) -> Path:
        return self._place / f"{owner_tag()}.{secrets.token_hex(8)}"

    def _tidy(self) -> None:
        for folder in (self._place, self._place.parent):
            with suppress(OSError):  # another file is in it
                folder.rmdir()


def claimable(place: Path) -> Iterator[Path]:
    """The partial files of one content that nobody is writing.

    Args:
        place: ``ROOT/partial/DIGEST``, which need not be there.
    """
    try:
        entries = list(place.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        with suppress(FileNotFoundError):
            idle_s = time.time() - entry.stat().st_mtime
            is_left = entry.name.startswith(f"{_FREE}.") or is_dead(entry.name)
            if is_left or idle_s > (_IDLE_HERE_S if is_here(entry.name) else _IDLE_ELSEWHERE_S):
                yield entry


def claimable_bytes(place: Path) -> int:
    """Bytes of the longest of the `claimable` files, which a download goes on with."""
    return max(map(_size, claimable(place)), default=0)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1
