"""Puts a model folder where a user wants it: whole, or not at all.

As in the store (`phirt.models.staging`), it is written beside its place and moved there by one
rename. A process that is killed leaves a folder whose name says whose it was, and the next
one that builds into the same parent removes it.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from phirt.errors import StoreError
from phirt.models.disk import check_room, free_bytes, is_disk_full, megabytes
from phirt.models.kill_points import kill_point
from phirt.models.manifest import MANIFEST_NAME
from phirt.models.owners import is_dead, owner_tag
from phirt.models.staging import Fill, publish, sync_tree

__all__ = ["check_place", "place"]

_LEFTOVER = re.compile(r"\..+\.phirt-build@([0-9a-f]{12}\.\d+)\.[0-9a-f]{8}", re.DOTALL)


def place(target: Path, fill: Fill, *, overwrite: bool = False, needed_bytes: int = 0) -> None:
    """Fill a new folder and move it to its place.

    Args:
        target: The place; its parents are made if need be.
        fill: Writes the content into an empty folder. Whatever it raises propagates, and
            nothing is left.
        overwrite: Replace what phirt has built there before; it stays until the new one is
            complete.
        needed_bytes: Room that the content will take; checked before ``fill`` runs.

    Raises:
        StoreError: Something is there, the disk is full, or the folder cannot be written.
    """
    check_place(target, overwrite=overwrite)
    tag = f"{owner_tag()}.{secrets.token_hex(4)}"
    work = target.parent / f".{target.name}.phirt-build@{tag}"

    def refuse_other() -> None:
        """Whatever somebody else has put there meanwhile is as safe as what was there before."""
        check_place(target, overwrite=overwrite)

    with _disk_errors(target, work, needed_bytes), _parents_of(target):
        _sweep(target.parent)
        try:
            content = work / "content"
            content.mkdir(parents=True)
            kill_point("fill")
            check_room(content, needed_bytes)
            fill(content)
            kill_point("sync")
            sync_tree(content)
            refuse_other()
            publish(content, target, find=refuse_other, aside=work)
            kill_point("published")
        finally:
            shutil.rmtree(work, ignore_errors=True)


def check_place(target: Path, *, overwrite: bool = False) -> None:
    """Refuse a place that is taken.

    Args:
        target: The place.
        overwrite: Whether a folder that phirt built may be replaced.

    Raises:
        StoreError: A file, a link or a folder with content is there.
    """
    if not os.path.lexists(target):
        return
    if target.is_symlink():
        # Of what it leads to, others may know by another name.
        raise StoreError(
            f"{target} is a link, which is neither followed nor replaced. Name the folder that it "
            "leads to, or another."
        )
    try:
        if target.is_dir() and not any(target.iterdir()):
            return
        is_model = (target / MANIFEST_NAME).is_file()
    except OSError as error:
        raise StoreError(
            f"{target} cannot be read: {error.strerror or error}. Name another folder."
        ) from error
    if is_model:
        if overwrite:
            return
        raise StoreError(
            f"{target} is a model already. Name another folder, or pass --overwrite "
            "(overwrite=True) to replace it."
        )
    raise StoreError(
        f"{target} exists and is no model that phirt built, so it is not overwritten. Name "
        "another folder."
    )


@contextmanager
def _parents_of(target: Path) -> Iterator[None]:
    """Make the folders above a place, and remove them again where nothing came of it."""
    made: list[Path] = []
    try:
        for parent in reversed(target.parents):
            if not parent.exists():
                parent.mkdir(exist_ok=True)
                made.append(parent)
        yield
    except BaseException:
        for parent in reversed(made):
            with suppress(OSError):  # Somebody else has put something there.
                parent.rmdir()
        raise


@contextmanager
def _disk_errors(target: Path, work: Path, needed_bytes: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            needs = f"about {megabytes(needed_bytes)}" if needed_bytes else "more"
            raise StoreError(
                f"Building {target} needs {needs} of disk space; there are "
                f"{megabytes(free_bytes(target.parent))} free. Nothing was left behind. Free some "
                "space, or name a folder on another disk."
            ) from error
        if isinstance(error, OSError) and not isinstance(error, FileExistsError):
            named = error.filename or error.filename2
            # What is read lies elsewhere, and may lie beside it.
            if named is None or _is_of(Path(str(named)), target, work):
                raise StoreError(
                    f"{target} cannot be written: {error.strerror or error}. Name a folder that "
                    "you may write to."
                ) from error
        raise


def _is_of(path: Path, target: Path, work: Path) -> bool:
    """Whether a path is one of those that a build writes to."""
    return path.is_relative_to(work) or path == target or path in target.parents


def _sweep(parent: Path) -> None:
    """Remove what builds that died have left."""
    for entry in parent.iterdir():
        found = _LEFTOVER.fullmatch(entry.name)
        if found and is_dead(found[1]):
            shutil.rmtree(entry, ignore_errors=True)
