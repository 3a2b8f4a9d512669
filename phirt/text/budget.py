"""What rendering a chat template may cost.

A template is part of a model, and so untrusted: it may ask for ``'a' * 10**10``, loop a
billion times, or compare lists that share parts a hundred levels deep. Every operation
of a render is charged to one `Meter` *before* it is carried out, at its size; the sum is
bounded, and with it time and memory, without clocks, threads or signals.

One unit of work is about one character copied. Everything else is priced in it, by
measurement: a node of the template 20, a call 200, an element of a container 16. The budgets grow
with the messages, which are the caller's own, so that long chats render.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sized
from typing import Any

from phirt.errors import UnsafeModelError

__all__ = [
    "CALL",
    "ELEMENT",
    "MAX_CALL_DEPTH",
    "MAX_ITEMS",
    "MAX_NESTING",
    "NODE",
    "Meter",
    "exceeded",
]

NODE = 20
CALL = 200
ELEMENT = 16

MAX_ITEMS = 100_000
"""Most elements of one list; also jinja2's own bound on a range."""
MAX_NESTING = 64
"""Deepest nesting of lists and dictionaries."""
MAX_CALL_DEPTH = 64
"""Deepest recursion of macros and recursive loops."""

_BASE_WORK = 12_000_000
_WORK_PER_UNIT = 64
_BASE_TEXT = 1_000_000
_TEXT_PER_UNIT = 8
_MAX_INT_BITS = 1024

_CONTAINERS: tuple[type, ...] = (
    *(list, tuple, dict, set, frozenset),
    *(type({}.keys()), type({}.values()), type({}.items())),
)


def exceeded(budget: str, limit: str) -> UnsafeModelError:
    """The error for a template that asks for more than ``limit`` of ``budget``."""
    return UnsafeModelError(
        f"The model's chat template exceeds its budget of {budget} ({limit}). A real template "
        "needs a small part of that; pass rendered text as the prompt, or use another template."
    )


class Meter:
    """Counts the work of one render and refuses what exceeds its budgets.

    Args:
        variables: What the template is given; the budgets of work and text grow with its size.
    """

    def __init__(self, variables: object) -> None:
        self._work = self._left = 1 << 62
        size = self.weigh(variables)
        self._work = self._left = _BASE_WORK + _WORK_PER_UNIT * size
        self.max_text = _BASE_TEXT + _TEXT_PER_UNIT * size
        self.depth = 0

    def charge(self, units: int) -> None:
        """Spend work.

        Raises:
            UnsafeModelError: The budget of work is spent.
        """
        if units > 0:  # 'a' * -5 costs nothing; it must not earn anything either
            self._left -= units
        if self._left < 0:
            raise exceeded("work", f"{self._work:,} units")

    def charge_text(self, length: int) -> None:
        """Spend the work of making a string of ``length`` characters, which is bounded, too."""
        if length > self.max_text:
            raise exceeded("text size", f"{self.max_text:,} characters")
        self.charge(length)

    def check_output(self, length: int) -> None:
        """Refuse output that has become too long, at ``length`` characters."""
        if length > self.max_text:
            raise exceeded("output", f"{self.max_text:,} characters")

    def charge_items(self, length: int) -> None:
        """Spend the work of making a list of ``length`` elements, which is bounded, too."""
        if length > MAX_ITEMS:
            raise exceeded("list size", f"{MAX_ITEMS:,} elements")
        self.charge(length * ELEMENT)

    def take_all(self, iterator: Iterator[Any]) -> list[Any]:
        """The elements of an iterator, of which there may be as many as in a list."""
        taken = list(itertools.islice(iterator, MAX_ITEMS + 1))
        self.charge_items(len(taken))
        return taken

    def charge_result(self, value: object) -> None:
        """Spend the work of what an operation returned: its own size, not that of its parts."""
        if isinstance(value, str):
            self.charge_text(len(value))
        elif isinstance(value, int):
            self.check_int(value)
        elif isinstance(value, list | tuple | dict):
            # Three times: the elements may be new objects (the parts of a split text).
            self.charge(3 * ELEMENT * len(value))

    def check_int(self, value: int) -> None:
        """Refuse integers whose arithmetic is not about constant in cost."""
        if value.bit_length() > _MAX_INT_BITS:
            raise exceeded("integer size", f"{_MAX_INT_BITS:,} bits")

    def check_power(self, base: int, exponent: int) -> None:
        """Refuse a power that is too large, without computing it."""
        if abs(base) > 1 and base.bit_length() * exponent > 2 * _MAX_INT_BITS:
            raise exceeded("integer size", f"{_MAX_INT_BITS:,} bits")

    def iterate(self, value: Any, cost: int = ELEMENT) -> Any:
        """Charge a pass over ``value``, ``cost`` for each element, and return it.

        What has a length pays at once. An iterator pays as it goes: the result then replaces it.
        """
        if isinstance(value, Iterator) and not isinstance(value, Sized):
            return self._counted(value, cost)
        if isinstance(value, Sized):
            self.charge(len(value) * cost)
        return value

    def _counted(self, iterator: Iterator[Any], cost: int) -> Iterator[Any]:
        for item in iterator:
            self.charge(cost)
            yield item

    def weigh(self, value: Any) -> int:
        """Charge a value with all its parts, as converting or comparing it visits them.

        Shared parts count each time they are reached: ``x = [x, x]``, repeated, doubles.

        Returns:
            Units: about the length of the value as text.
        """
        if isinstance(value, str):
            self.charge(len(value))
            return len(value) + 1
        total = 0
        level: list[Any] = [value]
        for _ in range(MAX_NESTING):
            below: list[Any] = []
            for item in level:
                units = ELEMENT
                parts = _parts(item)
                if isinstance(item, str):
                    units += len(item)
                elif isinstance(item, range):
                    units += ELEMENT * len(item)
                elif isinstance(item, int):
                    self.check_int(item)
                elif parts is not None:
                    units += ELEMENT * len(parts)
                total += units
                self.charge(units)
                if isinstance(parts, Mapping):
                    below.extend(parts.keys())
                    below.extend(parts.values())
                elif parts is not None:
                    below.extend(parts)
            if not below:
                return total
            level = below
        raise exceeded("nesting", f"{MAX_NESTING} levels")


def _parts(value: object) -> Any:
    """The elements of a container, or None."""
    if isinstance(value, _CONTAINERS):
        return value
    # The template's namespaces hide their contents from attribute access on purpose.
    contents = getattr(type(value), "budget_contents", None)
    return None if contents is None else contents(value)
