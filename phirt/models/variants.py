"""Which of a repository's builds to take, and which of its files that is.

A repository holds one model in many forms: layouts, precisions, devices that a graph was
exported for. Looking at the names and sizes of its files is enough to tell them apart, so
the choice is made before a byte of weights is fetched, and only the files of the chosen
build are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from phirt.errors import ModelError, ModelNotFoundError, UnsafeModelError, UnsupportedModelError
from phirt.models.genai_config import GENAI_CONFIG_NAME
from phirt.models.huggingface_config import CONFIG_NAME
from phirt.models.layouts import FORMATS, ONNX_NAMES, is_pickle
from phirt.models.safetensors import INDEX_NAME

__all__ = ["GGUF", "Variant", "choose_variant", "device_rank", "list_variants", "megabytes"]

GGUF = "gguf"
"""A checkpoint in one file, which is no layout of a model folder: it is converted."""

_TOKENIZER = "tokenizer.json"
# What phirt reads of a folder beside its weights; nothing else is fetched.
_TEXTS = frozenset(
    {
        CONFIG_NAME,
        GENAI_CONFIG_NAME,
        _TOKENIZER,
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer_config.json",
    }
)
# Words in the path of a graph that say what it was exported for.
_DEVICES = {
    "cpu": "cpu",
    "cuda": "cuda",
    "directml": "directml",
    "dml": "directml",
    "gpu": "gpu",
    "npu": "npu",
    "qnn": "npu",
    "webgpu": "webgpu",
}
# The devices that a build for "gpu" is for.
_GPUS = ("cuda", "directml", "gpu", "webgpu")
_PRECISION = re.compile(
    r"(?<![a-z0-9])(fp32|fp16|bf16|int8|int4|f32|f16|q\d(?:_[0-9k])?(?:_[sml])?)"
)
# Encodings in which a model is published, the least lossy of those of a reasonable size first.
_GGUF_ORDER = (
    *("q8_0", "q6_k", "q5_k_m", "q5_k", "q4_k_m", "q4_k", "q4", "q4_1", "q4_0"),
    *("f16", "fp16", "bf16", "f32", "fp32"),
)
_GGUF_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
# A model in several files is not converted. Beside models there are their encoders of images,
# and the statistics that they were quantized with.
_NO_GGUF_MODEL = re.compile(rf"{_GGUF_PART.pattern}|mmproj|imatrix")


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One build of a model in a repository.

    Attributes:
        format: One of `phirt.models.layouts.FORMATS`, or `GGUF`.
        folder: Where it lies in the repository; empty for its top.
        files: Paths in the repository of all its files, and of no others.
        size: What they take, in bytes.
        precision: How the weights are stored, where a name says so.
        devices: What it was exported for, in phirt's words; empty for any device.
        order: Place among builds of the same format: the least is taken.
    """

    format: str
    folder: str
    files: tuple[str, ...]
    size: int
    precision: str | None
    devices: frozenset[str] = frozenset()
    order: int = 0

    @property
    def described(self) -> str:
        """What it is, for a message: ``onnx-genai, int4, 2,770 MB, in gpu/gpu-int4``."""
        place = self.files[0] if self.format == GGUF else self.folder
        parts = [self.format, self.precision, megabytes(self.size), place and f"in {place}"]
        return ", ".join(part for part in parts if part)


def megabytes(size: int) -> str:
    """A size for people, in decimal megabytes: ``2,770 MB``."""
    return f"{size / 1e6:,.0f} MB" if size >= 1e6 else f"{size / 1e6:.1f} MB"


def choose_variant(
    sizes: Mapping[str, int],
    *,
    formats: Sequence[str],
    device: str,
    repository: str,
    path: str | None = None,
) -> Variant:
    """The build that fits what will run it.

    Args:
        sizes: Bytes of each file of the repository, by its path.
        formats: What can be used, preferred first: layouts, and `GGUF`.
        device: Kind of the device that it will run on: ``"cpu"``, ``"cuda"``.
        repository: Its name, for messages; mlx-lm's builds are told by it.
        path: A folder or a file of the repository that was asked for, or None.

    Raises:
        ModelNotFoundError: The repository has no such path.
        UnsafeModelError: All that it holds are pickles.
        UnsupportedModelError: It holds no build that fits.
    """
    found = list(list_variants(sizes, repository=repository))
    if path is not None:
        found = _within(found, path, sizes, repository)
    fitting = [
        (formats.index(variant.format), rank, variant.order, variant.size, variant)
        for variant in found
        if variant.format in formats and (rank := device_rank(device, variant.devices)) is not None
    ]
    if not fitting:
        place = f"{repository}:{path}" if path else repository
        raise _nothing_fits(found, sizes=sizes, formats=formats, device=device, place=place)
    return min(fitting, key=lambda entry: entry[:-1])[-1]


def device_rank(device: str, devices: frozenset[str]) -> int | None:
    """How well a build for ``devices`` fits a kind of device: 0 best, None not at all.

    What was exported for a GPU runs there and nowhere else; what was exported for the CPU
    also runs where a runtime takes graphs of any kind (``"npu"``, ``"openvino-cpu"``).
    """
    if device in devices:
        return 0
    if not devices:
        return 2
    if device in _GPUS:
        return 1 if "gpu" in devices else None
    return 3 if device != "cpu" and "cpu" in devices else None


def list_variants(sizes: Mapping[str, int], *, repository: str) -> Iterator[Variant]:
    """Every build in a repository, in no particular order.

    Args:
        sizes: Bytes of each file, by its path.
        repository: Its name.
    """
    folders: dict[str, dict[str, int]] = {}
    for path, size in sizes.items():
        folder, _, name = path.rpartition("/")
        folders.setdefault(folder, {})[name] = size
    look = _Look(folders, is_mlx="mlx" in repository.lower())
    for folder, names in folders.items():
        yield from look.gguf(folder, names)
        if _TOKENIZER in names:
            yield from look.folder(folder, names)


@dataclass(frozen=True, slots=True)
class _Look:
    """Recognizes the builds of one repository.

    Attributes:
        folders: Sizes of the files of each folder, by name.
        is_mlx: Whether its safetensors are mlx-lm's, quantized.
    """

    folders: Mapping[str, Mapping[str, int]]
    is_mlx: bool

    def folder(self, folder: str, names: Mapping[str, int]) -> Iterator[Variant]:
        texts = sorted(_TEXTS & names.keys())
        if GENAI_CONFIG_NAME in names:
            graphs = [name for name in names if _is_onnx_file(name)]
            yield self._build("onnx-genai", folder, {folder: [*texts, *graphs]})
        if CONFIG_NAME not in names:
            return
        texts = [name for name in texts if name != GENAI_CONFIG_NAME]
        if {"openvino_model.xml", "openvino_model.bin"} <= names.keys():
            graph = ["openvino_model.xml", "openvino_model.bin"]
            yield self._build("openvino", folder, {folder: [*texts, *graph]})
        yield from self._onnx(folder, names, texts)
        weights = _safetensors(names)
        if weights:
            layout = "mlx" if self.is_mlx else "safetensors"
            yield self._build(layout, folder, {folder: [*texts, *weights]})

    def gguf(self, folder: str, names: Mapping[str, int]) -> Iterator[Variant]:
        for name in names:
            if name.endswith(".gguf") and not _NO_GGUF_MODEL.search(name):
                precision = _precision(name)
                order = len(_GGUF_ORDER)
                if precision in _GGUF_ORDER:
                    order = _GGUF_ORDER.index(precision)
                yield self._build(GGUF, folder, {folder: [name]}, order=order, named=name)

    def _onnx(
        self, folder: str, names: Mapping[str, int], texts: Sequence[str]
    ) -> Iterator[Variant]:
        below = f"{folder}/onnx" if folder else "onnx"
        places = {below: self.folders.get(below, {})}
        if GENAI_CONFIG_NAME not in names:
            places[folder] = names
        for order, graph in enumerate(ONNX_NAMES):
            for place, held in places.items():
                if graph in held:
                    parts = [name for name in held if _is_of_graph(name, graph)]
                    chosen: dict[str, Sequence[str]] = {folder: texts}
                    chosen[place] = [*chosen.get(place, ()), *parts]
                    yield self._build("onnx", folder, chosen, order=order, named=graph)

    def _build(
        self,
        layout: str,
        folder: str,
        chosen: Mapping[str, Sequence[str]],
        *,
        order: int = 0,
        named: str = "",
    ) -> Variant:
        files = [(place, name) for place, names in chosen.items() for name in names]
        words = set(re.split(r"[^a-z0-9]+", folder.lower()))
        if words & {"cuda", "directml", "dml", "webgpu"}:
            words.discard("gpu")  # of all the builds for GPUs, this one is for one kind
        exported = layout in ("onnx-genai", "onnx")
        # The Model Builder's accuracy_level 4 computes in 8 bits, which is faster on the CPU.
        slower = exported and layout == "onnx-genai" and "acc-level-4" not in folder
        return Variant(
            format=layout,
            folder=folder,
            files=tuple(f"{place}/{name}".lstrip("/") for place, name in files),
            size=sum(self.folders[place][name] for place, name in files),
            precision=ONNX_NAMES.get(named) or _precision(named or folder),
            devices=frozenset(_DEVICES[word] for word in words & _DEVICES.keys())
            if exported
            else frozenset(),
            order=order + slower,
        )


def _is_onnx_file(name: str) -> bool:
    return bool(re.search(r"\.onnx([._]data(_\d+)?)?$|\.data$", name))


def _is_of_graph(name: str, graph: str) -> bool:
    return bool(re.fullmatch(re.escape(graph) + r"([._]data(_\d+)?)?", name))


def _safetensors(names: Mapping[str, int]) -> list[str]:
    """The weights, as `phirt.models.safetensors.weight_files` finds them in the folder."""
    all_of = sorted(name for name in names if re.fullmatch(r"model.*\.safetensors", name))
    if INDEX_NAME in names:
        shards = [name for name in all_of if re.search(r"-\d+-of-\d+\.safetensors$", name)]
        # Of "model.fp16-00001-of-..." beside "model-00001-of-...", the index names the latter.
        plain = [name for name in shards if re.match(r"model-\d", name)]
        return [INDEX_NAME, *(plain or shards or all_of)]
    return ["model.safetensors"] if "model.safetensors" in all_of else all_of


def _precision(name: str) -> str | None:
    match = _PRECISION.search(name.lower())
    return match[1] if match else None


def _within(
    found: Sequence[Variant], path: str, sizes: Mapping[str, int], repository: str
) -> list[Variant]:
    """The builds in a folder, or of which a file is a part."""
    path = path.strip("/")
    if path in sizes:
        return [variant for variant in found if path in variant.files]
    inside = f"{path}/"
    if not any(name.startswith(inside) for name in sizes):
        near = sorted({str(PurePosixPath(name).parent) for name in sizes} - {"."})
        raise ModelNotFoundError(
            f"{repository} has no file or folder {path[:200]!r}. Its folders are: "
            f"{', '.join(near[:12]) or 'none'}."
        )
    return [
        variant
        for variant in found
        if variant.folder == path
        or variant.folder.startswith(inside)
        or any(file.startswith(inside) for file in variant.files)
    ]


def _nothing_fits(
    found: Sequence[Variant],
    *,
    sizes: Mapping[str, int],
    formats: Sequence[str],
    device: str,
    place: str,
) -> ModelError:
    if found:
        held = "; ".join(dict.fromkeys(variant.described for variant in found[:6]))
        return UnsupportedModelError(
            f"{place} holds nothing that fits {' or '.join(formats)} on {device}. It holds: "
            f"{held}. Name another backend or device, or one of these by its path."
        )
    pickle = next((name for name in sizes if is_pickle(PurePosixPath(name).name)), None)
    if pickle is not None and not any(name.endswith(".safetensors") for name in sizes):
        return UnsafeModelError(
            f"{place} holds its weights as a pickle ({pickle}), which can run any code when it is "
            "opened, so phirt does not fetch it. Name a repository with safetensors, GGUF, ONNX "
            "or OpenVINO files."
        )
    if any(_GGUF_PART.search(name) for name in sizes):
        return UnsupportedModelError(
            f"{place} holds .gguf models in several parts only, which phirt does not read. Name "
            "a repository with one in one file, or with safetensors."
        )
    kinds = sorted({PurePosixPath(name).suffix or name for name in sizes})
    return UnsupportedModelError(
        f"{place} holds no model in a form that phirt reads ({', '.join(FORMATS)} with a "
        f"{_TOKENIZER}, or a .gguf file). Its files end in: {', '.join(kinds[:12]) or 'nothing'}."
    )
