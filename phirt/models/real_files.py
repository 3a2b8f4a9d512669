"""Model folders whose files are links, for runtimes that do not follow links.

Hugging Face's cache keeps each file once, under the hash of its content in ``blobs/``, and
makes a model folder of links to them. OpenVINO opens no such link.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from phirt.errors import ModelNotFoundError
from phirt.models.layouts import is_pickle
from phirt.models.paths import model_files
from phirt.models.store import Store

__all__ = ["copy_file", "real_folder"]


def real_folder(folder: Path, *, store: Store | None = None) -> Path:
    """The folder itself, or where files of it are links, a copy of it in the store.

    A copy is made once, and anew when a file changes. It shares the disk's blocks with the
    original where the file system can (Btrfs and XFS on Linux, ReFS on Windows). Times of
    modification are kept, so that both have one fingerprint. Pickles and hidden files are
    left out.

    Args:
        folder: A model folder.
        store: Where the copy goes; the default store where not given.

    Raises:
        ModelNotFoundError: A link leads to nothing.
        UnsafeModelError: A link leads out of the folder, and not into the blobs of the same
            cached repository.
        StoreError: There is no room for a copy, or the store cannot be written.
    """
    root = folder.resolve()
    files = dict(model_files(folder))
    if all(real == root / name for name, real in files.items()):
        return folder
    wanted = {name: real for name, real in files.items() if _is_wanted(name)}

    def fill(target: Path) -> None:
        for name, real in wanted.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            copy_file(real, target / name)

    try:
        needed_bytes = sum(real.stat().st_size for real in wanted.values())
        key = f"{_label(root)}-{_digest(wanted)}"
    except FileNotFoundError as error:
        raise ModelNotFoundError(
            f"{folder} has a link to {error.filename}, which is not there. Fetch the model again."
        ) from error
    return (store or Store()).install_copy(key, fill, needed_bytes=needed_bytes)


def _is_wanted(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.name.startswith(".") and not is_pickle(path.name)


def _label(root: Path) -> str:
    """What the copy is called, for whoever looks into the store."""
    cached = [parent.name for parent in root.parents if parent.name.startswith("models--")]
    name = cached[0].removeprefix("models--") if cached else root.name
    # Without dots: "con.v2" is a device on Windows, and no name for a folder.
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60] or "model"


def _digest(files: Mapping[str, Path]) -> str:
    """Identifies the files: where they are, their sizes and times."""
    digest = hashlib.sha256()
    for name, real in sorted(files.items()):
        status = real.stat()
        digest.update(os.fsencode(f"{name}\0{real}\0{status.st_size}\0{status.st_mtime_ns}\0"))
    return digest.hexdigest()[:32]


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's content and times, sharing its blocks where the file system can.

    Args:
        source: The file.
        target: Where the copy goes, in a folder that is there.
    """
    if not _copy_within_kernel(source, target):
        shutil.copy2(source, target)  # On Windows this is CopyFile2, which clones blocks on ReFS.
    status = source.stat()
    target.chmod(0o644)  # A cache may hold read-only files, which Windows would not remove.
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))


def _copy_within_kernel(source: Path, target: Path) -> bool:
    """Copy without reading, where the system can: file systems then share the blocks."""
    copy_range = getattr(os, "copy_file_range", None)  # Linux has it
    if copy_range is None:
        return False
    left = source.stat().st_size
    try:
        with source.open("rb") as reader, target.open("wb") as writer:
            while left > 0:
                copied = copy_range(reader.fileno(), writer.fileno(), left)
                if copied == 0:  # some file systems say so rather than refuse
                    return False
                left -= copied
    except OSError:  # not between these file systems; a full disk fails again below
        return False
    return True
