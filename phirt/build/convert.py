"""From a checkpoint's file to a model folder, in one call."""

from __future__ import annotations

from pathlib import Path

from phirt.build.artifact import CONVERTER_VERSION, write_artifact
from phirt.build.gguf.checkpoint import GgufCheckpoint
from phirt.build.gguf.tokenizer import read_tokenizer
from phirt.build.onnx_linear import INT8_BLOCK_SIZES
from phirt.build.precision import Precision
from phirt.models.hashing import sha256_of
from phirt.types import ProgressCallback

__all__ = ["CONVERTER_VERSION", "choose_precision", "convert_gguf"]


def choose_precision(source: Path) -> str:
    """The precision that ``"auto"`` stands for.

    The fastest, over a prompt of 500 tokens and an answer of 100, whose mean KL divergence
    from fp32 is under 0.02: ``"int8"`` (docs/precision.md has the measurements), or
    ``"fp32"`` for a decoder whose widths do not divide into blocks.

    Args:
        source: The GGUF file.

    Raises:
        ModelNotFoundError: There is no such file.
        ModelFormatError: The file is damaged.
        UnsupportedModelError: It is sound, but phirt does not convert it.
    """
    with GgufCheckpoint(source) as checkpoint:
        config = checkpoint.config
    widths = (config.hidden_size, config.intermediate_size, config.num_heads * config.head_size)
    divisible = all(width % min(INT8_BLOCK_SIZES) == 0 for width in widths)
    return (Precision.INT8 if divisible else Precision.FP32).value


def convert_gguf(
    source: Path,
    out_dir: Path,
    *,
    precision: str,
    source_sha256: str | None = None,
    progress: ProgressCallback | None = None,
) -> None:
    """Convert a GGUF file to a model folder.

    Args:
        source: The GGUF file.
        out_dir: An empty folder, which is filled; phirt.json is written last.
        precision: ``"fp32"``, ``"exact"``, ``"int8"`` or ``"int4"``.
        source_sha256: The file's SHA-256 in hex, where it is known; else it is computed.
        progress: Called after every tensor.

    Raises:
        ModelNotFoundError: There is no such file.
        ModelFormatError: The file is damaged.
        UnsupportedModelError: It is sound, but phirt does not convert it to this precision.
        FileExistsError: The folder is not empty.
        ValueError: There is no such precision.
    """
    chosen = Precision(precision)
    with GgufCheckpoint(source) as checkpoint:
        tokenizer = read_tokenizer(checkpoint.file, tokens=checkpoint.tokens)
        write_artifact(
            checkpoint,
            tokenizer,
            out_dir,
            precision=chosen,
            source_name=source.name,
            source_sha256=source_sha256 or sha256_of(source),
            progress=progress,
        )
