"""The format ``mlx``: mlx-lm's folders, quantized by mlx-lm in a Python of its own.

What is not quantized needs no engine: a folder of safetensors is what MLX reads, and phirt
writes it.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from phirt.build.engines.built import Built
from phirt.build.engines.checkpoint_folder import rewrite_checkpoint
from phirt.build.engines.environments import EnginePython, find_engine
from phirt.build.engines.process import run_module
from phirt.build.sources import TEXT_FILES
from phirt.errors import EngineFailedError, UnsupportedModelError
from phirt.models.huggingface_config import CONFIG_NAME
from phirt.models.safe_json import read_json
from phirt.types import ProgressCallback

__all__ = ["MLX_PRECISIONS", "build_with_mlx", "check_mlx_options", "mlx_arguments"]

NAME = "mlx"

_BITS = {"int8": 8, "int4": 4}
MLX_PRECISIONS = ("fp32", "fp16", "bf16", *_BITS)
"""The precisions of this format."""

_GROUP_SIZES = ("32", "64", "128")
_DTYPES = ("float16", "bfloat16", "float32")
# Gemma's activations reach beyond the largest number of float16.
_WIDE = re.compile(r"gemma")


def build_with_mlx(
    source: Path,
    out_dir: Path,
    *,
    precision: str,
    options: Mapping[str, str] | None = None,
    progress: ProgressCallback | None = None,
    python: EnginePython | None = None,
) -> Built:
    """Build a model folder for MLX.

    mlx-lm reads a folder that phirt wrote from the checkpoint, so that nothing of the source's
    reaches it but numbers, and the tokenizer.

    Args:
        source: A ``.gguf`` file, or a Hugging Face folder, of a decoder that phirt converts.
        out_dir: An empty folder, which is filled. While the engine runs, its input and its
            temporary files are in it, too.
        precision: One of `MLX_PRECISIONS`.
        options: For what is quantized: ``group_size``, of 32, 64 (where not given) or 128
            weights, and ``dtype``, of scales, offsets and whatever is not quantized:
            ``float16`` (where not given), ``bfloat16`` (for gemma, where not given) or
            ``float32``.
        progress: Called for every tensor that is read.
        python: What runs mlx-lm; that of `find_engine` where not given.

    Raises:
        EngineNotInstalledError: There is no Python that has it.
        EngineFailedError: It failed; the message has the last line of its traceback.
        ModelNotFoundError: There is no such model.
        ModelFormatError: One of its files is damaged.
        UnsafeModelError: It holds only pickles, or reaches out of itself.
        UnsupportedModelError: phirt does not convert it, or there is no such precision here.
        FileExistsError: The folder is not empty.
        ValueError: An option is none.
    """
    chosen = check_mlx_options(precision, options or {})
    if any(out_dir.iterdir()):
        raise FileExistsError(f"The folder {out_dir} is not empty; an artifact needs its own.")
    if precision not in _BITS:
        rewrite_checkpoint(source, out_dir, precision=precision, progress=progress)
        return Built(architecture=_architecture(out_dir))
    engine = python or find_engine(NAME)
    # In the caller's folder, so that whoever clears that up clears this up, too.
    work = out_dir / ".build"
    folder, built = work / "input", work / "output"
    folder.mkdir(parents=True)
    try:
        rewrite_checkpoint(source, folder, precision="fp32", progress=progress)
        architecture = _architecture(folder)
        log = run_module(
            engine.python,
            "mlx_lm",
            mlx_arguments(
                folder, built, precision=precision, architecture=architecture, options=chosen
            ),
            engine=NAME,
            work_dir=work,
            on_line=lambda _: None,
        )
        _take(built, folder, out_dir, log=log)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Built(architecture=architecture, versions=engine.versions, log=log)


def check_mlx_options(precision: str, options: Mapping[str, str]) -> dict[str, str]:
    """The options of this format.

    Args:
        precision: The precision.
        options: Names and values.

    Raises:
        UnsupportedModelError: There is no such precision in this format.
        ValueError: There is no such option, or not in this precision, or not of this value.
    """
    if precision not in MLX_PRECISIONS:
        raise UnsupportedModelError(
            f"precision={precision!r}: folders for mlx are built in {', '.join(MLX_PRECISIONS)}."
        )
    offered = {"group_size": _GROUP_SIZES, "dtype": _DTYPES} if precision in _BITS else {}
    for name, value in options.items():
        if name not in offered:
            known = ", ".join(offered) or "none"
            raise ValueError(f"There is no option {name!r} for mlx in {precision}; known: {known}.")
        if value not in offered[name]:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(offered[name])}.")
    return dict(options)


def mlx_arguments(
    folder: Path,
    out_dir: Path,
    *,
    precision: str,
    architecture: str,
    options: Mapping[str, str],
) -> list[str]:
    """mlx-lm's command line, after the name of its module.

    Args:
        folder: The folder that phirt wrote.
        out_dir: Where the model goes; it must not exist.
        precision: ``"int4"`` or ``"int8"``.
        architecture: The decoder's.
        options: As `check_mlx_options` returned them.
    """
    dtype = "bfloat16" if _WIDE.match(architecture) else "float16"
    return [
        "convert",
        *("--hf-path", str(folder)),
        *("--mlx-path", str(out_dir)),
        "--quantize",
        *("--q-bits", str(_BITS[precision])),
        *("--q-group-size", options.get("group_size", "64")),
        *("--dtype", options.get("dtype", dtype)),
    ]


def _architecture(folder: Path) -> str:
    return str(read_json(folder / CONFIG_NAME)["model_type"])


def _take(built: Path, folder: Path, out_dir: Path, *, log: str) -> None:
    """Move what mlx-lm wrote; the tokenizer's files are those of the source, word for word."""
    weights = sorted(built.glob("model*.safetensors")) if built.is_dir() else []
    if not weights or not (built / CONFIG_NAME).is_file():
        raise EngineFailedError(
            f"The engine {NAME!r} ended without an error and wrote no model.", log=log
        )
    for file in (*weights, *built.glob("model.safetensors.index.json"), built / CONFIG_NAME):
        file.rename(out_dir / file.name)
    for name in TEXT_FILES:
        if (folder / name).exists():
            (folder / name).rename(out_dir / name)
