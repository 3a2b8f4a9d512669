"""Guesses from the text itself: what followed the last few tokens where they stood before.

Summaries, edits and repairs repeat stretches of their prompt (Saxena 2023, prompt lookup
decoding). No model is needed, and a guess costs a look into a table.
"""

from __future__ import annotations

import numpy as np

from phirt.generation.history import TokenHistory
from phirt.generation.speculation import Draft
from phirt.types import IntArray

__all__ = ["PromptLookup"]

_SHORTEST = 2
_LONGEST = 16
_CANDIDATES = 8  # so many of the latest places are compared; a frequent pair has many
# By how many tokens agree: the kind, and how often a token after them was right at first.
_KINDS = ((2, 0.25), (3, 0.45), (4, 0.6), (6, 0.75), (10, 0.9))


class PromptLookup:
    """Finds the last place where the last tokens stood, and proposes what followed there."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, int], list[int]] = {}
        self._seen = 0

    def propose(self, history: TokenHistory, most: int) -> Draft:
        """What followed the longest of the latest matches, at most ``most`` tokens."""
        ids = history.token_ids
        self._update(ids)
        if ids.size <= _SHORTEST:
            return Draft(())
        # The last entry is the end of the history itself.
        ends = self._ends[int(ids[-2]), int(ids[-1])][:-1]
        if not ends:
            return Draft(())
        length, end = max((_agreement(ids, end), end) for end in ends[-_CANDIDATES:])
        kind, chance = [each for each in _KINDS if each[0] <= length][-1]
        following = ids[end : end + most].tolist()
        return Draft(following, kind, chance)

    def close(self) -> None:
        """Nothing to free."""

    def _update(self, ids: IntArray) -> None:
        """Bring the table of pairs up to date: where each pair ended, in order."""
        start = max(self._seen, _SHORTEST)
        tail = ids[start - _SHORTEST :].tolist()
        for offset in range(len(tail) - 1):
            end = start + offset
            self._ends.setdefault((tail[offset], tail[offset + 1]), []).append(end)
        self._seen = ids.size + 1


def _agreement(ids: IntArray, end: int) -> int:
    """How many tokens before ``end`` equal those before the end of the history."""
    count = min(_LONGEST, end)
    differ = np.flatnonzero(ids[end - count : end][::-1] != ids[ids.size - count :][::-1])
    return int(differ[0]) if differ.size else count
