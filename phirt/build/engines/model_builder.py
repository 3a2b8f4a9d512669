"""The engine ``model-builder``: onnxruntime-genai's Model Builder, in a Python of its own.

It makes an ONNX graph of far more architectures than phirt writes itself, and for more
execution providers. What it is asked for is checked here first: its own check is a line that
it prints.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from phirt.build.engines.built import Built
from phirt.build.engines.checkpoint_folder import (
    architecture_of,
    link_checkpoint,
    rewrite_checkpoint,
)
from phirt.build.engines.environments import EnginePython, find_engine
from phirt.build.engines.process import run_module
from phirt.build.sources import TEXT_FILES
from phirt.errors import EngineFailedError, UnsafeModelError, UnsupportedModelError
from phirt.models.genai_config import GENAI_CONFIG_NAME
from phirt.models.huggingface_config import CONFIG_NAME
from phirt.models.paths import plain_name_fault
from phirt.models.safe_json import read_json
from phirt.types import Progress, ProgressCallback

__all__ = [
    "MODEL_BUILDER_PRECISIONS",
    "BuildProgress",
    "build_with_model_builder",
    "builder_arguments",
    "check_options",
    "check_pair",
    "corrected_config",
    "supported_architectures",
]

NAME = "model-builder"

# phirt's names of devices, and the builder's of execution providers.
_PROVIDERS = {
    "cpu": "cpu",
    "cuda": "cuda",
    "directml": "dml",
    "webgpu": "webgpu",
    "trtrtx": "NvTensorRtRtx",
}

MODEL_BUILDER_PRECISIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "cpu": ("fp32", "int8", "int4"),
        "cuda": ("fp32", "fp16", "bf16", "int8", "int4"),
        "directml": ("fp16", "int4"),
        "webgpu": ("int8", "int4"),
        "trtrtx": ("fp16", "bf16"),
    }
)
"""The devices that it builds for, each with the precisions that it calls valid there (0.18)."""

_REFUSED_OPTIONS = {
    "hf_remote": "it would run code that comes with the model",
    "hf_token": "a build asks no hub for anything",
    "adapter_path": "adapters may be pickles, and phirt has not looked into them",
    "dflash2_path": "phirt has not looked into what lies there",
    "dspark_path": "phirt has not looked into what lies there",
}
# Files of the user's own, which the builder is to find although it runs elsewhere.
_FILE_OPTIONS = ("kv_cache_scale_file", "mtp_quant_config")
_OPTION = re.compile(r"[a-z][a-z0-9_]*")

_MOE = "PhiMoEForCausalLM"
# Other names of what the builder looks for.
_ALIASES = {"PhimoeForCausalLM": _MOE}
_VISION = "Phi3VForCausalLM"
_VISION_FIELDS = ("img_processor", "embd_layer", "vision_config")

_NAMED_IN_BUILDER = re.compile(r"config\.architectures\[0\] == \"(\w+)\"")
_LAYER = re.compile(r"Reading layer (\d+)")
_TENSOR = re.compile(r"Saving .+?\|\s*(\d+)/(\d+) \[")


def build_with_model_builder(
    source: Path,
    out_dir: Path,
    *,
    precision: str,
    device: str = "cpu",
    options: Mapping[str, str] | None = None,
    progress: ProgressCallback | None = None,
    python: EnginePython | None = None,
) -> Built:
    """Build a model folder for onnxruntime and onnxruntime-genai.

    Args:
        source: A Hugging Face folder of safetensors, or a ``.gguf`` file, which is written as
            such a folder first.
        out_dir: An empty folder, which is filled. While the engine runs, its input and its
            temporary files are in it, too.
        precision: ``"fp32"``, ``"fp16"``, ``"bf16"``, ``"int8"`` or ``"int4"``.
        device: What it is for: one of `MODEL_BUILDER_PRECISIONS`.
        options: The builder's own ``--extra_options``.
        progress: Called for every layer that it reads and every tensor that it writes.
        python: What runs it; that of `find_engine` where not given.

    Raises:
        EngineNotInstalledError: There is no Python that has it.
        EngineFailedError: It failed; the message has the last line of its traceback.
        ModelNotFoundError: There is no such model.
        ModelFormatError: One of its files is damaged.
        UnsafeModelError: It holds only pickles, or reaches out of itself; or an option would
            run code of the model's, or reach outside of it.
        UnsupportedModelError: The builder does not build this model, or not for this device
            in this precision.
        FileExistsError: The folder is not empty.
        ValueError: There is no such device, or an option is none.
    """
    check_pair(device, precision)
    chosen = check_options(options or {})
    if any(out_dir.iterdir()):
        raise FileExistsError(f"The folder {out_dir} is not empty; an artifact needs its own.")
    engine = python or find_engine(NAME)
    # In the caller's folder, so that whoever clears that up clears this up, too.
    work = out_dir / ".build"
    folder = work / "input"
    folder.mkdir(parents=True)
    try:
        if source.is_dir():
            link_checkpoint(source, folder, correct=corrected_config)
        else:
            rewrite_checkpoint(source, folder, precision="fp32", progress=progress)
        config = read_json(folder / CONFIG_NAME)
        _check_architecture(config, engine, source, device=device, precision=precision)
        log = run_module(
            engine.python,
            "onnxruntime_genai.models.builder",
            builder_arguments(
                folder,
                out_dir,
                precision=precision,
                device=device,
                cache=work / "cache",
                options=chosen,
            ),
            engine=NAME,
            work_dir=work,
            on_line=BuildProgress(config, progress),
        )
        _complete(folder, out_dir, filename=chosen.get("filename", "model.onnx"), log=log)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    architecture = str(config.get("model_type", ""))
    return Built(architecture=architecture, versions=engine.versions, log=log)


def check_pair(device: str, precision: str) -> str:
    """The builder's name of a device, for which it builds in this precision.

    Args:
        device: One of `MODEL_BUILDER_PRECISIONS`, with or without a number.
        precision: The precision.

    Raises:
        ValueError: There is no such device.
        UnsupportedModelError: It does not build for the device in this precision.
    """
    kind = device.partition(":")[0]
    if kind not in MODEL_BUILDER_PRECISIONS:
        raise ValueError(
            f"The engine {NAME!r} builds for {', '.join(MODEL_BUILDER_PRECISIONS)}, not for "
            f"{device!r}."
        )
    offered = MODEL_BUILDER_PRECISIONS[kind]
    if precision not in offered:
        others = [name for name, each in MODEL_BUILDER_PRECISIONS.items() if precision in each]
        hint = f"; {precision} it builds for {', '.join(others)}" if others else ""
        raise UnsupportedModelError(
            f"precision={precision!r} for {device!r}: there the engine {NAME!r} builds "
            f"{', '.join(offered)}{hint}."
        )
    return _PROVIDERS[kind]


def check_options(options: Mapping[str, str]) -> dict[str, str]:
    """The builder's own options, those that phirt lets through.

    Args:
        options: Names and values, as after ``--extra_options``.

    Raises:
        UnsafeModelError: One would run code that comes with a model, or read what phirt has
            not looked into.
        ValueError: A name or a value is none.
    """
    checked = {}
    for name, value in options.items():
        if not _OPTION.fullmatch(name) or not value.isprintable():
            raise ValueError(
                f"{f'{name}={value}'[:200]!r} is no option of {NAME!r}: they read like "
                "'block_size=64'."
            )
        if name in _REFUSED_OPTIONS:
            raise UnsafeModelError(
                f"The option {name!r} of {NAME!r} is not passed on: {_REFUSED_OPTIONS[name]}."
            )
        checked[name] = _checked_value(name, value)
    return checked


def _checked_value(name: str, value: str) -> str:
    if name == "config_only":
        raise ValueError(f"The option {name!r} leaves no model; leave it out.")
    if name == "filename":
        fault = plain_name_fault(value)
        if fault or not value.endswith(".onnx"):
            reason = fault or "it does not end in .onnx"
            raise ValueError(f"filename={value[:200]!r} is no name for a graph: {reason}.")
    if name in _FILE_OPTIONS and Path(value).is_file():
        return str(Path(value).absolute())
    return value


def builder_arguments(
    folder: Path,
    out_dir: Path,
    *,
    precision: str,
    device: str,
    cache: Path,
    options: Mapping[str, str],
) -> list[str]:
    """The builder's command line, after the name of its module.

    Args:
        folder: The Hugging Face folder.
        out_dir: Where the model goes.
        precision: The precision.
        device: phirt's name of the device.
        cache: A folder for what it keeps while it works.
        options: As `check_options` returned them.
    """
    arguments = {
        "-m": "phirt",  # Unused where there is a folder, and not None.
        "-i": str(folder),
        "-o": str(out_dir),
        "-p": precision,
        "-e": check_pair(device, precision),
        "-c": str(cache),
    }
    flat = [each for pair in arguments.items() for each in pair]
    extra = [f"{name}={value}" for name, value in options.items()]
    return [*flat, "--extra_options", *extra] if extra else flat


def corrected_config(document: dict[str, Any]) -> dict[str, Any]:
    """A config.json under the names that the builder looks for.

    Of Phi-3-vision and its like it is that of the language model alone, which is a Phi-3 with
    more tensors than are read; the builder's own way would need the code in its repository.

    Args:
        document: The config.json.
    """
    name = architecture_of(document, source=CONFIG_NAME)
    document = {**document, "architectures": [_ALIASES.get(name, name)]}
    if name == _VISION:
        plain = {key: value for key, value in document.items() if key not in _VISION_FIELDS}
        return {**plain, "model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}
    return document


def supported_architectures(engine: EnginePython) -> tuple[str, ...]:
    """The classes that an installed builder knows, read from its source; empty if it hides them.

    Args:
        engine: Where it is installed.
    """
    if engine.folder is None:
        return ()
    builder = engine.folder / "onnxruntime_genai" / "models" / "builder.py"
    try:
        text = builder.read_text(encoding="utf-8")
    except OSError:
        return ()
    return tuple(sorted(set(_NAMED_IN_BUILDER.findall(text))))


def _check_architecture(
    config: Mapping[str, Any], engine: EnginePython, source: Path, *, device: str, precision: str
) -> None:
    name = architecture_of(config, source=str(source / CONFIG_NAME))
    known = supported_architectures(engine)
    if known and name not in known:
        raise UnsupportedModelError(
            f"{source} is a {name}, which this version of the engine {NAME!r} does not build. It "
            f"builds {', '.join(known)}."
        )
    # The builder would change both to these without being asked, and only print that it did.
    if name == _MOE and (device.partition(":")[0], precision) != ("cuda", "int4"):
        raise UnsupportedModelError(
            f"{source} is a {name}, which the engine {NAME!r} builds for cuda in int4 alone, not "
            f"for {device} in {precision}."
        )


def _complete(folder: Path, out_dir: Path, *, filename: str, log: str) -> None:
    """Add what the builder leaves out, and look that it left what it should."""
    for name in (GENAI_CONFIG_NAME, filename):
        if not (out_dir / name).is_file():
            raise EngineFailedError(
                f"The engine {NAME!r} ended without an error and wrote no {name}.", log=log
            )
    # Of these it writes what transformers makes of them, or nothing.
    for name in (CONFIG_NAME, *TEXT_FILES):
        if (folder / name).exists() and name != "tokenizer_config.json":
            shutil.copyfile(folder / name, out_dir / name)


class BuildProgress:
    """Makes progress of the lines that the builder prints.

    Args:
        config: The config.json of what is built.
        progress: Called for every layer that is read and every tensor that is written.
    """

    def __init__(self, config: Mapping[str, Any], progress: ProgressCallback | None) -> None:
        layers = config.get("num_hidden_layers")
        self._layers = layers if isinstance(layers, int) else None
        self._report: Callable[[Progress], object] = progress or (lambda _: None)

    def __call__(self, line: str) -> None:
        """Report what a line says, if anything."""
        if layer := _LAYER.fullmatch(line):
            # It says so before it begins: those before it are done.
            self._report(Progress("convert", int(layer[1]), self._layers, "layers"))
        elif line == "Reading final norm" and self._layers is not None:
            self._report(Progress("convert", self._layers, self._layers, "layers"))
        elif tensor := _TENSOR.match(line):
            self._report(Progress("write", int(tensor[1]), int(tensor[2]), "tensors"))
