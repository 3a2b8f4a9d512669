"""One tensor of a GGUF file: its encoded rows, and their values."""

from __future__ import annotations

from math import prod

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from phirt.build.gguf.file import GgufFile
from phirt.build.gguf.header import TensorInfo
from phirt.errors import ModelFormatError
from phirt.types import FloatArray

__all__ = ["ENCODINGS", "GgufTensor", "rotary_row_order"]

# Per encoding, the numpy type and the byte offsets within a block of everything that can be
# NaN or infinite. In the quantized encodings those are the half-precision scales and minima:
# the integers that they multiply are small, so finite scales give finite weights.
# Layout of the blocks: ggml/src/ggml-common.h (block_q4_0 and so on).
_FLOAT_FIELDS: dict[str, tuple[str, tuple[int, ...]]] = {
    "F32": ("<f4", (0,)),
    "F16": ("<f2", (0,)),
    "BF16": ("bfloat16", (0,)),
    "Q4_0": ("<f2", (0,)),
    "Q4_1": ("<f2", (0, 2)),
    "Q8_0": ("<f2", (0,)),
    "Q4_K": ("<f2", (0, 2)),
    "Q5_K": ("<f2", (0, 2)),
    "Q6_K": ("<f2", (208,)),
}

ENCODINGS = tuple(_FLOAT_FIELDS)
"""The encodings that `GgufTensor` reads, by GGML's names."""

# Exponent bits of the three floating-point types, as unsigned integers: all set means NaN
# or infinity.
_EXPONENTS = {"<f4": ("<u4", 0x7F800000), "<f2": ("<u2", 0x7C00), "bfloat16": ("<u2", 0x7F80)}

_CHUNK_BYTES = 1 << 20


def rotary_row_order(*, heads: int, head_size: int) -> NDArray[np.intp]:
    """Rows of a GGUF q or k projection in the order of Hugging Face's.

    llama.cpp rotates neighbouring pairs (0, 1), (2, 3), and its converter reorders the rows
    of every head to match; `transformers` rotates the two halves against each other. Row i
    of the Hugging Face weight is row ``order[i]`` of the file's.

    Returns:
        The order, shape (heads * head_size,).
    """
    rows = np.arange(heads * head_size).reshape(heads, head_size // 2, 2)
    return rows.swapaxes(1, 2).reshape(-1)


class GgufTensor:
    """A tensor of an open file, in Hugging Face's convention (a `CheckpointTensor`).

    Args:
        file: The file.
        info: The tensor's row in the header.
        name: Its name in Hugging Face's convention.
        row_order: Which row of the file each row is, shape (rows,), or None for the same.
    """

    def __init__(
        self,
        file: GgufFile,
        info: TensorInfo,
        *,
        name: str,
        row_order: NDArray[np.intp] | None = None,
    ) -> None:
        self._file = file
        self._info = info
        self._name = name
        self._row_order = row_order

    @property
    def name(self) -> str:
        """Name in Hugging Face's convention."""
        return self._name

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape: (out_features, in_features) for weights, (features,) for norms."""
        return self._info.shape

    @property
    def encoding(self) -> str:
        """GGML's name of the encoding."""
        return self._info.encoding

    def blocks(self) -> NDArray[np.uint8]:
        """The encoded rows: shape (rows, bytes per row), read now, from the file.

        Raises:
            ModelFormatError: A scale or a weight is NaN or infinite, or the file has shrunk.
        """
        encoded = self._read_rows(0, self._rows)
        return encoded if self._row_order is None else encoded[self._row_order]

    def float32(self) -> FloatArray:
        """The decoded values, of shape `shape`.

        Decodes a megabyte at a time, so that the peak is the result and little more.

        Raises:
            ModelFormatError: A scale or a weight is NaN or infinite, or the file has shrunk.
        """
        encoding = GGMLQuantizationType[self.encoding]
        values = np.empty((self._rows, self.shape[-1]), dtype=np.float32)
        step = max(1, _CHUNK_BYTES // self._row_bytes)
        for start in range(0, self._rows, step):
            stop = min(start + step, self._rows)
            decoded = dequantize(self._read_rows(start, stop), encoding)
            values[start:stop] = decoded
        if self._row_order is not None:
            values = values[self._row_order]
        return values.reshape(self.shape)

    @property
    def _rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def _row_bytes(self) -> int:
        return self._info.nbytes // self._rows

    def _read_rows(self, start: int, stop: int) -> NDArray[np.uint8]:
        offset = self._info.offset + start * self._row_bytes
        rows = self._file.read(offset, (stop - start) * self._row_bytes)
        rows = rows.reshape(stop - start, self._row_bytes)
        self._refuse_non_finite(rows, start)
        return rows

    def _refuse_non_finite(self, rows: NDArray[np.uint8], start: int) -> None:
        float_type, fields = _FLOAT_FIELDS[self.encoding]
        integer_type, exponent = _EXPONENTS[float_type]
        words = rows.view(integer_type)
        stride = GGML_QUANT_SIZES[GGMLQuantizationType[self.encoding]][1] // words.itemsize
        for field in fields:
            scales = words[:, field // words.itemsize :: stride]
            bad = (scales & exponent) == exponent
            if bad.any():
                row = start + int(bad.any(axis=1).argmax())
                raise ModelFormatError(
                    f"{self._file.path.name}: tensor {self._info.name!r} ({self.encoding}) holds "
                    f"NaN or infinity in row {row:,}. The file is damaged, or its conversion "
                    "overflowed; use another file."
                )
