"""A decoder graph as onnxruntime describes it, held against its folder's configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from phirt.errors import ModelFormatError, UnsupportedModelError
from phirt.models.folder import ModelFolder
from phirt.models.genai_config import DecoderSpec

__all__ = ["KEEP_INPUT", "cache_names", "check_graph", "check_supported", "dtype_of"]

KEEP_INPUT = "num_logits_to_keep"
"""The optional input that says for how many of the last positions logits are wanted."""

_DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
}


def cache_names(spec: DecoderSpec) -> tuple[list[str], list[str]]:
    """Names of the cache's inputs and of its outputs: key and value of each layer in turn."""
    layers = range(spec.num_layers)
    past = [name for layer in layers for name in spec.past_names(layer)]
    return past, [name for layer in layers for name in spec.present_names(layer)]


def check_supported(folder: ModelFolder) -> None:
    """Raise `UnsupportedModelError` unless past and present share one full-length buffer."""
    if folder.decoder.window is not None or not folder.decoder.search.get(
        "past_present_share_buffer", False
    ):
        raise UnsupportedModelError(
            f"{folder.artifact.path}: phirt drives graphs that keep past and present keys and "
            "values in one full-length buffer (past_present_share_buffer in genai_config.json), "
            "and this one does not. Build it with onnxruntime-genai's Model Builder, or name "
            "the checkpoint's .gguf file."
        )


def check_graph(inputs: dict[str, Any], outputs: dict[str, Any], folder: ModelFolder) -> None:
    """Hold names and fixed sizes of the graph against genai_config.json.

    Args:
        inputs: The graph's inputs by name, as onnxruntime describes them.
        outputs: Its outputs.
        folder: The folder that it is from.

    Raises:
        ModelFormatError: The configuration is not of this graph.
        UnsupportedModelError: The graph wants an input that phirt does not supply.
    """
    spec = folder.decoder
    past, present = cache_names(spec)
    _check_names(
        [spec.input_ids, spec.attention_mask, *past],
        inputs,
        [spec.logits, *present],
        outputs,
        folder,
    )
    for name in past:
        _check_shape(inputs[name], (None, spec.num_kv_heads, None, spec.head_size), folder)
    _check_shape(outputs[spec.logits], (None, None, spec.vocab_size), folder)


def _check_names(
    needed_inputs: Sequence[str],
    inputs: dict[str, Any],
    needed_outputs: Sequence[str],
    outputs: dict[str, Any],
    folder: ModelFolder,
) -> None:
    missing = [n for n in needed_inputs if n not in inputs]
    missing += [n for n in needed_outputs if n not in outputs]
    if missing:
        raise ModelFormatError(
            f"{folder.artifact.path}: genai_config.json names {', '.join(missing[:3])}, which the "
            f"graph in {folder.decoder.filename} does not have. Build the model again."
        )
    known = {*needed_inputs, folder.decoder.position_ids, KEEP_INPUT}
    unknown = [n for n in inputs if n not in known]
    if unknown:
        raise UnsupportedModelError(
            f"{folder.artifact.path}: the graph wants the inputs {', '.join(unknown[:3])}, which "
            "phirt's decoder loop does not supply."
        )


def _check_shape(value: Any, wanted: tuple[int | None, ...], folder: ModelFolder) -> None:
    """Hold the graph's own shape, as far as it is fixed, against the configuration's."""
    found = value.shape
    same = len(found) == len(wanted) and all(
        not isinstance(a, int) or b is None or a == b for a, b in zip(found, wanted, strict=True)
    )
    if not same:
        shape = ", ".join("any" if size is None else str(size) for size in wanted)
        raise ModelFormatError(
            f"{folder.artifact.path}: by genai_config.json {value.name} has the shape ({shape}), "
            f"but the graph in {folder.decoder.filename} says {tuple(found)}. "
            "Build the model again."
        )


def dtype_of(value: Any, folder: ModelFolder) -> np.dtype[Any]:
    """NumPy's type for an input or output.

    Raises:
        UnsupportedModelError: phirt does not drive graphs with values of its type.
    """
    try:
        return _DTYPES[value.type]
    except KeyError:
        raise UnsupportedModelError(
            f"{folder.artifact.path}: {value.name} is {value.type}; phirt drives graphs whose KV "
            f"cache and logits are {' or '.join(_DTYPES)}."
        ) from None
