"""A decoder graph as onnxruntime describes it, held against its folder's configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phirt.backends.onnxruntime.memory import ELEMENTS, INT8, Element
from phirt.errors import ModelFormatError, UnsupportedModelError
from phirt.models.folder import ModelFolder
from phirt.models.genai_config import DecoderSpec
from phirt.types import FloatArray

__all__ = ["DecoderGraph", "cache_inputs", "describe_graph"]

_KEEP = "num_logits_to_keep"
_BRANCH = "use_cache_branch"
# As Optimum and transformers.js name them.
_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderGraph:
    """Names, types and sizes of a decoder graph's inputs and outputs.

    Attributes:
        input_ids: Input of token ids, (batch, tokens).
        attention_mask: Input of the mask, (batch, past + tokens), or None without one.
        position_ids: Input of positions, (batch, tokens), or None where the graph counts.
        use_cache_branch: Input that says whether the cache holds anything (a graph of two
            branches), or None.
        num_logits_to_keep: Optional input: for how many of the last positions logits are
            wanted; or None.
        past: The cache's inputs: key and value of each layer in turn, each
            (batch, kv_heads, past, head_size).
        present: Its outputs, likewise.
        logits: Output of logits.
        kv_heads: Key and value heads.
        head_size: Width of one head.
        vocab_size: Logits per position.
        cache: Type of the cache's elements.
        logits_type: Type of the logits.
        prunes_logits: Whether logits are those of the last position unless more are asked for.
        kv_scales: Of a cache of integers, what one stands for: for each of ``past``, shape
            (kv_heads, 1, head_size). Empty for a cache of floats.
    """

    input_ids: str
    attention_mask: str | None
    position_ids: str | None
    use_cache_branch: str | None
    num_logits_to_keep: str | None
    past: tuple[str, ...]
    present: tuple[str, ...]
    logits: str
    kv_heads: int
    head_size: int
    vocab_size: int
    cache: Element
    logits_type: Element
    prunes_logits: bool
    kv_scales: tuple[FloatArray, ...] = ()

    def from_cache(self, index: int, stored: NDArray[Any]) -> FloatArray:
        """Keys or values as float32; ``stored`` itself where it is that already.

        Args:
            index: Which of ``past`` they are of.
            stored: Shape (..., kv_heads, tokens, head_size).
        """
        if not self.kv_scales:
            return self.cache.to_float32(stored)
        values: FloatArray = np.multiply(stored, self.kv_scales[index], dtype=np.float32)
        return values

    def to_cache(self, index: int, values: FloatArray) -> NDArray[Any]:
        """Keys or values as the cache holds them; the reverse of `from_cache`."""
        if not self.kv_scales:
            return self.cache.from_float32(values)
        # As the kernel rounds: to the nearest, and what is beyond the range is cut off.
        steps: FloatArray = np.clip(np.rint(values / self.kv_scales[index]), -128, 127)
        return steps.astype(np.int8)

    @property
    def can_verify(self) -> bool:
        """Whether logits of every position can be had."""
        return self.num_logits_to_keep is not None or not self.prunes_logits


def describe_graph(
    inference: Any, folder: ModelFolder, kv_scales: tuple[FloatArray, ...] = ()
) -> DecoderGraph:
    """Read a session's inputs and outputs, and hold them against the folder's configuration.

    Args:
        inference: The session.
        folder: What it was opened from.
        kv_scales: As in `DecoderGraph`, where the graph was made to keep a cache of integers.

    Raises:
        ModelFormatError: The configuration is not of this graph.
        UnsupportedModelError: The graph wants an input that phirt does not supply, or keeps a
            cache of another kind than keys and values of (batch, heads, positions, width).
    """
    inputs = {item.name: item for item in inference.get_inputs()}
    outputs = {item.name: item for item in inference.get_outputs()}
    optional = {item.name for item in inference.get_overridable_initializers()}
    names = _names_of_spec(folder.decoder) if folder.decoder else _names_of_export(inputs)
    past, present = names["past"], names["present"]
    _check_names(names, inputs, outputs, folder)
    kv_heads, head_size = _cache_shape(inputs, past, folder)
    logits = names["logits"]
    return DecoderGraph(
        input_ids=names["input_ids"],
        attention_mask=names["attention_mask"] if names["attention_mask"] in inputs else None,
        position_ids=names["position_ids"] if names["position_ids"] in inputs else None,
        use_cache_branch=_BRANCH if _BRANCH in inputs else None,
        num_logits_to_keep=_KEEP if _KEEP in optional | inputs.keys() else None,
        past=past,
        present=present,
        logits=logits,
        kv_heads=kv_heads,
        head_size=head_size,
        vocab_size=_vocab_size(outputs[logits], folder),
        cache=INT8 if kv_scales else _element(inputs[past[0]], folder),
        logits_type=_element(outputs[logits], folder),
        # A graph that declares one position computes the LM head for the last one only.
        prunes_logits=outputs[logits].shape[1] == 1,
        kv_scales=kv_scales,
    )


def cache_inputs(folder: ModelFolder) -> tuple[str, ...]:
    """Names of the cache's inputs, of a folder that names them: key and value of each layer."""
    assert folder.decoder is not None  # noqa: S101  # the caller has asked for it
    names: tuple[str, ...] = _names_of_spec(folder.decoder)["past"]
    return names


def _names_of_spec(spec: DecoderSpec) -> dict[str, Any]:
    layers = range(spec.num_layers)
    return {
        "input_ids": spec.input_ids,
        "attention_mask": spec.attention_mask,
        "position_ids": spec.position_ids,
        "logits": spec.logits,
        "past": tuple(name for layer in layers for name in spec.past_names(layer)),
        "present": tuple(name for layer in layers for name in spec.present_names(layer)),
    }


def _names_of_export(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Names by Optimum's convention; which layers there are, the inputs say."""
    found = {int(match[1]) for name in inputs if (match := _PAST.fullmatch(name))}
    parts = [f"{layer}.{part}" for layer in sorted(found) for part in ("key", "value")]
    return {
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        "position_ids": "position_ids",
        "logits": "logits",
        "past": tuple(f"past_key_values.{part}" for part in parts),
        "present": tuple(f"present.{part}" for part in parts),
    }


def _check_names(
    names: Mapping[str, Any],
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
    folder: ModelFolder,
) -> None:
    past, present = names["past"], names["present"]
    required = [names["input_ids"], *past]
    if folder.decoder is not None:
        required.append(names["attention_mask"])
    missing = [name for name in required if name not in inputs]
    missing += [name for name in (names["logits"], *present) if name not in outputs]
    if missing:
        convention = "genai_config.json" if folder.decoder else "the convention of such exports"
        raise ModelFormatError(
            f"{folder.model_path}: {convention} names {', '.join(missing[:3])}, which the graph "
            "does not have. Build or export the model again."
        )
    if not past:
        raise UnsupportedModelError(
            f"{folder.model_path}: the graph has no inputs past_key_values.N.key and .value, so "
            "every token would cost a whole prefill. Export it with its cache (Optimum: "
            "--task text-generation-with-past)."
        )
    known = {*required, names["attention_mask"], names["position_ids"], _KEEP, _BRANCH}
    unknown = [name for name in inputs if name not in known]
    if unknown:
        raise UnsupportedModelError(
            f"{folder.model_path}: the graph wants the inputs {', '.join(unknown[:3])}, which "
            "phirt's decoder loop does not supply."
        )


def _cache_shape(
    inputs: Mapping[str, Any], past: tuple[str, ...], folder: ModelFolder
) -> tuple[int, int]:
    """Key and value heads, and the width of one; every layer has the same."""
    spec, facts = folder.decoder, folder.facts
    by_graph = inputs[past[0]].shape
    if len(by_graph) != 4:
        raise UnsupportedModelError(
            f"{folder.model_path}: {past[0]} has the shape {tuple(by_graph)}; phirt drives caches "
            "of keys and values of shape (batch, heads, positions, width)."
        )
    heads = _size(by_graph[1], spec.num_kv_heads if spec else facts.num_kv_heads)
    width = _size(by_graph[3], spec.head_size if spec else facts.head_size)
    if spec is not None:
        heads, width = spec.num_kv_heads, spec.head_size
    if heads is None or width is None:
        raise UnsupportedModelError(
            f"{folder.model_path}: neither the graph nor config.json gives the size of {past[0]}."
        )
    for name in past:
        _check_shape(inputs[name], (None, heads, None, width), folder)
    return heads, width


def _vocab_size(logits: Any, folder: ModelFolder) -> int:
    size = folder.facts.vocab_size
    if folder.decoder is None and len(logits.shape) == 3:
        # Exports of padded embeddings have more logits than config.json has tokens.
        size = _size(logits.shape[2], size) or size
    _check_shape(logits, (None, None, size), folder)
    return size


def _size(by_graph: object, by_config: int | None) -> int | None:
    return by_graph if isinstance(by_graph, int) else by_config


def _check_shape(value: Any, wanted: tuple[int | None, ...], folder: ModelFolder) -> None:
    """Hold the graph's own shape, as far as it is fixed, against the expected one."""
    found = value.shape
    same = len(found) == len(wanted) and all(
        not isinstance(a, int) or b is None or a == b for a, b in zip(found, wanted, strict=True)
    )
    if not same:
        shape = ", ".join("any" if size is None else str(size) for size in wanted)
        source = "genai_config.json" if folder.decoder else "config.json"
        raise ModelFormatError(
            f"{folder.artifact.path}: by {source} {value.name} has the shape ({shape}), but the "
            f"graph in {folder.model_path} says {tuple(found)}. Build the model again."
        )


def _element(value: Any, folder: ModelFolder) -> Element:
    try:
        return ELEMENTS[value.type]
    except KeyError:
        raise UnsupportedModelError(
            f"{folder.model_path}: {value.name} is {value.type}; phirt drives graphs whose KV "
            f"cache and logits are {', '.join(ELEMENTS)}."
        ) from None
