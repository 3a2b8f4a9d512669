"""The folder that an engine reads a checkpoint from: weights and data, and nothing else.

An engine reads folders as transformers does, which runs code that a folder brings where it is
told to. So it gets a folder of phirt's making: links to the safetensors files, the tokenizer's
own files, and a config.json that names no code. There is no pickle in it and no program.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from phirt.build.documents import write_json
from phirt.build.sources import TEXT_FILES, open_source
from phirt.build.watched_checkpoint import WatchedCheckpoint
from phirt.errors import ModelFormatError, ModelNotFoundError, UnsafeModelError
from phirt.models.huggingface_config import CONFIG_NAME
from phirt.models.layouts import find_layout
from phirt.models.paths import check_links, resolve_inside
from phirt.models.real_files import copy_file
from phirt.models.safe_json import read_json
from phirt.models.safetensors import SafetensorsFolder, weight_files
from phirt.types import ProgressCallback

__all__ = ["architecture_of", "link_checkpoint", "rewrite_checkpoint"]

_INDEX = "model.safetensors.index.json"
# Names of code, which transformers would fetch or run, and of kernels that it would import.
_CODE = ("auto_map", "custom_pipelines", "model_file", "_attn_implementation")


def rewrite_checkpoint(
    source: Path, folder: Path, *, precision: str, progress: ProgressCallback | None
) -> None:
    """Write a checkpoint of any kind anew, as a Hugging Face folder.

    Args:
        source: A ``.gguf`` file, or a Hugging Face folder of one of the decoders that phirt
            converts.
        folder: An empty folder.
        precision: ``"fp32"``, ``"fp16"`` or ``"bf16"``.
        progress: Called for every tensor.

    Raises:
        ModelNotFoundError: There is no such file.
        ModelFormatError: It is damaged.
        UnsafeModelError: The folder reaches out of itself.
        UnsupportedModelError: It is sound, but phirt does not convert it, or a value is beyond
            the largest of the precision.
    """
    from phirt.build.huggingface_config import config_document
    from phirt.build.safetensors_writer import write_safetensors

    if source.is_dir():
        _check(source)
    with open_source(source, source_id="") as opened:
        watched = WatchedCheckpoint(opened.checkpoint, progress)
        write_safetensors(watched, folder / "model.safetensors", precision=precision)
        opened.write_text_files(folder)
        write_json(folder / CONFIG_NAME, config_document(watched.config, precision=precision))


def link_checkpoint(
    source: Path,
    folder: Path,
    *,
    correct: Callable[[dict[str, Any]], dict[str, Any]] = lambda document: document,
) -> None:
    """Make a folder of a Hugging Face folder's weights and data, without its code.

    Args:
        source: A Hugging Face folder of safetensors, of any architecture.
        folder: An empty folder. Its weights are links to the source's, or copies where the
            file system has no links.
        correct: Makes of config.json what the engine wants.

    Raises:
        ModelNotFoundError: There is no such folder, or it lacks a file.
        ModelFormatError: One of its small files is damaged.
        UnsafeModelError: It holds only pickles, reaches out of itself, or is a model whose
            computation is code of its own.
        UnsupportedModelError: It holds the model in another layout.
    """
    document = _check(source)
    write_json(folder / CONFIG_NAME, correct(_without_code(document)))
    with SafetensorsFolder(source):  # an engine is not to find out that a file is damaged
        names = [file.relative_to(source).as_posix() for file in weight_files(source)]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _link(resolve_inside(source, name), folder / name)
    for name in (_INDEX, *TEXT_FILES):
        if (source / name).is_file():
            _copy_text(resolve_inside(source, name), folder / name)


def architecture_of(document: Mapping[str, Any], *, source: str) -> str:
    """The class that a config.json names, such as ``"LlamaForCausalLM"``.

    Args:
        document: The config.json.
        source: What to call it in a message.

    Raises:
        ModelFormatError: It names none.
    """
    names = document.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        return names[0]
    raise ModelFormatError(
        f'{source} does not say what the model is: it has no "architectures". Add the name of '
        'its class, as in "architectures": ["LlamaForCausalLM"].'
    )


def _check(source: Path) -> dict[str, Any]:
    """The config.json of a folder, in which there is nothing that phirt would not open."""
    if not source.is_dir():
        raise ModelNotFoundError(f"There is no model folder at {source}.")
    check_links(source)
    find_layout(source, ("safetensors",))
    document = read_json(source / CONFIG_NAME)
    if document.get("model_file"):
        raise UnsafeModelError(
            f"{source / CONFIG_NAME} names a file of code that computes the model, model_file = "
            f"{str(document['model_file'])[:80]!r}. phirt runs no code that comes with a model."
        )
    return document


def _without_code(document: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key not in _CODE}


def _link(real: Path, target: Path) -> None:
    # Windows has symbolic links for administrators, and no file system has hard links to another.
    with suppress(OSError):
        target.symlink_to(real)
        return
    with suppress(OSError):
        os.link(real, target)
        return
    copy_file(real, target)


def _copy_text(real: Path, target: Path) -> None:
    if target.name == "tokenizer_config.json":
        write_json(target, _without_code(read_json(real)))
    elif target.suffix == ".json" and target.name != "tokenizer.json":
        # Read, so that what is damaged is found here, and by name.
        target.write_text(json.dumps(read_json(real)), encoding="utf-8", newline="\n")
    else:
        copy_file(real, target)
