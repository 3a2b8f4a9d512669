"""An OpenVINO graph of a decoder: is it one that phirt can drive, and where its cache lies."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from phirt.backends.openvino.runtime import import_openvino
from phirt.errors import ModelFormatError, UnsupportedModelError

__all__ = ["KEEP_INPUT", "DecoderGraph", "State", "adapt"]

KEEP_INPUT = "logits_to_keep"
"""The input that `adapt` adds, named as in transformers."""

_REQUIRED = frozenset({"input_ids", "attention_mask"})
_OPTIONAL = frozenset({"position_ids", "beam_idx"})
_LOGITS = "logits"
_STATE = re.compile(r"past_key_values\.(\d{1,5})\.(key|value)(present.*)?")
_INT64_MAX = np.iinfo(np.int64).max
# What may stand between the LM head's product and the logits, and works on each value alone.
_ELEMENTWISE = {"Add", "Convert", "Divide", "Multiply", "Tanh"}
_LONGEST_TAIL = 8


@dataclass(frozen=True, slots=True)
class State:
    """Where keys or values of a layer lie among the states of a graph.

    Attributes:
        name: Of the state.
        heads: Key and value heads.
        size: Width of a head.
    """

    name: str
    heads: int
    size: int


@dataclass(frozen=True, slots=True)
class DecoderGraph:
    """What a session must know about a graph.

    Attributes:
        inputs: Names of its inputs.
        prunes: Whether its logits are always those of the last position alone.
        cache: Per layer, the states of keys and of values; empty where the states are not
            those of plain attention, so that they cannot be cut or moved.
    """

    inputs: frozenset[str]
    prunes: bool
    cache: tuple[tuple[State, State], ...]


def adapt(model: Any, source: str) -> DecoderGraph:
    """Check a graph, and give it an input that says from how many last positions it makes logits.

    Without that input, a long prompt's logits of every position would take gigabytes. A
    graph whose end is not a plain LM head does without.

    Args:
        model: The ``openvino.Model``, which is changed.
        source: What to call it in a message.

    Raises:
        ModelFormatError: The graph contradicts itself.
        UnsupportedModelError: It is not a stateful decoder.
    """
    inputs = frozenset(value.get_any_name() for value in model.inputs)
    outputs = {name for value in model.outputs for name in value.get_names()}
    unknown = inputs - _REQUIRED - _OPTIONAL
    if _LOGITS not in outputs or not inputs >= _REQUIRED or unknown:
        raise UnsupportedModelError(
            f"{source} has the inputs {', '.join(sorted(inputs))} and the outputs "
            f"{', '.join(sorted(outputs))}; phirt drives decoders that take input_ids and "
            "attention_mask (position_ids, beam_idx), and give logits."
        )
    states = [value.info for value in model.get_variables()]
    if not states:
        raise UnsupportedModelError(
            f"{source} has no states: it was exported without a KV cache. Export it again, "
            'with optimum-cli: --task text-generation-with-past, without "--disable-stateful".'
        )
    prunes = model.output(_LOGITS).partial_shape[1].max_length == 1
    if not prunes and _keep_last_logits(model, source):
        inputs |= {KEEP_INPUT}
    return DecoderGraph(inputs, prunes, _cache_of(states))


def _cache_of(states: list[Any]) -> tuple[tuple[State, State], ...]:
    found: dict[tuple[int, str], State] = {}
    for info in states:
        match = _STATE.fullmatch(info.variable_id)
        shape = info.data_shape
        if match is None or shape.rank.is_dynamic or len(shape) != 4:
            return ()
        if shape[1].is_dynamic or shape[3].is_dynamic or shape[2].is_static:
            return ()
        found[int(match[1]), match[2]] = State(
            info.variable_id, shape[1].get_length(), shape[3].get_length()
        )
    layers = sorted({layer for layer, _ in found})
    if layers != list(range(len(layers))) or len(found) != 2 * len(layers):
        return ()
    return tuple((found[layer, "key"], found[layer, "value"]) for layer in layers)


def _keep_last_logits(model: Any, source: str) -> bool:
    ov = import_openvino()
    ops = ov.opset13
    head = _find_head(model)
    if head is None:
        return False
    keep = ops.parameter(ov.PartialShape([1]), ov.Type.i64, name=KEEP_INPUT)
    keep.get_output_tensor(0).set_names({KEEP_INPUT})
    one = ops.constant(np.array([1], np.int64))
    end = ops.constant(np.array([_INT64_MAX], np.int64))
    kept = ops.slice(head.input_value(0), ops.negative(keep), end, one, one)
    head.input(0).replace_source_output(kept.output(0))
    model.add_parameters([keep])
    try:
        model.validate_nodes_and_infer_types()
    except RuntimeError as error:
        raise ModelFormatError(f"OpenVINO finds {source} inconsistent: {error}") from error
    return True


def _find_head(model: Any) -> Any:
    """The LM head's product, or None."""
    (result,) = (
        result for result in model.get_results() if _LOGITS in result.output(0).get_names()
    )
    node = result.input_value(0).get_node()
    for _ in range(_LONGEST_TAIL):
        if node.get_type_name() == "MatMul":
            rank = node.input_value(0).get_partial_shape().rank
            return node if rank.is_static and rank.get_length() == 3 else None
        if node.get_type_name() not in _ELEMENTWISE:
            return None
        node = node.input_value(0).get_node()
    return None
