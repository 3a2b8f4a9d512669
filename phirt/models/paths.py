"""Which names a model may use for its files, and where they may lead.

A model folder is data. A name in it that reaches outside (``..``, an absolute path, a
drive, a link) would let a download read or write the user's other files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from phirt.errors import ModelFormatError, UnsafeModelError

__all__ = ["check_links", "model_files", "plain_name_fault", "resolve_inside"]

_FAULTS = tuple(
    (re.compile(pattern, re.IGNORECASE | re.DOTALL), fault)
    for pattern, fault in (
        (r"\Z", "it is empty"),
        (r"\.\.?\Z", "it names this folder or the one above"),
        (r"[^/\\]*[/\\]", "it contains a separator"),
        (r"[^:]*:", "it contains a colon, which names a drive or a stream"),
        (r'[^\x00-\x1f\x7f<>"|?*]*[\x00-\x1f\x7f<>"|?*]', "it contains a forbidden character"),
        # A terminal takes them for orders, or writes the rest from right to left.
        (r".*[\x80-\x9f\u2028-\u202e\u2066-\u2069]", "it contains a forbidden character"),
        (r"[^\ud800-\udfff]*[\ud800-\udfff]", "it is not valid Unicode"),
        (r" |.*[. ]\Z", "it begins with a space, or ends with a space or a dot"),
        # Windows opens these as devices, whatever the extension and in any folder.
        (
            r"(con|prn|aux|nul|conin\$|conout\$|com[0-9\xb9\xb2\xb3]|lpt[0-9\xb9\xb2\xb3])(\.|\Z)",
            "it is a device on Windows",
        ),
    )
)
_MAX_NAME_BYTES = 200
_MAX_ENTRIES = 10_000


def plain_name_fault(name: str) -> str | None:
    """Why a name is not the plain name of one file or folder on every system, or None.

    Refused on every system, so that a folder means the same on all of them: separators,
    drive letters and streams (``:``), ``.`` and ``..``, NUL and other control characters,
    Windows' wildcards and device names, a leading space, a trailing dot or space (which
    Windows drops), and more than 200 bytes of UTF-8.

    Args:
        name: The name, as a model, a catalog or a user gave it.
    """
    for pattern, fault in _FAULTS:
        if pattern.match(name):
            return fault
    if len(name.encode("utf-8")) > _MAX_NAME_BYTES:
        return f"it is longer than {_MAX_NAME_BYTES} bytes"
    return None


def resolve_inside(folder: Path, name: str) -> Path:
    """Resolve a file of a model folder, refusing what leads out of it.

    Links are followed. The one place outside that they may lead to is ``blobs/`` of the same
    cached Hugging Face repository, whose snapshots are made of such links.

    Args:
        folder: The model folder.
        name: A relative POSIX path, such as ``"model.onnx.data"`` or ``"weights/0.bin"``.

    Returns:
        The real path, which may not exist.

    Raises:
        UnsafeModelError: The path is absolute, climbs, names a device or a stream, or leads
            through a link to somewhere else.
    """
    for part in name.removeprefix("./").split("/"):
        fault = plain_name_fault(part)
        if fault:
            raise UnsafeModelError(
                f"The model in {folder} refers to the file {name[:200]!r}, which phirt does not "
                f"open: {fault}. A model may only name files inside its own folder."
            )
    root = folder.resolve()
    try:
        target = (root / name).resolve()
    except (OSError, RuntimeError) as error:  # a loop of links: RuntimeError before Python 3.13
        raise ModelFormatError(f"{root / name} cannot be resolved: {error}.") from error
    if not any(target.is_relative_to(allowed) for allowed in _allowed_roots(root)):
        raise UnsafeModelError(
            f"{folder / name} is a link that leads out of the model folder, to {target}. "
            "Copy the file into the folder if you trust it."
        )
    return target


def check_links(folder: Path) -> None:
    """Refuse a model folder in which an entry, at any depth, leads out of it.

    Args:
        folder: The model folder.

    Raises:
        UnsafeModelError: An entry is a link that leads out of the folder, or there are more
            entries than a model has.
    """
    for _ in model_files(folder):
        pass


def model_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Every file of a model folder, at any depth.

    Hidden folders (``.git``, ``.cache``) are passed over, and so are links to folders
    within: phirt reads nothing in either.

    Args:
        folder: The model folder.

    Yields:
        Its path relative to the folder, with ``/``, and its real path.

    Raises:
        UnsafeModelError: As `check_links`.
    """
    seen = 0
    root = folder.resolve()
    pending = [("", root)]
    while pending:
        prefix, place = pending.pop()
        for entry in sorted(place.iterdir()):
            seen += 1
            if seen > _MAX_ENTRIES:
                raise UnsafeModelError(
                    f"{folder} has more than {_MAX_ENTRIES:,} files, which no model has. Name "
                    "the model's own folder."
                )
            name = prefix + entry.name
            real = entry.resolve()
            is_link = real != place / entry.name  # or a junction of Windows
            if is_link:
                resolve_inside(folder, name)
            if not real.is_dir():
                yield name, real
            elif not is_link and not entry.name.startswith("."):
                pending.append((f"{name}/", real))


def _allowed_roots(root: Path) -> list[Path]:
    """The folder itself and, in a Hugging Face cache, the blobs of the same repository.

    The cache's layout is ``models--ORG--NAME/snapshots/REVISION/...`` beside
    ``models--ORG--NAME/blobs``.
    """
    roots = [root]
    for snapshots in root.parents:
        repository = snapshots.parent
        if snapshots.name == "snapshots" and repository.name.startswith("models--"):
            roots.append(repository / "blobs")
            break
    return roots
