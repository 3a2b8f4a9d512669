"""Flips one bit of a model at a time, reads what is left, and says how that ended.

A process of its own, because what it looks for ends one: `python -m tests.build.bit_flips KIND
PRISTINE SCRATCH FIRST STOP` works through the flips of these numbers and prints, for each,
``NUMBER OUTCOME``: ``ok``, the name of an error of phirt's, or ``foreign`` and what it was.
"""

from __future__ import annotations

import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from phirt.build.convert import convert
from phirt.errors import PhirtError
from phirt.models.canary import read_canary
from phirt.models.folder import read_folder
from phirt.models.onnx_safety import check_onnx_files
from phirt.text.tokenizer import Tokenizer

__all__ = ["KINDS", "flip"]

# Half of the flips hit these first bytes: what is read before anything else, and believed.
_HEADER_BYTES = {"model.gguf": 8192, "model.safetensors": 1024, "model.onnx": 4096}
_LAYOUTS = (("onnx-genai", "exact"), ("safetensors", "fp32"), ("onnx-genai", "int4"))
_SEED = 20261128
_MEMORY = 4 << 30  # bytes of addresses: what a lie may not make a reader ask for


def flip(sizes: Mapping[str, int], number: int) -> tuple[str, int, int]:
    """Which bit of a model to change: the same for the same number.

    Args:
        sizes: Bytes of every file of the model.
        number: Which flip.

    Returns:
        The file's name, the byte's place in it, and the bit as a mask.
    """
    random = np.random.default_rng([_SEED, number])
    names = sorted(sizes)
    # The weights and their header as often as all the others together.
    weights = [name for name in names if name in _HEADER_BYTES]
    name = str(random.choice(weights if random.integers(2) else names))
    reach = sizes[name]
    if random.integers(2):
        reach = min(reach, _HEADER_BYTES.get(name, reach))
    return name, int(random.integers(reach)), 1 << int(random.integers(8))


def _change(path: Path, place: int, mask: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        value = file.read(1)[0]
        file.seek(place)
        file.write(bytes([value ^ mask]))


def _convert(source: Path, scratch: Path, number: int) -> None:
    out_dir = scratch / "out"
    shutil.rmtree(out_dir, ignore_errors=True)
    out_dir.mkdir()
    layout, precision = _LAYOUTS[number % len(_LAYOUTS)]
    if layout == "onnx-genai" and source.is_dir():
        precision = "fp32"
    convert(source, out_dir, layout=layout, precision=precision, source_id="sha256:flipped")


def _read_gguf(model: Path, scratch: Path, number: int) -> None:
    _convert(model / "model.gguf", scratch, number)


def _read_onnx(model: Path, scratch: Path, number: int) -> None:
    del scratch, number
    read_folder(model)
    check_onnx_files(model, "model.onnx")
    read_canary(model)
    Tokenizer.from_file(model / "tokenizer.json").encode("Hello, 12!")


KINDS: Mapping[str, Callable[[Path, Path, int], None]] = {
    "gguf": _read_gguf,
    "safetensors": _convert,
    "onnx": _read_onnx,
}
"""Kinds of models, and how each is read."""


def _outcome(read: Callable[[Path, Path, int], None], *arguments: object) -> str:
    try:
        read(*arguments)  # type: ignore[arg-type]  # one call for three signatures
    except PhirtError as error:
        return type(error).__name__
    except BaseException as error:  # A panic of a Rust library is no Exception.
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__} at {place.filename}:{place.lineno}: {error}"
        return "foreign " + " ".join(text.split())[:400]
    return "ok"


def _limit_memory() -> None:
    if sys.platform == "linux":
        import resource  # Windows has none.

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.RLIM_INFINITY))


def main(kind: str, pristine_dir: str, scratch_dir: str, first: str, stop: str) -> None:
    """Work through some flips."""
    warnings.simplefilter("error")
    _limit_memory()
    scratch = Path(scratch_dir)
    sizes = {path.name: path.stat().st_size for path in Path(pristine_dir).iterdir()}
    model = scratch / "model"
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(pristine_dir, model)
    for number in range(int(first), int(stop)):
        name, place, mask = flip(sizes, number)
        _change(model / name, place, mask)
        sys.stdout.write(f"{number} {_outcome(KINDS[kind], model, scratch, number)}\n")
        sys.stdout.flush()
        _change(model / name, place, mask)


if __name__ == "__main__":
    main(*sys.argv[1:])
