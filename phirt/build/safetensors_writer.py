"""Writes a checkpoint as one safetensors file in Hugging Face's layout.

The format (https://huggingface.co/docs/safetensors): eight bytes with the length of a JSON
header, the header with every tensor's type, shape and place, then the tensors' bytes. The
header is known before any tensor is read, so tensors are written one at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from phirt.build.checkpoint import Checkpoint
from phirt.errors import UnsupportedModelError
from phirt.models.safetensors import encode_header
from phirt.types import FloatArray

__all__ = ["SAFETENSORS_PRECISIONS", "rounded", "write_safetensors"]

_CHUNK = 1 << 22  # Elements converted at once: bounds what conversion needs beside the tensor.

# Projections that transformers and mlx-lm keep as one matrix, and whose rows follow each other.
_FUSED = {
    "phi3": {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }
}


def _bfloat16(values: FloatArray) -> NDArray[np.uint16]:
    """The upper halves of float32 values, rounded to nearest, ties to even."""
    bits = values.view(np.uint32)
    # Half of the last bit kept, less one unless that bit is set: carries as rounding does.
    rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
    # The carry would turn some NaNs into zeros or infinities.
    rounded[np.isnan(values)] = 0x7FC0
    return rounded.astype("<u2")


def _float16(values: FloatArray) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):  # Found by the caller, who knows the tensor's name.
        return values.astype("<f2")


def _float32(values: FloatArray) -> FloatArray:
    return values.astype("<f4", copy=False)


@dataclass(frozen=True, slots=True)
class _Encoding:
    """How safetensors stores a precision.

    Attributes:
        dtype: Its name in the header.
        encode: From float32 to what is stored.
        largest: Magnitudes from here on become infinite.
    """

    dtype: str
    encode: Callable[[FloatArray], NDArray[Any]]
    largest: float


_ENCODINGS = {
    "fp32": _Encoding("F32", _float32, float("inf")),
    # Halfway from the largest number to the next that there would be: it and beyond round up.
    "fp16": _Encoding("F16", _float16, 65520.0),
    "bf16": _Encoding("BF16", _bfloat16, float(2**128 - 2**119)),
}

SAFETENSORS_PRECISIONS = tuple(_ENCODINGS)
"""The precisions that `write_safetensors` knows."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor of the file: one of the checkpoint's, or several stacked by rows."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]


def write_safetensors(checkpoint: Checkpoint, path: Path, *, precision: str) -> None:
    """Write every tensor of a checkpoint, with the names and shapes that transformers expects.

    One tensor is in memory at a time. Projections that the architecture keeps fused (Phi-3)
    are joined, and a tied LM head is left out: it is the embedding.

    Args:
        checkpoint: Configuration and weights.
        path: The file to create. It must not exist.
        precision: ``"fp32"``, ``"fp16"`` or ``"bf16"`` (rounded to nearest, ties to even).

    Raises:
        ValueError: There is no such precision.
        UnsupportedModelError: A value is beyond the largest of the precision.
        FileExistsError: The file exists.
    """
    if precision not in _ENCODINGS:
        raise ValueError(
            f"precision={precision!r}: safetensors files are written as "
            f"{', '.join(SAFETENSORS_PRECISIONS)}."
        )
    encoding = _ENCODINGS[precision]
    entries = _entries(checkpoint)
    with path.open("xb") as file:
        file.write(_header(entries, encoding))
        for part in (part for entry in entries for part in entry.parts):
            _write_tensor(file, checkpoint.tensor(part).float32(), encoding, name=part)


def rounded(values: FloatArray, *, precision: str) -> FloatArray:
    """The values that `write_safetensors` would store.

    Args:
        values: Those of the checkpoint.
        precision: As for `write_safetensors`.
    """
    encoded = _ENCODINGS[precision].encode(values)
    if precision == "bf16":  # The upper half of a float32.
        return (encoded.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return encoded.astype(np.float32)


def _entries(checkpoint: Checkpoint) -> list[_Entry]:
    config = checkpoint.config
    fused = _FUSED.get(config.architecture, {})
    whole_of = {part: whole for whole, parts in fused.items() for part in parts}
    entries: dict[str, _Entry] = {}
    for name in checkpoint.names():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        projection = re.search(r"\.(\w+_proj)\.", name)
        if projection is None or (part := projection[1]) not in whole_of:
            entries[name] = _Entry(name, checkpoint.tensor(name).shape, (name,))
            continue
        whole = whole_of[part]
        fused_name = name.replace(f".{part}.", f".{whole}.")
        if fused_name not in entries:
            parts = tuple(name.replace(f".{part}.", f".{each}.") for each in fused[whole])
            entries[fused_name] = _stacked(checkpoint, fused_name, parts)
    return list(entries.values())


def _stacked(checkpoint: Checkpoint, name: str, parts: tuple[str, ...]) -> _Entry:
    shapes = [checkpoint.tensor(part).shape for part in parts]
    return _Entry(name, (sum(shape[0] for shape in shapes), *shapes[0][1:]), parts)


def _header(entries: list[_Entry], encoding: _Encoding) -> bytes:
    # transformers refuses a file that does not say which framework's layout it has.
    return encode_header(
        {"format": "pt"}, [(entry.name, encoding.dtype, entry.shape) for entry in entries]
    )


def _write_tensor(file: BinaryIO, values: FloatArray, encoding: _Encoding, *, name: str) -> None:
    for chunk in _chunks(np.ascontiguousarray(values, dtype=np.float32).reshape(-1)):
        largest = np.abs(chunk[np.isfinite(chunk)]).max(initial=0.0)
        if largest >= encoding.largest:
            raise UnsupportedModelError(
                f"Tensor {name!r} holds {largest:,.0f}, beyond the largest number of "
                f"{encoding.dtype}. Write the model in another precision, such as bf16 or fp32."
            )
        file.write(encoding.encode(chunk).data)


def _chunks(values: FloatArray) -> Iterator[FloatArray]:
    for start in range(0, values.size, _CHUNK):
        yield values[start : start + _CHUNK]
