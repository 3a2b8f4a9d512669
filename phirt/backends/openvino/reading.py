"""From a model folder to a graph in memory: OpenVINO IR, or ONNX as a last resort.

An ONNX decoder takes its cache as inputs and gives it back as outputs. Made states, they
are kept by OpenVINO, as in its own format. The ONNX operators that hold a whole attention are
taken apart in the conversion, so that it is slower than IR.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from phirt.backends.openvino.graph import DecoderGraph, adapt
from phirt.backends.openvino.runtime import import_openvino, reason_of, translate
from phirt.errors import ModelFormatError, OutOfMemoryError, UnsupportedModelError
from phirt.models.folder import ModelFolder
from phirt.models.onnx_safety import check_onnx_files
from phirt.models.real_files import real_folder

__all__ = ["read_graph"]

# As optimum and onnxruntime-genai's Model Builder name them.
_PAST = re.compile(r"past_key_values\.(\d{1,5}\.(?:key|value))")


def read_graph(core: Any, folder: ModelFolder) -> tuple[Any, DecoderGraph, Path]:
    """Read a folder's graph and check that phirt can drive it.

    Args:
        core: An ``openvino.Core``.
        folder: The folder.

    Returns:
        The ``openvino.Model``, what it takes and holds, and its file.

    Raises:
        ModelFormatError: Its files are damaged.
        UnsafeModelError: A file reaches outside the folder.
        UnsupportedModelError: It is not a decoder, or has operators that OpenVINO lacks.
        OutOfMemoryError: The weights do not fit.
    """
    if folder.model_path is None:
        raise UnsupportedModelError(f"The folder {folder.artifact.path} holds no graph.")
    is_onnx = folder.model_path.suffix == ".onnx"
    if is_onnx:
        check_onnx_files(folder.model_path.parent, folder.model_path.name)
    # OpenVINO does not follow links, which a Hugging Face cache is made of.
    inside = folder.model_path.relative_to(folder.artifact.path)
    path = real_folder(folder.artifact.path) / inside
    model = _read(core, path)
    if is_onnx:
        _make_stateful(model, folder, path)
    return model, adapt(model, str(path)), path


def _read(core: Any, path: Path) -> Any:
    try:
        return core.read_model(os.fspath(path))
    except Exception as error:
        translated = translate(error, f"reading {path}")
        if isinstance(translated, OutOfMemoryError):
            raise translated from error
        if "OpConversionFailure" in str(error):
            raise UnsupportedModelError(
                f"OpenVINO cannot convert {path}: {reason_of(error)}. Name the checkpoint that it "
                "was made from, which phirt converts to OpenVINO's own format."
            ) from error
        raise ModelFormatError(
            f"OpenVINO cannot read {path}: {reason_of(error)}. Fetch or export the model again."
        ) from error


def _make_stateful(model: Any, folder: ModelFolder, path: Path) -> None:
    """Turn the inputs and outputs that hold the cache into states."""
    import_openvino()
    from openvino._offline_transformations import apply_make_stateful_transformation

    shapes, states = {}, {}
    for value in model.inputs:
        name = value.get_any_name()
        match = _PAST.fullmatch(name)
        if match is None:
            shapes[name] = [1, -1]
        else:
            states[name] = f"present.{match[1]}"
            # A state begins empty only where no other dimension is free.
            shapes[name] = [1, folder.facts.num_kv_heads, -1, folder.facts.head_size]
    try:
        model.reshape(shapes)
        apply_make_stateful_transformation(model, states)
    except Exception as error:
        raise UnsupportedModelError(
            f"{path} is not a decoder with past_key_values.N.key and present.N.key: "
            f"{reason_of(error)}. Name the checkpoint that it was made from instead."
        ) from error
