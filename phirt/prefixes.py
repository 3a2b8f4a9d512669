"""How much of ended requests' KV caches a model keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phirt.devices.memory import read_memory
from phirt.generation.prefix import PrefixCache
from phirt.protocols import KV_PRECISIONS

if TYPE_CHECKING:
    from phirt.dispatch.select import Selection
    from phirt.models.folder import ModelFolder

__all__ = ["bytes_per_token", "check_capacity", "new_prefix_cache"]

_TOKENS = 8192
_SHARE = 8
_BYTES_PER_VALUE = 4  # the most that a runtime keeps a key or a value in


def check_capacity(value: object) -> None:
    """Refuse what is no number of bytes.

    Raises:
        TypeError: It is neither None nor an int.
        ValueError: It is negative.
    """
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"prefix_cache_bytes must be an int or None, not {value!r}")
    if value < 0:
        raise ValueError(f"prefix_cache_bytes={value} must not be negative; 0 keeps nothing")


def new_prefix_cache(selection: Selection, capacity_bytes: int | None) -> PrefixCache | None:
    """An empty cache for what was selected, or None where nothing is to be kept.

    Args:
        selection: The loaded model.
        capacity_bytes: Most bytes that it may hold. None: room for 8,192 tokens, and at most
            an eighth of the memory that is free where the model is.
    """
    token = bytes_per_token(selection.folder)
    asked = KV_PRECISIONS.get(selection.plan.kv_precision, _BYTES_PER_VALUE)
    token = token * asked // _BYTES_PER_VALUE
    if capacity_bytes is None:
        chosen = selection.plan.chosen
        need = None if chosen is None else chosen.memory
        free = None if need is None else need.free
        if free is None:
            free = read_memory().free
        capacity_bytes = min(_TOKENS * token, free // _SHARE)
    if capacity_bytes == 0:
        return None
    return PrefixCache(capacity_bytes=capacity_bytes, bytes_per_token=token)


def bytes_per_token(folder: ModelFolder) -> int:
    """Most bytes that the keys and values of a token take in all layers, in float32."""
    facts = folder.facts
    return 2 * facts.num_layers * facts.num_kv_heads * facts.head_size * _BYTES_PER_VALUE
