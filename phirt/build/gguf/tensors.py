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
    "Q5_0": ("<f2", (0,)),
    "Q5_1": ("<f2", (0, 2)),
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

_CHUNK_BYTES = 1 << 16  # The values that they decode to fit in a processor's cache.


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
        span: The first of these rows that it has, and the one after its last; None for all.
        added: What the file's converter added to every value, and is taken back here. The
            file's encoding must be F32.
    """

    def __init__(
        self,
        file: GgufFile,
        info: TensorInfo,
        *,
        name: str,
        row_order: NDArray[np.intp] | None = None,
        span: tuple[int, int] | None = None,
        added: float = 0.0,
    ) -> None:
        self._file = file
        self._info = info
        self._name = name
        self._whole_order = row_order
        self._added = np.float32(added)
        self._start, self._stop = span or (0, prod(info.shape[:-1]))

    @property
    def name(self) -> str:
        """Name in Hugging Face's convention."""
        return self._name

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape: (out_features, in_features) for weights, (features,) for norms."""
        if len(self._info.shape) == 1:
            return self._info.shape
        return (self._stop - self._start, *self._info.shape[1:])

    @property
    def encoding(self) -> str:
        """GGML's name of the encoding."""
        return self._info.encoding

    def blocks(self) -> NDArray[np.uint8]:
        """The encoded rows: shape (rows, bytes per row), read now, from the file.

        Raises:
            ModelFormatError: A scale or a weight is NaN or infinite, or the file has shrunk.
        """
        if self._added:
            return self.float32().view(np.uint8).reshape(1, -1)
        first, stop, order = self._in_file()
        encoded = self._read_rows(first, stop)
        return encoded if order is None else encoded[order]

    def float32(self) -> FloatArray:
        """The decoded values, of shape `shape`.

        Decodes a little at a time, so that the peak is the result and not much more.

        Raises:
            ModelFormatError: A scale or a weight is NaN or infinite, or the file has shrunk.
        """
        encoding = GGMLQuantizationType[self.encoding]
        first, stop, order = self._in_file()
        values = np.empty((stop - first, self.shape[-1]), dtype=np.float32)
        step = max(1, _CHUNK_BYTES // self._row_bytes)
        for start in range(first, stop, step):
            end = min(start + step, stop)
            # As one long row: gguf decodes 16 rows at a time, however short they are.
            decoded = dequantize(self._read_rows(start, end).reshape(1, -1), encoding)
            values[start - first : end - first] = decoded.reshape(end - start, -1)
        if order is not None:
            values = values[order]
        if self._added:
            values -= self._added
        return values.reshape(self.shape)

    def rows(self, start: int, stop: int) -> GgufTensor:
        """Rows ``start`` to ``stop - 1`` of a matrix, as a tensor of the same name."""
        return GgufTensor(
            self._file,
            self._info,
            name=self._name,
            row_order=self._whole_order,
            span=(self._start + start, self._start + stop),
            added=float(self._added),
        )

    def _in_file(self) -> tuple[int, int, NDArray[np.intp] | None]:
        """The file's rows that hold these: first, one after the last, and their order."""
        if self._whole_order is None:
            return self._start, self._stop, None
        order = self._whole_order[self._start : self._stop]
        first = int(order.min())  # A head's rows stay within the head.
        return first, int(order.max()) + 1, order - first

    @property
    def _row_bytes(self) -> int:
        return self._info.nbytes // prod(self._info.shape[:-1])

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
