"""Which layouts of a model a folder holds, and which of its files are the weights.

Looking reads names, and config.json where a folder of safetensors must say whether mlx-lm
quantized it. No file of weights is opened, but to sample it for a fingerprint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from phirt.errors import ModelError, ModelNotFoundError, UnsafeModelError, UnsupportedModelError
from phirt.models.genai_config import GENAI_CONFIG_NAME
from phirt.models.huggingface_config import CONFIG_NAME
from phirt.models.paths import resolve_inside
from phirt.models.safe_json import read_json
from phirt.models.safetensors import weight_files

__all__ = [
    "FORMATS",
    "LAYOUTS",
    "ONNX_NAMES",
    "Layout",
    "files_of_weights",
    "find_layout",
    "fingerprint",
    "held_formats",
    "is_pickle",
]

FORMATS = ("onnx-genai", "openvino", "onnx", "mlx", "safetensors")
"""Every layout (`phirt.types.Artifact.format`), in the order in which a folder is asked for it."""

LAYOUTS = (
    f"phirt reads folders with {GENAI_CONFIG_NAME}, openvino_model.xml, {CONFIG_NAME} and "
    f"onnx/model.onnx, or {CONFIG_NAME} and safetensors files; and .gguf files"
)

_OPENVINO = ("openvino_model.xml", "openvino_model.bin")
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}

# Exports of one model in several precisions lie beside each other; the first that is there
# is taken: full precision, then half, then 8 bits, then 4. The names are those of Optimum
# and transformers.js.
ONNX_NAMES = {
    "model.onnx": None,
    "decoder_model_merged.onnx": None,
    "model_fp16.onnx": "fp16",
    "decoder_model_merged_fp16.onnx": "fp16",
    "model_int8.onnx": "int8",
    "model_quantized.onnx": "int8",
    "decoder_model_merged_quantized.onnx": "int8",
    "model_uint8.onnx": "int8",
    "model_q4.onnx": "int4",
    "model_q4f16.onnx": "int4",
    "model_bnb4.onnx": "int4",
}
"""Names of graphs in the layout ``"onnx"``, with the precision that each says it has."""

_ONNX_FOLDER = "onnx"

# Files beside a graph that hold none of its weights.
_TEXT_SUFFIXES = {".json", ".jinja", ".md", ".txt", ".onnx"}

# Samples of the weights in a fingerprint: enough that two fine-tunings of one model differ
# (they differ nearly everywhere), few enough to read in a millisecond.
_SAMPLES = 16
_SAMPLE_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What one layout consists of.

    Attributes:
        format: One of `FORMATS`.
        model_path: The graph, or None for safetensors, and for ``"onnx-genai"``, whose
            configuration names it.
        precision: How the weights are stored, where a file's name says so.
    """

    format: str
    model_path: Path | None = None
    precision: str | None = None


def held_formats(folder: Path) -> tuple[str, ...]:
    """The layouts that a folder holds, in the order of `FORMATS`.

    Raises:
        ModelFormatError: config.json or an index of safetensors is damaged.
        UnsafeModelError: One of them leads out of the folder.
    """
    look = _Look(folder)
    return tuple(name for name in FORMATS if look.find(name) is not None)


def find_layout(folder: Path, formats: Sequence[str]) -> Layout:
    """The first of some layouts that a folder holds.

    Args:
        folder: The folder, which is there.
        formats: Some of `FORMATS`.

    Raises:
        ModelNotFoundError: It holds no layout.
        ModelFormatError: config.json or an index of safetensors is damaged.
        UnsafeModelError: It holds only pickles, or leads out of itself.
        UnsupportedModelError: It holds only others.
    """
    look = _Look(folder)
    for name in formats:
        layout = look.find(name)
        if layout is not None:
            return layout
    held = held_formats(folder)
    if held:
        raise UnsupportedModelError(
            f"{folder} holds the layout {' and '.join(map(repr, held))}; "
            f"{' or '.join(map(repr, formats))} was asked for. Name another backend, or a "
            "folder that this one reads."
        )
    raise _refusal(folder)


def is_pickle(name: str) -> bool:
    """Whether a file of that name is a pickle, which can run any code when it is opened."""
    return Path(name).suffix.lower() in _PICKLES and not name.startswith("openvino_")


def fingerprint(folder: Path, layout: Layout) -> str:
    """Identify the weights of a folder that phirt did not write, without reading them whole.

    Hashing gigabytes would cost seconds at every load. The fingerprint covers name, size,
    time of modification and evenly spaced samples of the graph and of every file that can
    hold its weights. The samples tell apart files whose times were normalized (by an
    archive, say); the times tell apart files that differ only between the samples. A copy
    may get another fingerprint, which costs a cache miss and nothing else.

    Args:
        folder: The model folder.
        layout: What `find_layout` found, with its graph.
    """
    digest = hashlib.sha256()
    for file in files_of_weights(folder, layout):
        status = file.stat()
        role = "graph" if file == layout.model_path else "data"
        digest.update(f"{role}\0{file.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        with file.open("rb") as stream:
            for index in range(_SAMPLES):
                stream.seek(max(0, status.st_size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return f"fingerprint:{digest.hexdigest()[:32]}"


class _Look:
    """One look at a folder, which reads each directory and config.json once at most."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, name: str) -> Layout | None:
        """The layout of that name, if the folder holds it."""
        if name not in FORMATS:
            raise ValueError(f"{name!r} is not one of {', '.join(FORMATS)}")
        if name == "onnx-genai":
            return Layout(format=name) if GENAI_CONFIG_NAME in self._names else None
        if name == "openvino":
            graph = self._folder / _OPENVINO[0]
            return Layout(format=name, model_path=graph) if graph.name in self._names else None
        if CONFIG_NAME not in self._names:
            return None
        if name == "onnx":
            return self._find_onnx()
        return Layout(format=name) if name == self._kind_of_safetensors else None

    def _find_onnx(self) -> Layout | None:
        places = {}
        if _ONNX_FOLDER in self._names:
            places[self._folder / _ONNX_FOLDER] = _names_in(self._folder / _ONNX_FOLDER)
        if GENAI_CONFIG_NAME not in self._names:  # else the graph beside it is in that layout
            places[self._folder] = self._names
        for name, precision in ONNX_NAMES.items():
            for place, names in places.items():
                if name in names:
                    return Layout(format="onnx", model_path=place / name, precision=precision)
        return None

    @cached_property
    def _names(self) -> frozenset[str]:
        return _names_in(self._folder)

    @cached_property
    def _kind_of_safetensors(self) -> str | None:
        """``"mlx"`` where mlx-lm packed the weights, which transformers cannot read."""
        if not weight_files(self._folder):
            return None
        resolve_inside(self._folder, CONFIG_NAME)
        packed = read_json(self._folder / CONFIG_NAME).get("quantization")
        return "mlx" if packed else "safetensors"


def _names_in(folder: Path) -> frozenset[str]:
    return frozenset(entry.name for entry in folder.iterdir()) if folder.is_dir() else frozenset()


def files_of_weights(folder: Path, layout: Layout) -> Iterable[Path]:
    """The graph, and every file beside it that can hold its weights.

    Args:
        folder: The model folder.
        layout: What `find_layout` found, with its graph.
    """
    if layout.format == "openvino":
        return [folder / name for name in _OPENVINO]
    if layout.model_path is None:
        return weight_files(folder)
    # External data may have any name. That of another graph costs a cache miss at worst.
    beside = [
        file
        for file in layout.model_path.parent.iterdir()
        if file == layout.model_path or file.suffix not in _TEXT_SUFFIXES
    ]
    return sorted(file for file in beside if file.is_file())


def _refusal(folder: Path) -> ModelError:
    """What the folder is instead of a model folder."""
    names = sorted(entry.name for entry in folder.iterdir())
    suffixes = {Path(name).suffix.lower(): name for name in names}
    if ".gguf" in suffixes:
        return ModelNotFoundError(
            f"{folder} is not a model folder, but holds {suffixes['.gguf']}: name that file "
            "instead."
        )
    pickle = next((name for name in names if is_pickle(name)), None)
    if ".safetensors" not in suffixes and pickle is not None:
        return UnsafeModelError(
            f"{folder} holds its weights as a pickle ({pickle}), which can run any code when it "
            f"is opened, so phirt does not open it. {LAYOUTS}."
        )
    held = ", ".join(names[:5]) or "nothing"
    return ModelNotFoundError(f"{folder} is not a model folder: it holds {held}. {LAYOUTS}.")
