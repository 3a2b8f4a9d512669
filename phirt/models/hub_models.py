"""Models of a hub in the store: which build to fetch, fetching it, and finding it again.

What is fetched is pinned: the manifest keeps the commit, the name that was asked for and
the build that was chosen, so that the same name means the same files from then on, without
asking the hub.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from phirt._version import __version__
from phirt.errors import ModelError, UnsupportedModelError
from phirt.models.folder import read_folder
from phirt.models.hub_names import HubName
from phirt.models.manifest import Manifest, write_manifest
from phirt.models.store import Store
from phirt.models.variants import GGUF, Variant, choose_variant, device_rank
from phirt.types import ProgressCallback

if TYPE_CHECKING:
    from phirt.models.hub import HubFile, HubSnapshot
    from phirt.models.inventory import InstalledModel

__all__ = [
    "Fetched",
    "HubBuild",
    "fetch",
    "find_fetched",
    "find_source_of",
    "plan_build",
    "slug",
    "with_origin",
]

_DEFAULT_REVISION = "main"


@dataclass(frozen=True, slots=True, kw_only=True)
class HubBuild:
    """One build of a model on a hub, chosen and not yet fetched.

    Attributes:
        name: What was asked for.
        label: What the user calls it: a catalog name, or the name.
        snapshot: The commit that it means, with all its files.
        variant: The build.
        files: The build's files.
    """

    name: HubName
    label: str
    snapshot: HubSnapshot
    variant: Variant
    files: tuple[HubFile, ...]

    @property
    def origin(self) -> dict[str, str]:
        """What a manifest keeps of where it came from."""
        return {
            "repository": self.snapshot.repo,
            "revision": self.snapshot.commit,
            "asked_revision": self.name.revision or _DEFAULT_REVISION,
            "asked_path": self.name.path or "",
            "path": self.files[0].path if self.variant.format == GGUF else self.variant.folder,
            "devices": " ".join(sorted(self.variant.devices)),
            "license": self.snapshot.license or "",
            "bytes": str(self.variant.size),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """A build of a hub in the store.

    Attributes:
        path: Its model folder, or its one file.
        format: A layout, or `GGUF`.
        weights_id: Identifies the weights: ``"sha256:..."``.
        origin: Where it came from, for the manifest of what is made of it.
    """

    path: Path
    format: str
    weights_id: str
    origin: Mapping[str, str] = field(default_factory=dict)


def plan_build(
    name: HubName,
    *,
    label: str,
    formats: Sequence[str],
    device: str,
    offline: bool,
    commit: str | None = None,
) -> HubBuild:
    """Choose what to fetch. The hub is asked for its list of files and for nothing else.

    Args:
        name: What is wanted.
        label: What the user calls it.
        formats: What can be used, preferred first: layouts, and `GGUF`.
        device: Kind of the device that it will run on.
        offline: Raise rather than touch the network.
        commit: The commit that the name was pinned to, where it was.

    Raises:
        ModelNotFoundError: There is no such repository, revision or path, it may not be
            seen, or the hub cannot be asked.
        UnsafeModelError: All that it holds are pickles.
        UnsupportedModelError: It holds no build that fits.
    """
    from phirt.models.hub import open_snapshot

    pinned = name if commit is None else replace(name, revision=commit)
    snapshot = open_snapshot(pinned, offline=offline)
    by_path = {file.path: file for file in snapshot.files}
    variant = choose_variant(
        {path: file.size for path, file in by_path.items()},
        formats=formats,
        device=device,
        repository=name.repo,
        path=name.path,
    )
    files = tuple(by_path[path] for path in variant.files)
    return HubBuild(name=name, label=label, snapshot=snapshot, variant=variant, files=files)


def fetch(build: HubBuild, store: Store, *, progress: ProgressCallback | None) -> Fetched:
    """Fetch a build into the store, or find it there.

    Every file's hash is checked. A folder is read before it is installed, so that what a
    backend would refuse is not kept.

    Raises:
        ModelError: It cannot be fetched, is not what the hub lists, or is no model.
        StoreError: The disk is full, or the store cannot be written.
    """
    if build.variant.format == GGUF:
        return _fetch_file(build, store, progress)
    weights_id = _content_id(build.files)
    key = f"{slug(build.label)}-{build.variant.format}-{weights_id.partition(':')[2][:24]}"
    path = store.install(
        key,
        partial(_fill, build=build, weights_id=weights_id, store=store, progress=progress),
        name=build.label,
        needed_bytes=_missing_bytes(build.files, store),
    )
    return Fetched(
        path=path, format=build.variant.format, weights_id=weights_id, origin=build.origin
    )


def find_fetched(name: HubName, store: Store, *, device: str) -> Iterator[InstalledModel]:
    """What the store holds of a name, fetched or made of what was, for a device.

    Args:
        name: What is wanted.
        store: Where to look.
        device: Kind of the device that it will run on.
    """
    for model in store.installed():
        source = model.manifest.source
        devices = frozenset(str(source.get("devices", "")).split())
        if _is_of(name, source) and device_rank(device, devices) is not None:
            yield model


def find_source_of(model: InstalledModel, store: Store) -> Path | None:
    """The GGUF file of a hub that an artifact was converted from, if it is still there."""
    source = {key: str(value) for key, value in model.manifest.source.items()}
    sha256, filename = source.get("id", "").removeprefix("sha256:"), source.get("path", "")
    if not filename.endswith(".gguf") or not source.get("bytes", "").isdecimal():
        return None
    try:
        return store.find_source(
            sha256, PurePosixPath(filename).name, size=int(source["bytes"][:20])
        )
    except ValueError:  # a manifest that somebody else wrote
        return None


def slug(name: str) -> str:
    """A model's name as a part of a key of the store."""
    # Without dots: "con.v2" is a device on Windows, and no name for a folder.
    return re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-_")[:40].rstrip("-_") or "model"


def _is_of(name: HubName, source: Mapping[str, Any]) -> bool:
    """Whether a manifest's source is what a name means, or meant when it was fetched."""
    if source.get("repository") != name.repo:
        return False
    revisions = (source.get("asked_revision"), source.get("revision"))
    paths = (source.get("asked_path"), source.get("path") if name.path else None)
    return (name.revision or _DEFAULT_REVISION) in revisions and (name.path or "") in paths


def _fetch_file(build: HubBuild, store: Store, progress: ProgressCallback | None) -> Fetched:
    from phirt.models.hub_download import download

    (file,) = build.files
    if file.sha256 is None:
        raise UnsupportedModelError(
            f"{build.name.repo} keeps {file.path} in git itself, as no GGUF file of a model is "
            "kept: it is too small to be one."
        )
    filename = PurePosixPath(file.path).name

    def fill(folder: Path) -> None:
        download(build.snapshot, build.files, folder, store=store, progress=progress)
        if file.path != filename:
            (folder / file.path).replace(folder / filename)

    path = store.install_source(
        file.sha256,
        filename,
        fill,
        size=file.size,
        needed_bytes=_missing_bytes(build.files, store),
    )
    return Fetched(path=path, format=GGUF, weights_id=f"sha256:{file.sha256}", origin=build.origin)


def _missing_bytes(files: Sequence[HubFile], store: Store) -> int:
    """What an earlier download has left to fetch, and to find room for."""
    from phirt.models.hub_partial import claimable_bytes

    held = (claimable_bytes(store.root / "partial" / file.digest) for file in files)
    return sum(max(0, file.size - size) for file, size in zip(files, held, strict=True))


def _fill(
    folder: Path,
    *,
    build: HubBuild,
    weights_id: str,
    store: Store,
    progress: ProgressCallback | None,
) -> None:
    """Download a build and make a model folder of it, with its manifest."""
    from phirt.models.hub_download import download

    download(build.snapshot, build.files, folder, store=store, progress=progress)
    hashes = {}
    for file in build.files:
        # A build keeps all its files in one folder: its graph and external data are siblings,
        # whichever folder of the repository they came from.
        name = PurePosixPath(file.path).name
        if file.path != name:
            (folder / file.path).replace(folder / name)
        if file.sha256:
            hashes[name] = file.sha256
    _remove_empty_folders(folder)
    try:
        model = read_folder(folder, name=build.label, formats=_as_read(build.variant.format))
    except ModelError as error:
        # The folder goes with the failure: what is at fault is the repository.
        origin = f"{build.snapshot.repo} at {build.snapshot.commit[:7]}"
        raise type(error)(str(error).replace(str(folder), origin)) from error
    write_manifest(
        folder,
        weights_id=weights_id,
        architecture=model.artifact.architecture or "unknown",
        precision=model.artifact.precision or build.variant.precision or "unknown",
        source=build.origin,
        versions={"phirt": __version__},
        sha256=hashes,
    )


def _as_read(layout: str) -> tuple[str, ...]:
    """The layouts that a fetched folder may turn out to be.

    Which of two a folder of safetensors is, its config.json says and its name only suggests.
    """
    return ("mlx", "safetensors") if layout in ("mlx", "safetensors") else (layout,)


def _remove_empty_folders(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            path.rmdir()


def _content_id(files: Sequence[HubFile]) -> str:
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.path):
        digest.update(f"{PurePosixPath(file.path).name}\0{file.size}\0{file.digest}\0".encode())
    return f"sha256:{digest.hexdigest()}"


def with_origin(manifest: Manifest, origin: Mapping[str, str]) -> Manifest:
    """The manifest of what was converted, which says also where the source came from."""
    return replace(manifest, source={**manifest.source, **origin})
