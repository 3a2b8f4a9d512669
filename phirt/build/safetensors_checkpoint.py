"""A Hugging Face folder of safetensors as a `Checkpoint`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from phirt.build.checkpoint import OpenCheckpoint
from phirt.errors import ModelFormatError, UnsupportedModelError
from phirt.models.decoder_config import DecoderConfig
from phirt.models.huggingface_config import read_decoder_config
from phirt.models.safetensors import SafetensorsFolder
from phirt.types import FloatArray

__all__ = ["SafetensorsCheckpoint", "SafetensorsTensor"]

_ENCODINGS = ("F32", "F16", "BF16")

# The little-endian word of an encoding, and the bits of its exponent: all set in NaN and infinity.
_WORDS = {"F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}

# The decoder of a Gemma 3 that sees keeps its place there, which versions of transformers
# name differently.
_TEXT_PREFIXES = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}

_CHUNK_BYTES = 1 << 20


class SafetensorsCheckpoint(OpenCheckpoint["SafetensorsTensor"]):
    """The weights of a Hugging Face folder (a `Checkpoint`).

    Everything but the tensors' bytes is read and checked at once: which tensors there are,
    their shapes against the configuration, their encodings.

    Args:
        folder: Holds config.json and one or many safetensors files.

    Raises:
        ModelNotFoundError: There is no such folder, or a file is missing.
        ModelFormatError: A file contradicts itself, another, or the configuration.
        UnsupportedModelError: The architecture, a feature or an encoding is not supported.
        UnsafeModelError: The folder refers to files outside.
    """

    def __init__(self, folder: Path) -> None:
        config = read_decoder_config(folder / "config.json")
        files = SafetensorsFolder(folder)
        try:
            tensors = _collect_tensors(files, config, folder.name)
        except BaseException:
            files.close()
            raise
        super().__init__(folder.name, files, config, tensors)


@dataclass(frozen=True, slots=True)
class SafetensorsTensor:
    """A tensor of an open folder, or some rows of one (a `CheckpointTensor`).

    Attributes:
        name: Name in Hugging Face's convention.
        shape: Shape: (out_features, in_features) for weights, (features,) for norms.
        encoding: ``"F32"``, ``"F16"`` or ``"BF16"``.
        files: The open folder.
        stored_name: The tensor's name in its file.
        first_row: Its row there that is the first here.
    """

    name: str
    shape: tuple[int, ...]
    encoding: str
    files: SafetensorsFolder
    stored_name: str
    first_row: int = 0

    def blocks(self) -> NDArray[np.uint8]:
        """The encoded rows: shape (rows, bytes per row), read now, from the file.

        Raises:
            ModelFormatError: A weight is NaN or infinite, or the file has shrunk.
        """
        rows = np.empty((prod(self.shape[:-1]), self._row_bytes), np.uint8)
        for start, part in self._parts():
            rows[start : start + len(part)] = part
        return rows

    def float32(self) -> FloatArray:
        """The decoded values, of shape `shape`.

        Decodes a megabyte at a time, so that the peak is the result and little more.

        Raises:
            ModelFormatError: A weight is NaN or infinite, or the file has shrunk.
        """
        values = np.empty((prod(self.shape[:-1]), self.shape[-1]), np.float32)
        for start, part in self._parts():
            values[start : start + len(part)] = _decode(part, self.encoding)
        return values.reshape(self.shape)

    def rows(self, start: int, stop: int) -> SafetensorsTensor:
        """Rows ``start`` to ``stop - 1``, as a tensor of the same name."""
        shape = (stop - start, *self.shape[1:])
        return replace(self, shape=shape, first_row=self.first_row + start)

    @property
    def _row_bytes(self) -> int:
        return self.shape[-1] * np.dtype(_WORDS[self.encoding][0]).itemsize

    def _parts(self) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """About a megabyte of rows at a time, each with the number of its first."""
        count, row_bytes = prod(self.shape[:-1]), self._row_bytes
        step = max(1, _CHUNK_BYTES // row_bytes)
        for start in range(0, count, step):
            wanted = min(step, count - start)
            first = (self.first_row + start) * row_bytes
            part = self.files.read(self.stored_name, first, wanted * row_bytes)
            part = part.reshape(wanted, row_bytes)
            self._refuse_non_finite(part, start)
            yield start, part

    def _refuse_non_finite(self, rows: NDArray[np.uint8], start: int) -> None:
        word, exponent = _WORDS[self.encoding]
        bad = (_words(rows, word) & exponent) == exponent
        if bad.any():
            row = self.first_row + start + int(bad.any(axis=1).argmax())
            raise ModelFormatError(
                f"Tensor {self.stored_name!r} ({self.encoding}) holds NaN or infinity in row "
                f"{row:,}. The checkpoint is damaged, or its conversion overflowed; use another."
            )


def _words(rows: NDArray[np.uint8], word: str) -> NDArray[Any]:
    return rows.view(word)


def _decode(rows: NDArray[np.uint8], encoding: str) -> NDArray[Any]:
    if encoding == "BF16":  # The upper half of a float32.
        return (_words(rows, "<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    return _words(rows, "<f4" if encoding == "F32" else "<f2")


def _collect_tensors(
    files: SafetensorsFolder, config: DecoderConfig, folder: str
) -> dict[str, SafetensorsTensor]:
    """Find every tensor that the configuration calls for, and nothing else."""
    left = _stored_names(files, config, folder)
    tensors: dict[str, SafetensorsTensor] = {}
    for stored, shape, parts in _expected(config):
        stored_name = left.pop(stored, None)
        if stored_name is None:
            raise ModelFormatError(
                f"{folder}: tensor {stored!r} is missing. The folder is not a whole "
                f"{config.architecture} model; fetch it again or use another."
            )
        found, encoding = files.shape(stored_name), files.dtype(stored_name)
        if found != shape:
            raise ModelFormatError(
                f"{folder}: tensor {stored_name!r} has shape {found}, and config.json calls for "
                f"{shape}. Use another checkpoint."
            )
        if encoding not in _ENCODINGS:
            raise UnsupportedModelError(
                f"{folder}: tensor {stored_name!r} is stored as {encoding}; phirt reads "
                f"{', '.join(_ENCODINGS)}. Use a checkpoint of one of these."
            )
        first_row = 0
        for name, rows in parts:
            tensors[name] = SafetensorsTensor(
                name, (rows, *shape[1:]), encoding, files, stored_name, first_row
            )
            first_row += rows
    if left:
        unknown = ", ".join(repr(name) for name in sorted(left.values())[:3])
        raise UnsupportedModelError(
            f"{folder}: {len(left)} tensors are not part of a plain {config.architecture} "
            f"decoder and would be ignored, such as {unknown}. phirt does not support this variant."
        )
    return tensors


def _stored_names(files: SafetensorsFolder, config: DecoderConfig, folder: str) -> dict[str, str]:
    """The folder's own name of every tensor that counts, by the name without prefixes."""
    stored: dict[str, str] = {}
    prefixes = _TEXT_PREFIXES if config.architecture == "gemma3_text" else {}
    for own in files.names():
        prefix = next((p for p in prefixes if own.startswith(p)), None)
        name = own if prefix is None else prefixes[prefix] + own.removeprefix(prefix)
        if _is_ignored(name, config):
            continue
        if name in stored:
            raise ModelFormatError(
                f"{folder}: the tensors {stored[name]!r} and {own!r} would both be {name!r}. "
                "Use another checkpoint."
            )
        stored[name] = own
    return stored


def _is_ignored(name: str, config: DecoderConfig) -> bool:
    """Whether a tensor repeats what is known: a tied LM head, or rotary frequencies."""
    if name == "lm_head.weight":
        return config.tie_word_embeddings
    return name.endswith(".rotary_emb.inv_freq")


_Expected: TypeAlias = tuple[str, tuple[int, ...], list[tuple[str, int]]]


def _expected(config: DecoderConfig) -> Iterator[_Expected]:
    """What a folder must hold.

    Lazily: a file that lies about the number of its layers is found out at the first that
    is missing.

    Yields:
        A tensor's name in the folder, its shape, and the names and rows of what it holds:
        itself, or the projections that Phi-3 keeps in one.
    """
    width = config.hidden_size
    queries, keys = (n * config.head_size for n in (config.num_heads, config.num_kv_heads))
    attention = {"q": queries, "k": keys, "v": keys}
    inner = config.intermediate_size
    yield _whole("model.embed_tokens.weight", config.vocab_size, width)
    for layer in range(config.num_layers):
        scope = f"model.layers.{layer}"
        for norm in _norms(config):
            yield _whole(f"{scope}.{norm}.weight", width)
        block = f"{scope}.self_attn"
        qkv = [(f"{block}.{part}_proj", rows) for part, rows in attention.items()]
        gate_up = [(f"{scope}.mlp.{part}_proj", inner) for part in ("gate", "up")]
        if config.architecture == "phi3":
            yield _fused(f"{block}.qkv_proj.weight", qkv, width)
            yield _fused(f"{scope}.mlp.gate_up_proj.weight", gate_up, width)
        else:
            for name, rows in [*qkv, *gate_up]:
                yield _whole(f"{name}.weight", rows, width)
        if config.qkv_bias:
            for name, rows in qkv:
                yield _whole(f"{name}.bias", rows)
        if config.qk_norm:
            for part in "qk":
                yield _whole(f"{block}.{part}_norm.weight", config.head_size)
        yield _whole(f"{block}.o_proj.weight", width, queries)
        if config.output_bias:
            yield _whole(f"{block}.o_proj.bias", width)
        yield _whole(f"{scope}.mlp.down_proj.weight", width, inner)
    yield _whole("model.norm.weight", width)
    if not config.tie_word_embeddings:
        yield _whole("lm_head.weight", config.vocab_size, width)


def _norms(config: DecoderConfig) -> tuple[str, ...]:
    plain = ("input_layernorm", "post_attention_layernorm")
    around_mlp = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
    return (*plain, *around_mlp) if config.sandwich_norms else plain


def _whole(name: str, *shape: int) -> _Expected:
    return name, shape, [(name, shape[0])]


def _fused(name: str, parts: list[tuple[str, int]], columns: int) -> _Expected:
    rows = sum(rows for _, rows in parts)
    return name, (rows, columns), [(f"{part}.weight", rows) for part, rows in parts]
