"""The price of each operation that a chat template may use, and which it may.

Every function charges a `Meter` before the operation runs, from the sizes of its
operands; see `phirt.text.budget`. What is not listed here is not available to templates.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sized
from typing import Any

from phirt.errors import UnsafeModelError
from phirt.text.budget import CALL, ELEMENT, Meter, exceeded

__all__ = [
    "FILTERS",
    "charge_filter",
    "charge_format_spec",
    "charge_method",
    "charge_operator",
]

_PRINTF_SPEC = re.compile(r"[-+ #0]*(\*|\d+)?(?:\.(\*|\d*))?")
_DIGITS = re.compile(r"\d+")
# Where str.splitlines breaks a text.
_LINE_ENDS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"

_STR_METHODS = frozenset(
    {
        *("capitalize", "casefold", "lower", "upper", "title", "swapcase"),
        *("strip", "lstrip", "rstrip", "removeprefix", "removesuffix", "startswith", "endswith"),
        *("count", "find", "index", "rfind", "rindex", "replace", "join"),
        *("split", "rsplit", "splitlines", "partition", "rpartition"),
        *("center", "ljust", "rjust", "zfill"),
        *("isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier"),
        *("islower", "isnumeric", "isprintable", "isspace", "istitle", "isupper"),
    }
)
_METHODS: tuple[tuple[type, frozenset[str]], ...] = (
    (str, _STR_METHODS),
    (dict, frozenset({"get", "items", "keys", "values", "copy"})),
    (list, frozenset({"count", "index", "copy"})),
    (tuple, frozenset({"count", "index"})),
    (float, frozenset({"is_integer"})),
)

_CONSTANT_FILTERS = frozenset(
    {"abs", "attr", "count", "d", "default", "first", "items", "last", "length"}
)
_ITERATING_FILTERS = frozenset(
    {
        *("batch", "dictsort", "groupby", "join", "list", "map", "max", "min", "reject"),
        *("rejectattr", "reverse", "select", "selectattr", "slice", "sort", "sum", "unique"),
    }
)
_TEXT_FILTERS = frozenset(
    {
        *("capitalize", "center", "e", "escape", "float", "format", "indent", "int", "lower"),
        *("replace", "round", "safe", "string", "title", "tojson", "trim", "truncate", "upper"),
        "wordcount",
    }
)
FILTERS = _CONSTANT_FILTERS | _ITERATING_FILTERS | _TEXT_FILTERS
"""Filters that templates may use: jinja2's, without those for web pages and wrapping text."""

# Filters whose integer arguments are sizes.
_SIZED_FILTERS = frozenset({"batch", "center", "indent", "slice", "tojson", "truncate"})
# Comparisons of a sort of MAX_ITEMS elements, for each element.
_SORT_FACTOR = 17
_SORTING_FILTERS = frozenset({"dictsort", "groupby", "sort"})


def charge_operator(meter: Meter, operator: str, left: Any, right: Any) -> None:
    """Charge ``left operator right``."""
    if isinstance(left, int | float) and isinstance(right, int | float):
        for number in (left, right):
            if isinstance(number, int):
                meter.check_int(number)
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            meter.check_power(left, right)
    elif operator == "%" and isinstance(left, str):
        _charge_printf(meter, left, right)
    elif operator == "+" and isinstance(left, str) and isinstance(right, str):
        meter.charge_text(len(left) + len(right))
    elif operator == "+" and isinstance(left, list | tuple) and isinstance(right, list | tuple):
        meter.charge_items(len(left) + len(right))
    elif operator == "*" and isinstance(left, int) != isinstance(right, int):
        count, sequence = (left, right) if isinstance(left, int) else (right, left)
        if isinstance(sequence, str):
            meter.charge_text(len(sequence) * count)
        elif isinstance(sequence, Sized):
            meter.charge_items(len(sequence) * count)
    else:
        meter.weigh((left, right))


def charge_format_spec(meter: Meter, spec: str) -> None:
    """Charge the widths and precisions of a `str.format` specification (``">30"``)."""
    meter.charge_text(sum(_magnitude(meter, digits) for digits in _DIGITS.findall(spec)))


def charge_method(
    meter: Meter, receiver: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Charge a method of a built-in type.

    Returns:
        The positional arguments to call it with: an iterator that was read is a list now.

    Raises:
        UnsafeModelError: Templates may not call this method, or its price exceeds a budget.
    """
    if not any(isinstance(receiver, kind) and name in names for kind, names in _METHODS):
        raise UnsafeModelError(
            f"The model's chat template calls the method {name!r} of a value of type "
            f"{type(receiver).__name__!r}, which templates may not."
        )
    if not isinstance(receiver, str):
        if name != "get":
            meter.weigh(receiver)
        meter.weigh((args, kwargs))
        return args
    if name == "join" and args:
        items = list(meter.iterate(args[0])) if _is_iterable(args[0]) else args[0]
        meter.charge_text(meter.weigh(items) + len(receiver) * _length(items))
        return (items, *args[1:])
    values = [*args, *kwargs.values()]
    if name in {"center", "ljust", "rjust", "zfill"}:
        meter.charge_text(len(receiver) + _sizes(meter, values))
    elif name == "replace":
        _charge_replace(meter, receiver, values)
    # Searching backwards, or for a set of characters, takes text times pattern in the worst case.
    meter.charge(len(receiver) * (1 + meter.weigh(values) // CALL))
    return args


def charge_filter(
    meter: Meter, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Charge a filter; ``args`` begins with the filtered value.

    Returns:
        The positional arguments to call it with: an iterator is replaced by one that pays.
    """
    meter.charge(CALL)
    if name in _CONSTANT_FILTERS or not args:
        return args
    value, values = args[0], [*args[1:], *kwargs.values()]
    sizes = meter.weigh(values)
    if name in _SIZED_FILTERS:
        sizes += _sizes(meter, values)
    if name in _ITERATING_FILTERS:
        if name == "sum":
            _check_sum(kwargs["start"] if "start" in kwargs else args[2] if len(args) > 2 else 0)
        return (_charge_iterating(meter, name, value, sizes), *args[1:])
    weight = meter.weigh(value)
    if name == "replace":
        _charge_replace(meter, str(value), values)
    elif name == "title":
        meter.charge(ELEMENT * weight)  # word by word, in Python
    elif name == "format":
        _charge_printf(meter, str(value), dict(kwargs) or args[1:])
    elif name == "round":
        _charge_round(meter, values)
    elif name == "indent":
        lines = 1 + sum(str(value).count(end) for end in _LINE_ENDS)
        meter.charge_text(weight + sizes * lines)
    elif name == "tojson":
        # Each element may be indented and separated; nested ones more than once.
        meter.charge_text(weight + sizes * (weight // ELEMENT) if values else weight)
    else:
        meter.charge_text(weight + sizes)
    return args


def _check_sum(start: Any) -> None:
    """Refuse sums of lists or texts, which copy the sum for each element."""
    if not isinstance(start, int | float):
        raise UnsafeModelError(
            "The model's chat template uses the filter 'sum' for something else than numbers."
        )


def _charge_iterating(meter: Meter, name: str, value: Any, sizes: int) -> Any:
    """Charge a filter that visits every element; return the value to give it."""
    if name in {"batch", "slice"}:
        meter.charge_items(sizes)
    if name in {"map", "select", "reject", "selectattr", "rejectattr"}:
        # Lazy: the elements are paid for as they are read, the argument with each of them.
        return meter.iterate(value, CALL + ELEMENT * sizes)
    if _is_iterable(value) and not isinstance(value, Sized):
        value = list(meter.iterate(value))
    length = _length(value)
    weight = meter.weigh(value)
    if name == "join":
        meter.charge_text(weight + sizes * length)
    elif name in _SORTING_FILTERS:
        meter.charge(_SORT_FACTOR * (weight + length * CALL))
    meter.charge(length * (ELEMENT + sizes))
    return value


def _charge_printf(meter: Meter, template: str, values: Any) -> None:
    """Charge ``template % values``, from the widths and precisions written in it."""
    text = len(template)
    specs = 0
    position = template.find("%")
    while position >= 0:
        position = _skip_key(template, position + 1)
        match = _PRINTF_SPEC.match(template, position)
        assert match is not None  # noqa: S101 - every part of the pattern is optional
        for digits in match.groups():
            if digits == "*":
                raise UnsafeModelError(
                    "The model's chat template takes the width of a % format from its arguments."
                )
            text += _magnitude(meter, digits) if digits else 0
        specs += 1
        # A "%%" is one specification, whose conversion is the second sign.
        position = template.find("%", match.end() + 1)
    # A mapping can be named by every specification, the elements of a tuple by one each.
    times = specs if isinstance(values, Mapping) else 1
    meter.charge_text(text + times * meter.weigh(values))
    meter.charge(CALL * specs)


def _skip_key(template: str, position: int) -> int:
    """The index behind a mapping key, whose parentheses may be nested: ``%(a(b))s``."""
    if template[position : position + 1] != "(":
        return position
    depth = 0
    for index in range(position, len(template)):
        depth += (template[index] == "(") - (template[index] == ")")
        if depth == 0:
            return index + 1
    return len(template)


def _charge_replace(meter: Meter, text: str, values: list[Any]) -> None:
    """Charge ``text.replace(old, new)``; a third argument only makes the result smaller."""
    if len(values) < 2:
        return
    old, new = str(values[0]), str(values[1])
    count = text.count(old)
    meter.charge_text(len(text) + count * max(0, len(new) - len(old)))


def _charge_round(meter: Meter, values: list[Any]) -> None:
    """Refuse ``round(x, 10**6)``: it computes that power of ten."""
    meter.check_power(10, max((abs(v) for v in values if isinstance(v, int)), default=0))


def _sizes(meter: Meter, values: list[Any]) -> int:
    """Sum of the integer arguments, each of which is a width or a count."""
    total = 0
    for value in values:
        if isinstance(value, int):
            meter.check_int(value)
            total += abs(value)
    return total


def _magnitude(meter: Meter, digits: str) -> int:
    if len(digits) > 9:
        raise exceeded("text size", f"{meter.max_text:,} characters")
    return int(digits)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, Sized) else 1


def _is_iterable(value: Any) -> bool:
    return isinstance(value, str | list | tuple | dict | Iterator)
