"""Checks of single parameter values. Every message says parameter, value found, what is allowed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from types import MappingProxyType
from typing import Literal, cast

import numpy as np

from phirt.types import LogitsProcessor

__all__ = [
    "INT_LIMIT",
    "bias_mapping",
    "boolean",
    "early_stopping",
    "integer",
    "processors",
    "real",
    "strings",
    "token_ids",
]

INT_LIMIT = 2**31
"""Counts and token ids stay below this: the largest that every runtime's int32 can hold."""

_FLOAT32_MAX = float(np.finfo(np.float32).max)


def boolean(name: str, value: object) -> bool:
    """``value`` as a bool, or TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {_shown(value)}")
    return value


def early_stopping(name: str, value: object) -> bool | Literal["never"]:
    """``value`` as a bool or ``"never"``; TypeError or ValueError otherwise."""
    if isinstance(value, bool):
        return value
    if value == "never":
        return "never"
    wrong = ValueError if isinstance(value, str) else TypeError
    raise wrong(f'{name} must be True, False or "never", not {_shown(value)}')


def integer(name: str, value: object, *, low: int, limit: int = INT_LIMIT) -> int:
    """``value`` as an int with ``low <= value < limit``; TypeError or ValueError otherwise."""
    # bool is an int to Python; `top_k=True` is a mistake all the same.
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, not {_shown(value)}")
    number = int(value)
    if not low <= number < limit:
        raise ValueError(f"{name} must be at least {low} and below {limit}, not {number}")
    return number


def real(name: str, value: object, *, allowed: str, accepts: Callable[[float], bool]) -> float:
    """``value`` as a finite float for which ``accepts`` holds.

    Args:
        name: The parameter.
        value: What the caller gave.
        allowed: What ``accepts`` stands for, in words for the message.
        accepts: The range.

    Raises:
        TypeError: Not a real number (a bool is none).
        ValueError: NaN, infinite, or outside the range.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number ({allowed}), not {_shown(value)}")
    try:
        number = float(value)
    except OverflowError:  # an int beyond float's range
        number = math.inf
    if not (math.isfinite(number) and accepts(number)):
        raise ValueError(f"{name} must be {allowed}, not {_shown(value)}")
    return number


def strings(name: str, value: object) -> tuple[str, ...]:
    """One string or several as a tuple; none may be empty."""
    found = (value,) if isinstance(value, str) else _items(name, value, "a string or several")
    for item in found:
        if not isinstance(item, str):
            raise TypeError(f"{name} must hold strings, not {_shown(item)}")
        if not item:
            raise ValueError(f"{name} must not hold the empty string: it would stop at once")
    return tuple(str(item) for item in found)


def token_ids(name: str, value: object) -> tuple[int, ...]:
    """A collection of token ids as a tuple of ints, each in [0, 2**31)."""
    found = _items(name, value, "a sequence of token ids")
    return tuple(integer(f"a token id in {name}", item, low=0) for item in found)


def bias_mapping(name: str, value: object) -> Mapping[int, float]:
    """A mapping of token ids to finite biases, copied and made read-only."""
    if not isinstance(value, Mapping):
        raise TypeError(
            f"{name} must be a mapping of token ids to biases, such as {{42: -1.5}}, "
            f"not {_shown(value)}"
        )
    return MappingProxyType(
        {
            integer(f"a token id in {name}", token, low=0): real(
                f"the bias of token {token} in {name}",
                bias,
                allowed="finite (to forbid a token, use suppress_tokens)",
                accepts=lambda number: abs(number) <= _FLOAT32_MAX,
            )
            for token, bias in value.items()
        }
    )


def processors(name: str, value: object) -> tuple[LogitsProcessor, ...]:
    """A collection of callables as a tuple."""
    if callable(value):
        raise TypeError(f"{name} must be a sequence of functions, not one: put it into a list")
    found = _items(name, value, "a sequence of functions")
    for item in found:
        if not callable(item):
            raise TypeError(
                f"{name} must hold functions f(token_ids, logits) -> logits, not {_shown(item)}"
            )
    return cast("tuple[LogitsProcessor, ...]", found)


def _items(name: str, value: object, wanted: str) -> tuple[object, ...]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be {wanted}, not {_shown(value)}")
    return tuple(value)


def _shown(value: object) -> str:
    """``value`` for a message, with its type where the value alone does not tell it."""
    text = repr(value)
    if len(text) > 60:
        text = text[:57] + "..."
    if value is None or isinstance(value, (bool, int, float, str)):
        return text
    return f"{text} ({type(value).__name__})"
