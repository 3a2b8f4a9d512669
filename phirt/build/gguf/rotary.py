"""Rotary embeddings, from GGUF metadata and the tensors that belong to it."""

from __future__ import annotations

import numpy as np

from phirt.build.gguf.fields import MAX_CONTEXT, MAX_WIDTH, ArchitectureFields
from phirt.models.rotary import Rotary
from phirt.types import FloatArray

__all__ = ["ROPE_TENSORS", "read_local_rotary", "read_rotary"]

_LLAMA3_FACTORS = "rope_freqs.weight"  # divisors of the rotary frequencies
_LONG_FACTORS = "rope_factors_long.weight"  # LongRoPE's, beyond the original context
_SHORT_FACTORS = "rope_factors_short.weight"

ROPE_TENSORS = (_LLAMA3_FACTORS, _LONG_FACTORS, _SHORT_FACTORS)
"""Tensors that are part of the configuration, and of no layer."""

# For bases and divisors alike: far beyond any published one, and no frequency overflows.
_SMALLEST = 1e-6
_LARGEST = 1e12


def read_rotary(fields: ArchitectureFields, *, head_size: int, context_length: int) -> Rotary:
    """The rotary embedding of the layers with full attention.

    Args:
        fields: The architecture's keys.
        head_size: Width of one head.
        context_length: The model's context.

    Raises:
        ModelFormatError: A number is missing or cannot be right.
        UnsupportedModelError: It is of a kind that phirt does not compute.
    """
    dim = _rotating(fields, head_size)
    theta = fields.positive("rope.freq_base", default=10000.0, least=_SMALLEST, most=_LARGEST)
    tensors = fields.file.header.tensors
    if _LONG_FACTORS in tensors or _SHORT_FACTORS in tensors:
        return _long_rotary(fields, theta=theta, dim=dim, context_length=context_length)
    if fields.file.real(fields.key("rope.scaling.attn_factor")) not in (None, 1.0):
        fields.refuse(f"{fields.key('rope.scaling.attn_factor')} without LongRoPE's factors")
    scale = _linear_scale(fields, kinds=("linear",))
    factors = None if scale == 1 else np.full(dim // 2, scale, np.float32)
    if _LLAMA3_FACTORS in tensors:
        factors = _divisors(fields, _LLAMA3_FACTORS, dim, scale)
    return Rotary(theta=theta, dim=dim, factors=factors)


def read_local_rotary(fields: ArchitectureFields, *, head_size: int) -> Rotary:
    """The rotary embedding of Gemma 3's layers with a window, which nothing scales.

    llama.cpp's converter leaves its base out where it is that of every published model.

    Args:
        fields: The architecture's keys.
        head_size: Width of one head.
    """
    theta = fields.positive("rope.freq_base_swa", default=10000.0, least=_SMALLEST, most=_LARGEST)
    return Rotary(theta=theta, dim=head_size)


def _rotating(fields: ArchitectureFields, head_size: int) -> int:
    """How many dimensions of a head rotate."""
    dim = fields.size("rope.dimension_count", most=MAX_WIDTH, default=head_size)
    if dim == head_size:
        return dim
    if fields.architecture != "phi3":
        fields.refuse(f"rotating {dim:,} of {head_size:,} dimensions of a head")
    if dim > head_size or dim % 2:
        fields.fail(f"{dim:,} of {head_size:,} dimensions of a head cannot rotate in pairs")
    return dim


def _long_rotary(
    fields: ArchitectureFields, *, theta: float, dim: int, context_length: int
) -> Rotary:
    """LongRoPE, whose factor for cosines and sines llama.cpp's converter computes."""
    if fields.architecture != "phi3":
        fields.refuse(f"LongRoPE in {fields.architecture}")
    scale = _linear_scale(fields, kinds=("linear", "longrope"))
    short = _divisors(fields, _SHORT_FACTORS, dim, scale)
    long = _divisors(fields, _LONG_FACTORS, dim, scale)
    boundary = fields.size(
        "rope.scaling.original_context_length", most=MAX_CONTEXT, default=context_length
    )
    reaches_beyond = boundary < context_length
    return Rotary(
        theta=theta,
        dim=dim,
        factors=short,
        long_factors=long if reaches_beyond else None,
        boundary=boundary if reaches_beyond else None,
        attention_factor=fields.positive(
            "rope.scaling.attn_factor", least=_SMALLEST, most=_LARGEST
        ),
    )


def _divisors(fields: ArchitectureFields, name: str, dim: int, scale: float) -> FloatArray:
    """A tensor of divisors, times the linear factor."""
    info = fields.file.header.tensors.get(name)
    if info is None:
        fields.fail(f"tensor {name!r} is missing, and its counterpart is there")
    if info.encoding != "F32" or info.shape != (dim // 2,):
        fields.fail(
            f"{name} is {info.encoding} of shape {info.shape}, and must be F32 of ({dim // 2},)"
        )
    divisors = fields.file.read(info.offset, info.nbytes).view("<f4")
    if not (np.isfinite(divisors).all() and (divisors > 0).all()):
        fields.fail(f"{name} holds a divisor that is not positive and finite")
    if divisors.min() < _SMALLEST or divisors.max() > _LARGEST:
        fields.fail(f"{name} holds a divisor beyond {_SMALLEST:g} to {_LARGEST:g}")
    return np.asarray(divisors * np.float32(scale), dtype=np.float32)


def _linear_scale(fields: ArchitectureFields, *, kinds: tuple[str, ...]) -> float:
    # llama.cpp takes a missing type for linear, and a factor of 0 for no scaling.
    kind = fields.file.string(fields.key("rope.scaling.type")) or "linear"
    if kind == "none":
        return 1.0
    if kind not in kinds:
        fields.refuse(f"rotary scaling of type {kind!r:.80}")
    for name in ("rope.scaling.factor", "rope.scale_linear"):
        if fields.file.real(fields.key(name)):
            return fields.positive(name, least=_SMALLEST, most=_LARGEST)
    return 1.0
