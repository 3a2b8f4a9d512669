"""Checkpoints to model folders of the layout that a backend reads, made once and kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from phirt.build.precision import FORMAT_PRECISIONS, Precision, check_precision
from phirt.build.version import CONVERTER_VERSION
from phirt.errors import BackendNotInstalledError, PhirtError, UnsupportedModelError
from phirt.models.folder import ModelFolder, read_folder
from phirt.models.hub_models import slug, with_origin
from phirt.models.manifest import read_manifest, save_manifest
from phirt.models.store import Store
from phirt.types import ProgressCallback

__all__ = [
    "PRECISIONS",
    "Wanted",
    "artifact_key",
    "check_precision_name",
    "convert_checkpoint",
    "find_converted",
    "needed_packages",
    "required_layout",
]

PRECISIONS = ("auto", *(precision.value for precision in Precision))
"""How a checkpoint may be converted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a model is to become, and who is told how far that is.

    Attributes:
        formats: The layouts that the backend reads, preferred first.
        precision: One of `PRECISIONS`.
        device: Kind of the device that it will run on.
        offline: Never touch the network.
        repair: Replace what was damaged in the store, rather than refuse it.
        settle: Where the store holds the model in a form for another backend, refuse rather
            than fetch one for this backend: the other one is about to be asked.
        progress: Called as a download or a conversion advances.

    Raises:
        ValueError: The precision is not one of `PRECISIONS`.
    """

    formats: tuple[str, ...]
    precision: str
    device: str = "cpu"
    offline: bool = False
    repair: bool = False
    settle: bool = False
    progress: ProgressCallback | None = None

    def __post_init__(self) -> None:
        check_precision_name(self.precision)

    @property
    def layout(self) -> str | None:
        """The first of the layouts that phirt writes."""
        return next((layout for layout in self.formats if layout in FORMAT_PRECISIONS), None)


def check_precision_name(precision: str) -> None:
    """Raise `ValueError` for a precision that does not exist."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is not one of {', '.join(PRECISIONS)}")


def required_layout(source: Path | str, wanted: Wanted) -> str:
    """The layout that a checkpoint would be converted to.

    Raises:
        UnsupportedModelError: The backend reads nothing that phirt writes.
    """
    if wanted.layout is None:
        raise UnsupportedModelError(
            f"{source} is a checkpoint, and phirt writes none of the layouts that this backend "
            f"reads ({', '.join(wanted.formats)}). Name a folder of one of these, or another "
            "backend."
        )
    return wanted.layout


def convert_checkpoint(
    source: Path,
    *,
    name: str,
    source_id: str,
    wanted: Wanted,
    origin: Mapping[str, str] | None = None,
    texts: str = "",
) -> ModelFolder:
    """The folder made from a checkpoint, made now if it has not been.

    Args:
        source: A ``.gguf`` file or a folder of safetensors.
        name: What the user calls the model.
        source_id: Identifies the checkpoint's weights: ``"sha256:..."``.
        wanted: What it is to become.
        origin: Where the checkpoint came from, for the manifest.
        texts: Identifies configuration, tokenizer and chat template, where ``source_id`` does
            not.

    Raises:
        UnsupportedModelError: It cannot be converted, or the backend reads nothing that
            phirt writes.
        BackendNotInstalledError: A package that the conversion needs is missing.
        StoreError: The store cannot be written.
    """
    layout = required_layout(source, wanted)
    with needed_packages(source, layout):
        # Imported here: a folder loads without the converter and what it needs.
        from phirt.build import convert

        precision = wanted.precision
        if precision == "auto":
            precision = convert.choose_precision(source, layout)
        check_precision(layout, precision)
        store = Store()
        key = artifact_key(name, layout, precision, source_id, texts)
        path = None if wanted.repair else store.find(key)
        if path is None:

            def fill(folder: Path) -> None:
                convert.convert(
                    source,
                    folder,
                    layout=layout,
                    precision=precision,
                    source_id=source_id,
                    progress=wanted.progress,
                )
                manifest = read_manifest(folder)
                if origin and manifest is not None:
                    save_manifest(folder, with_origin(manifest, origin))

            needed = convert.estimate_bytes(source, precision)
            path = store.install(key, fill, name=name, needed_bytes=needed)
    return read_folder(path, name=name, formats=(layout,))


def find_converted(name: str, source_id: str, wanted: Wanted) -> ModelFolder | None:
    """The folder made earlier of a checkpoint that is not in the store any more, or None.

    A precision of ``"auto"`` depends on the checkpoint; without it, the two that it can be
    are looked for.

    Args:
        name: What the user calls the model.
        source_id: Identifies the checkpoint's weights.
        wanted: What it was to become.

    Raises:
        ModelError: It is there and was changed.
    """
    layout = wanted.layout
    if layout is None:
        return None
    chosen: tuple[str, ...] = (wanted.precision,)
    if wanted.precision == "auto":
        possible = (Precision.INT8, Precision.FP32)
        chosen = tuple(p.value for p in possible if p in FORMAT_PRECISIONS[layout])
    for precision in chosen:
        path = Store().find(artifact_key(name, layout, precision, source_id))
        if path is not None:
            return read_folder(path, name=name, formats=(layout,))
    return None


def artifact_key(name: str, layout: str, precision: str, source_id: str, texts: str = "") -> str:
    """Key in the store: all that an artifact depends on, a newer converter makes a new one."""
    digest = source_id.partition(":")[2]
    if texts:
        digest = hashlib.sha256(f"{digest}\0{texts}".encode()).hexdigest()
    digest = digest[:24]
    return f"{slug(name)}-{layout}-{precision}-{digest}-v{CONVERTER_VERSION}"


@contextmanager
def needed_packages(source: Path, layout: str) -> Iterator[None]:
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
