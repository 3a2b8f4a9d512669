"""Stop strings: text that ends a generation and is not part of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence

__all__ = ["StopStrings"]


class _Pattern:
    """Knuth-Morris-Pratt matcher of one stop string.

    ``length`` is the length of the longest prefix of the stop string that ends the text
    read so far. Following failure links keeps progress on a mismatch, so that "aab" is
    found in "aaab", at amortised constant cost per character.
    """

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.length = 0
        self._failure = [0] * (len(stop) + 1)
        length = 0
        for index in range(1, len(stop)):
            while length and stop[index] != stop[length]:
                length = self._failure[length]
            length += stop[index] == stop[length]
            self._failure[index + 1] = length

    def add(self, char: str) -> bool:
        """Read one character; True if the stop string ends here."""
        length = self.length
        if length == len(self.stop):
            length = self._failure[length]
        while length and char != self.stop[length]:
            length = self._failure[length]
        self.length = length + (char == self.stop[length])
        return self.length == len(self.stop)


class StopStrings:
    """Finds stop strings in text that arrives in pieces, however it is cut.

    The match that starts earliest wins; of two that start together, the shorter. The
    text before it is emitted, the stop string and what follows are not. Text that may
    still become (part of) a stop string is held back until that is decided, so that no
    prefix of a stop string leaks. A match is therefore reported only once no longer stop
    string that began earlier can still complete; if the text ends before that is known,
    `flush` decides it.

    Args:
        stops: The stop strings, each at least one character long; there may be none.

    Raises:
        TypeError: ``stops`` is a single string, or holds something else than strings.
        ValueError: A stop string is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str):
            raise TypeError(f"stops must be a list of strings, not the string {stops!r}.")
        for stop in stops:
            if not isinstance(stop, str):
                raise TypeError(f"A stop string must be a str, not {type(stop).__name__}.")
            if not stop:
                raise ValueError("A stop string must not be empty: it would stop at once.")
        # By length, so that of two matches that start together the shorter is seen first.
        self._patterns = [_Pattern(stop) for stop in sorted(set(stops), key=len)]
        self._held = ""
        self._candidate: tuple[int, str] | None = None
        self._matched: str | None = None

    @property
    def matched(self) -> str | None:
        """The stop string that was found, or None."""
        return self._matched

    @property
    def held(self) -> str:
        """The text that may belong to a stop string and was not shown yet."""
        return self._held

    def add(self, text: str) -> tuple[str, str | None]:
        """Read a piece of text.

        Returns:
            The text that may be shown now, and the stop string that was found, or None.
            Once one is found, later calls return an empty text and the same stop string.
        """
        if self._matched is not None:
            return "", self._matched
        if not self._patterns:
            return text, None
        begin = len(self._held)
        self._held += text
        for end in range(begin, len(self._held)):
            self._step(end)
            if (
                self._candidate is not None
                and self._earliest_partial(end + 1) >= self._candidate[0]
            ):
                return self._finish(), self._matched
        keep = self._earliest_partial(len(self._held))
        if self._candidate is not None:
            keep = min(keep, self._candidate[0])
        emit, self._held = self._held[:keep], self._held[keep:]
        if self._candidate is not None:
            self._candidate = (self._candidate[0] - keep, self._candidate[1])
        return emit, None

    def flush(self) -> str:
        """The text still held back, up to a match if there is one; see `matched`."""
        if self._candidate is not None:
            return self._finish()
        emit, self._held = self._held, ""
        return emit

    def copy(self) -> StopStrings:
        """The same state, to be continued with other text."""
        other: StopStrings = copy.copy(self)
        other._patterns = [copy.copy(pattern) for pattern in self._patterns]
        return other

    def _step(self, end: int) -> None:
        """Read the held character at ``end`` and keep the best complete match."""
        char = self._held[end]
        for pattern in self._patterns:
            if pattern.add(char):
                start = end + 1 - len(pattern.stop)
                if self._candidate is None or start < self._candidate[0]:
                    self._candidate = (start, pattern.stop)

    def _earliest_partial(self, end: int) -> int:
        """Where the earliest stop string begins that may be under way at ``end``.

        A complete one counts too: its overlap with itself starts no earlier than it does.
        """
        return end - max(pattern.length for pattern in self._patterns)

    def _finish(self) -> str:
        assert self._candidate is not None  # noqa: S101 - callers checked; for the type checker
        start, self._matched = self._candidate
        emit, self._held = self._held[:start], ""
        self._candidate = None
        return emit
