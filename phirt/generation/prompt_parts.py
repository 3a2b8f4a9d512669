"""How long the parts are in which a prompt is computed while other sequences are generating."""

from __future__ import annotations

__all__ = ["PromptParts"]

_STEPS = 1.5
"""How many steps of the others a part may take.

A stream that runs meanwhile waits for a step and a part, 2.5 steps, and the new prompt takes
2.5 / 1.5 of the time that parts of this length take by themselves.
"""

_SMALLEST = 2
"""Tokens; one token runs with another kernel."""

_FIRST = 4
"""Tokens of a part before it is known what a part costs."""

_RECENT = 0.3
"""Weight of the newest part in the averages."""

_MOST = 3.0
"""How many times what recent parts took a part may count as."""

_TELLING = 0.25
"""Variance of the lengths, in tokens squared, from which on they tell what a token costs."""


class PromptParts:
    """Learns from the parts of prompts how many tokens the next one may have.

    A part costs some time however short it is, for the weights are read, and some more for each
    token. The line through the recent parts, of which older ones count less, gives both. Whole
    prompts do not count: their tokens cost less.
    """

    def __init__(self) -> None:
        # Averages over the parts: length, time, length squared, length by time.
        self._length = self._time = self._squares = self._products = 0.0
        self._token_s: float | None = None

    def size(self, remaining: int, *, step_s: float) -> int:
        """How many tokens run at once.

        Args:
            remaining: Tokens that are left of the prompt.
            step_s: Recent time of a step of the others, in seconds.
        """
        size, spare_s = _FIRST, _STEPS * step_s - self._time
        if self._token_s is not None:
            wanted = self._length + spare_s / self._token_s
            size = max(round(min(wanted, 2 * self._length)), _SMALLEST)
        elif self._length:
            # One length says nothing of what a token costs: a second one does.
            size = 2 * _FIRST if spare_s > 0 else _SMALLEST
        # Never a rest of one, which runs with another kernel.
        return remaining if size >= remaining - 1 else size

    def took(self, count: int, seconds: float) -> None:
        """A part of so many tokens took so long."""
        if count < _SMALLEST or seconds <= 0:
            return  # of another kernel, or of a clock that did not tick
        weight = 1.0
        if self._length:
            weight = _RECENT
            # One stall, of whatever else the machine does, would make many parts short.
            seconds = min(seconds, _MOST * self._time * max(1.0, count / self._length))
        self._length += weight * (count - self._length)
        self._time += weight * (seconds - self._time)
        self._squares += weight * (count * count - self._squares)
        self._products += weight * (count * seconds - self._products)
        variance = self._squares - self._length**2
        if variance > _TELLING:
            slope = (self._products - self._length * self._time) / variance
            each = self._time / self._length
            slope = min(max(slope, 0.1 * each), each)
            self._token_s = slope if self._token_s is None else (self._token_s + slope) / 2
