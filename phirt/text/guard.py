"""What chat templates may do, and what they pay for it: the policy of the sandbox.

Knows nothing of jinja2: `phirt.text.sandbox` connects it to jinja2's hooks. While a template
renders, `METER` holds the meter of that render, for its thread alone.
"""

from __future__ import annotations

import functools
import string
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from types import BuiltinMethodType, MethodType
from typing import Any, TypeAlias

from phirt.errors import ModelFormatError, UnsafeModelError
from phirt.text.budget import CALL, ELEMENT, MAX_CALL_DEPTH, Meter, exceeded
from phirt.text.operations import (
    FILTERS,
    charge_filter,
    charge_format_spec,
    charge_method,
    charge_operator,
)

__all__ = [
    "METER",
    "CallGuard",
    "Format",
    "Function",
    "PaidFormatter",
    "apply_operator",
    "check_filter_name",
    "check_key",
    "check_stored_name",
    "iterate",
    "operand",
    "paid_filter",
    "paid_test",
    "pay",
    "text",
    "unsafe_attribute",
]

METER: ContextVar[Meter] = ContextVar("phirt_chat_template_meter")

Function: TypeAlias = Callable[..., Any]


def unsafe_attribute(name: str) -> UnsafeModelError:
    """The error for an attribute that leads into the interpreter."""
    return UnsafeModelError(
        f"The model's chat template uses the attribute {name!r}, which leads out of its sandbox. "
        "Do not use this model, or pass rendered text as the prompt."
    )


def check_stored_name(name: object) -> None:
    """Refuse names in a namespace that start with an underscore, as transformers does."""
    if isinstance(name, str) and name.startswith("_"):
        raise unsafe_attribute(name)


def check_key(key: object) -> None:
    """Charge the hash of a key: that of a tuple visits all its parts."""
    if isinstance(key, tuple):
        METER.get().weigh(key)


def check_filter_name(name: object) -> None:
    """Refuse, where a template names a filter at run time (``map``), what it could not write."""
    if name not in FILTERS:
        raise ModelFormatError(f"The model's chat template uses an unknown filter {name!r}.")


# The four functions that are put into a template's syntax tree, as filters. jinja2 passes
# them the context first; filters that take it are never evaluated while compiling.


def pay(_context: object, units: int) -> bool:
    """Pay for a pass through a loop's or macro's body."""
    METER.get().charge(units)
    return True


def iterate(_context: object, value: Any) -> Any:
    """Pay for visiting the elements of ``value``."""
    return METER.get().iterate(value)


def operand(_context: object, value: Any) -> Any:
    """Pay for comparing or hashing ``value``."""
    meter = METER.get()
    if isinstance(value, Iterator):  # x in iterator
        return meter.iterate(value)
    meter.weigh(value)
    return value


def text(_context: object, value: Any) -> str:
    """Pay for ``value`` as text, and convert it."""
    meter = METER.get()
    meter.weigh(value)
    if isinstance(value, str):
        return value
    converted = str(value)
    meter.charge_text(len(converted))
    return converted


def apply_operator(function: Function, operator: str, left: Any, right: Any) -> Any:
    """``function(left, right)``, paid."""
    meter = METER.get()
    charge_operator(meter, operator, left, right)
    result = function(left, right)
    meter.charge_result(result)
    return result


def paid_filter(name: str, function: Function, passed: tuple[type, ...]) -> Function:
    """A filter that pays. ``passed``: types of what jinja2 passes before the value."""

    @functools.wraps(function)  # keeps jinja2's mark of what it passes
    def paid(*args: Any, **kwargs: Any) -> Any:
        meter = METER.get()
        first = args[:1] if isinstance(args[0], passed) else ()
        operands = charge_filter(meter, name, args[len(first) :], kwargs)
        result = function(*first, *operands, **kwargs)
        if isinstance(result, Iterator):
            # At once, and still an iterator: a chain of lazy ones would run, and be freed, as
            # deep as it is long, and overflow the stack of the process.
            result = iter(meter.take_all(result))
        meter.charge_result(result)
        return result

    return paid


def paid_test(function: Function, passed: tuple[type, ...]) -> Function:
    """A test (``x is y``) that pays; see `paid_filter`."""

    @functools.wraps(function)
    def paid(*args: Any, **kwargs: Any) -> Any:
        meter = METER.get()
        meter.charge(CALL)
        operands = args[1:] if isinstance(args[0], passed) else args
        # Tests of one value do not look into it, but for those of a text's case.
        if len(operands) > 1 or isinstance(operands[0], str):
            meter.weigh((operands, kwargs))
        return function(*args, **kwargs)

    return paid


class PaidFormatter(string.Formatter):
    """Goes before jinja2's sandboxed formatters: widths and conversions pay."""

    def format_field(self, value: Any, format_spec: str) -> Any:
        """Format one field."""
        meter = METER.get()
        meter.charge(CALL + meter.weigh(value))
        charge_format_spec(meter, format_spec)
        return super().format_field(value, format_spec)

    def convert_field(self, value: Any, conversion: Any) -> Any:
        """Apply ``!r`` or ``!s``."""
        METER.get().weigh(value)
        return super().convert_field(value, conversion)


class Format:
    """The method ``format`` or ``format_map`` of one string, through a sandboxed formatter."""

    def __init__(self, template: str, formatter: string.Formatter, *, is_map: bool) -> None:
        self._template = template
        self._formatter = formatter
        self._is_map = is_map

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        """The formatted text."""
        METER.get().charge(ELEMENT * len(self._template))
        if self._is_map:
            (kwargs,), args = args, ()
        return type(self._template)(self._formatter.vformat(self._template, args, kwargs))


class CallGuard:
    """Decides what a template may call, and charges it.

    Args:
        functions: Functions and classes that may be called.
        callables: Types whose instances may be called.
        owners: Types all of whose public methods may be called.
        bodies: Types that run template code when called (macros, recursive loops).
    """

    def __init__(
        self,
        functions: Mapping[str, object],
        *,
        callables: tuple[type, ...],
        owners: tuple[type, ...],
        bodies: tuple[type, ...],
    ) -> None:
        self._functions = frozenset(map(id, functions.values()))
        self._callables = callables
        self._owners = owners
        self._bodies = bodies

    def call(
        self,
        proceed: Function,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """``proceed(*args, **kwargs)``, which calls ``target``, if it may be called."""
        meter = METER.get()
        meter.charge(CALL + ELEMENT * (len(args) + len(kwargs)))
        if isinstance(target, self._bodies):
            return self._run_body(meter, proceed, args, kwargs)
        # jinja2 passes the variables of the loop around a call under these names.
        given = {key: kwargs[key] for key in kwargs if key not in {"_loop_vars", "_block_vars"}}
        if id(target) in self._functions or isinstance(target, self._callables):
            meter.weigh((args, given))
        elif not isinstance(target, MethodType | BuiltinMethodType):
            raise UnsafeModelError(
                f"The model's chat template calls a value of type {type(target).__name__!r}, "
                "which templates may not."
            )
        elif isinstance(target.__self__, self._owners):
            meter.weigh((args, given))
        else:
            args = charge_method(meter, target.__self__, target.__name__, args, given)
        result = proceed(*args, **kwargs)
        meter.charge_result(result)
        return result

    def _run_body(
        self, meter: Meter, proceed: Function, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run template code, which pays for itself, but for its depth and the loop's elements."""
        meter.depth += 1
        if meter.depth > MAX_CALL_DEPTH:
            raise exceeded("recursion", f"{MAX_CALL_DEPTH} calls")
        try:
            return proceed(*map(meter.iterate, args), **kwargs)
        finally:
            meter.depth -= 1
