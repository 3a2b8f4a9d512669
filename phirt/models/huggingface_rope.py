"""The rotary embedding that a Hugging Face config.json describes, in all its spellings.

`transformers` 5 writes one object ``rope_parameters``; before, there were ``rope_theta``,
``rope_scaling`` and, for Phi, ``partial_rotary_factor`` beside each other, and most
published models still have them. Both are read, with the precedence of `transformers` 5.23.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np

from phirt.errors import ModelFormatError, UnsupportedModelError
from phirt.models.rotary import Rotary
from phirt.models.safe_json import JsonFields
from phirt.types import FloatArray

__all__ = ["longrope_boundary", "read_local_rotary", "read_rotary", "rope_parameters"]

_DEFAULT_THETA = 10_000.0
_MAX_CONTEXT = 1 << 27
_LARGEST = 1e12  # for bases and divisors alike: far beyond any published one
_SMALLEST = 1e-6

# Gemma 3 has one set of parameters for each kind of layer, by these names.
_FULL, _SLIDING = "full_attention", "sliding_attention"
_GEMMA3_THETA = 1_000_000.0

_KNOWN = {
    "attention_factor",
    "factor",
    "high_freq_factor",
    "long_factor",
    "low_freq_factor",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "rope_theta",
    "rope_type",
    "short_factor",
    "type",
}
_TYPES = ("default", "linear", "llama3", "longrope")


def rope_parameters(config: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """The rotary parameters of the layers with full attention, in the new spelling.

    Args:
        config: The config.json, or the part of it that describes the decoder.
        source: What to call it in an error: the file's path.

    Returns:
        ``rope_type`` and ``rope_theta``, and whatever else is given.

    Raises:
        ModelFormatError: A section is not an object, or a type not a string.
    """
    fields = JsonFields(config, source=source)
    scaling, parameters = fields.mapping("rope_scaling"), fields.mapping("rope_parameters")
    if _is_nested(parameters):
        # The old ``rope_scaling``, always flat, is of the layers with full attention too.
        merged = {**fields.mapping(f"rope_parameters.{_FULL}"), **scaling}
    else:
        merged = dict(scaling or parameters)
    gemma3 = config.get("model_type") == "gemma3_text"
    for name, default in (
        ("rope_theta", _GEMMA3_THETA if gemma3 else _DEFAULT_THETA),
        ("partial_rotary_factor", None),
    ):
        if merged.get(name) is None:
            given = config.get(name)
            merged[name] = default if given is None else given
    named = JsonFields(merged, source=source)
    kind = named.optional_string("rope_type", max_length=100)
    kind = kind or named.optional_string("type", max_length=100) or "default"
    if config.get("model_type") in {"phi3", "phimoe"} and kind in {"su", "yarn"}:
        kind = "longrope"  # names of the same thing in Phi's early configurations
    merged["rope_type"] = "longrope" if kind == "su" else kind
    return merged


def longrope_boundary(config: Mapping[str, Any], *, source: str) -> int | None:
    """The longest sequence with LongRoPE's short factors, or None where none is longer.

    That is so without LongRoPE, and where it begins no earlier than the context ends: files
    of divisors that no formula gives are spelled so (`phirt.build.huggingface_config`).
    A top-level ``original_max_position_embeddings`` has precedence over that of the rotary
    parameters, as in `transformers`; with neither it is the context.

    Args:
        config: As for `rope_parameters`.
        source: Likewise.

    Raises:
        ModelFormatError: It is not a number of tokens.
    """
    parameters = rope_parameters(config, source=source)
    if parameters["rope_type"] != "longrope":
        return None
    boundary = _original_context(config, parameters, source)
    context = config.get("max_position_embeddings")
    return None if type(context) is int and context <= boundary else boundary


def read_rotary(config: Mapping[str, Any], *, head_size: int, source: str) -> Rotary:
    """The rotary embedding of the layers with full attention.

    Args:
        config: As for `rope_parameters`.
        head_size: Width of one head.
        source: As for `rope_parameters`.

    Raises:
        ModelFormatError: A number is missing or cannot be right.
        UnsupportedModelError: It is of a kind that phirt does not compute.
    """
    flat = JsonFields(config, source=source).mapping("rope_parameters")
    if flat and not _is_nested(flat) and config.get("model_type") == "gemma3_text":
        raise ModelFormatError(
            f"{source}: rope_parameters of gemma3_text must have {_FULL!r} and {_SLIDING!r}."
        )
    parameters = rope_parameters(config, source=source)
    _refuse_unknown(parameters, source)
    fields = JsonFields(parameters, source=f"{source} (rotary parameters)")
    kind = parameters["rope_type"]
    theta = fields.number("rope_theta", minimum=_SMALLEST, maximum=_LARGEST)
    dim = _rotating(config, fields, head_size, source)
    if kind == "linear":
        scale = fields.number("factor", minimum=_SMALLEST, maximum=_LARGEST)
        return Rotary(theta=theta, dim=dim, factors=np.full(dim // 2, scale, np.float32))
    if kind == "llama3":
        context = _original_context(config, parameters, source)
        factors = _llama3_factors(fields, theta, dim, context, source)
        return Rotary(theta=theta, dim=dim, factors=factors)
    if kind == "longrope":
        original = _original_context(config, parameters, source)
        boundary = longrope_boundary(config, source=source)
        long_factors = _divisors(fields, "long_factor", dim, source)
        return Rotary(
            theta=theta,
            dim=dim,
            factors=_divisors(fields, "short_factor", dim, source),
            long_factors=None if boundary is None else long_factors,
            boundary=boundary,
            attention_factor=_attention_factor(config, fields, original, source),
        )
    return Rotary(theta=theta, dim=dim)


def read_local_rotary(config: Mapping[str, Any], *, head_size: int, source: str) -> Rotary:
    """The rotary embedding of Gemma 3's layers with a window.

    Arguments and errors are those of `read_rotary`.
    """
    fields = JsonFields(config, source=source)
    local = dict(fields.mapping(f"rope_parameters.{_SLIDING}"))
    if local.get("rope_theta") is None:
        given = config.get("rope_local_base_freq")
        local["rope_theta"] = _DEFAULT_THETA if given is None else given
    kind = local.get("rope_type") or local.get("type") or "default"
    if kind != "default":
        _refuse(f"rotary scaling of type {kind!r:.80} in layers with a window", source)
    _refuse_unknown({**local, "rope_type": kind}, source)
    theta = JsonFields(local, source=f"{source} (rotary parameters)").number(
        "rope_theta", minimum=_SMALLEST, maximum=_LARGEST
    )
    return Rotary(theta=theta, dim=head_size)


def _is_nested(parameters: Mapping[str, Any]) -> bool:
    return _FULL in parameters or _SLIDING in parameters


def _refuse(what: str, source: str) -> NoReturn:
    raise UnsupportedModelError(f"{source}: phirt does not compute {what}.")


def _refuse_unknown(parameters: Mapping[str, Any], source: str) -> None:
    kind = parameters["rope_type"]
    if kind not in _TYPES:
        _refuse(f"rotary scaling of type {kind!r:.80}", source)
    unknown = sorted(parameters.keys() - _KNOWN)
    unknown = [key for key in unknown if parameters[key] is not None]
    if unknown:
        _refuse(f"the rotary parameter {unknown[0]!r:.80}", source)


def _rotating(config: Mapping[str, Any], fields: JsonFields, head_size: int, source: str) -> int:
    """How many dimensions of a head rotate."""
    share = fields.optional_number("partial_rotary_factor", minimum=_SMALLEST, maximum=1.0)
    if share is None or share == 1.0:
        return head_size
    if config.get("model_type") != "phi3":
        _refuse(f"heads that rotate in part (partial_rotary_factor {share:g})", source)
    dim = int(head_size * share)
    if dim < 2 or dim % 2:
        raise ModelFormatError(
            f"{source}: partial_rotary_factor {share:g} of {head_size:,} dimensions does not "
            "divide into rotary pairs."
        )
    return dim


def _original_context(config: Mapping[str, Any], parameters: Mapping[str, Any], source: str) -> int:
    name = "original_max_position_embeddings"
    for place in (config, parameters):
        if place.get(name) is not None:
            fields = JsonFields(place, source=source)
            return fields.integer(name, minimum=2, maximum=_MAX_CONTEXT)
    fields = JsonFields(config, source=source)
    return fields.integer("max_position_embeddings", minimum=2, maximum=_MAX_CONTEXT)


def _llama3_factors(
    fields: JsonFields, theta: float, dim: int, context: int, source: str
) -> FloatArray:
    """Llama 3's divisors: 1 for short waves, ``factor`` for long ones, a blend between.

    A wave is as many tokens as a pair needs for one turn. Between ``context / high`` and
    ``context / low`` frequencies are interpolated by ``context / wave`` (``apply_scaling``
    in Llama 3.1's reference code).
    """
    factor = fields.number("factor", minimum=_SMALLEST, maximum=_LARGEST)
    low = fields.number("low_freq_factor", minimum=_SMALLEST, maximum=_LARGEST)
    high = fields.number("high_freq_factor", minimum=_SMALLEST, maximum=_LARGEST)
    if high <= low:
        raise ModelFormatError(
            f"{source}: high_freq_factor ({high:g}) must be above low_freq_factor ({low:g})."
        )
    waves = 2 * math.pi / Rotary(theta=theta, dim=dim).frequencies().astype(np.float64)
    kept = np.clip((context / waves - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - kept) / factor + kept), np.float32)


def _divisors(fields: JsonFields, name: str, dim: int, source: str) -> FloatArray:
    divisors = fields.numbers(name, minimum=_SMALLEST, maximum=_LARGEST)
    if len(divisors) != dim // 2:
        raise ModelFormatError(
            f"{source}: {name} has {len(divisors):,} divisors; {dim // 2:,} pairs of a head rotate."
        )
    return np.array(divisors, np.float32)


def _attention_factor(
    config: Mapping[str, Any], fields: JsonFields, boundary: int, source: str
) -> float:
    """What LongRoPE multiplies cosines and sines by (Ding et al. 2024, section 3.3).

    ``sqrt(1 + ln(s) / ln(boundary))`` for a context that is ``s`` times the boundary.
    """
    given = fields.optional_number("attention_factor", minimum=0, maximum=_LARGEST)
    if given is not None:
        return given
    scale = fields.optional_number("factor", minimum=_SMALLEST, maximum=_LARGEST)
    if scale is None:
        context = JsonFields(config, source=source).integer(
            "max_position_embeddings", minimum=1, maximum=_MAX_CONTEXT
        )
        scale = context / boundary
    return 1.0 if scale <= 1 else math.sqrt(1 + math.log(scale) / math.log(boundary))
