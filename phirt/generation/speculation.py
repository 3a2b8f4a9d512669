"""Speculative decoding: several tokens are guessed, and one call of the model judges them all.

The loop chooses each token as ever, from the logits of its position; a guess that it did choose
makes the logits after it valid, which the same call computed. So every token is the
target's own choice, greedy or sampled with the request's own random numbers, and its
distribution is the target's whatever the guesses were. For a guess that is certain,
such as those made here, that is speculative sampling (Leviathan et al. 2023, arXiv:2211.17192):
both accept it with the probability that the target gives it.

How long a guess may be is reckoned from what calls of each length were seen to cost and from how
often guesses held. A ledger keeps text that no guess fits from costing more than a small part
of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from phirt.generation.history import TokenHistory
from phirt.types import FloatArray, IntArray

__all__ = ["DRAFT_TOKENS", "Draft", "Drafter", "Speculation", "StepCosts"]

DRAFT_TOKENS = 8
"""Most tokens of a guess, where nobody says."""

_CREDIT = 1.5
"""Decode steps that a request may lose to guesses before any of them held."""

_ALLOWANCE = 0.01
"""The part of its steps that it may lose beyond that."""

_MOST_CREDIT = 8.0
"""Decode steps; text that went well for long does not pay for as much that goes badly."""

_WORTHWHILE = 1.03
"""Least tokens per cost of a decode step that a guess must promise."""

_UNKNOWN_SLOPE = 0.5
"""Cost of a further token in a call, in decode steps, before any such call was seen."""

_RECENT = 0.2
"""Weight of the newest time in the averages."""

_PRIOR_TOKENS = 4.0
"""How many guessed tokens the first estimate of a chance counts for."""

_DECAY = 0.95


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens that may come next.

    Attributes:
        token_ids: They, in order; empty for no guess.
        kind: Which guesses it is like: chances are kept by it.
        chance: Probability that each token holds if those before it do, for a kind of which
            none was judged yet.
    """

    token_ids: Sequence[int]
    kind: int = 0
    chance: float = 0.7


class Drafter(Protocol):
    """Guesses what comes next."""

    def propose(self, history: TokenHistory, most: int) -> Draft:
        """A guess of at most ``most`` tokens after the history."""

    def close(self) -> None:
        """Free what it holds. Calling it again does nothing."""


class StepCosts:
    """What calls of a model cost, by how many tokens they run; shared by its requests.

    Times of one machine, updated without a lock: a lost update loses one measurement.
    """

    def __init__(self) -> None:
        self._decode_s: float | None = None
        self._ratios: dict[int, float] = {1: 1.0}

    @property
    def is_known(self) -> bool:
        """Whether a decode step was timed."""
        return self._decode_s is not None

    def ratio(self, count: int) -> float:
        """Cost of a call of ``count`` tokens, in decode steps."""
        known = sorted(self._ratios.items())
        if len(known) == 1:
            return 1 + _UNKNOWN_SLOPE * (count - 1)
        counts = [each[0] for each in known]
        ratios = [each[1] for each in known]
        if count <= counts[-1]:
            return float(np.interp(count, counts, ratios))
        # Along the line from one token to the most that was ever run at once.
        slope = (ratios[-1] - 1) / (counts[-1] - 1)
        return 1 + slope * (count - 1)

    def decoded(self, seconds: float) -> None:
        """A decode step took so long."""
        before = self._decode_s
        self._decode_s = seconds if before is None else before + _RECENT * (seconds - before)

    def verified(self, count: int, seconds: float) -> float:
        """A call of ``count`` tokens took so long; returns that in decode steps."""
        assert self._decode_s is not None  # noqa: S101 - no guess is made before
        ratio = seconds / self._decode_s
        before = self._ratios.get(count, ratio)
        # Never cheaper than a step, however the clock fell.
        self._ratios[count] = max(before + _RECENT * (ratio - before), 1.0)
        return ratio


@dataclass(slots=True)
class _Chance:
    """How often guessed tokens of a kind held, the recent ones counting more."""

    held: float
    judged: float

    @property
    def value(self) -> float:
        return self.held / self.judged

    def update(self, held: int, judged: int) -> None:
        self.held = _DECAY * self.held + held
        self.judged = _DECAY * self.judged + judged


@dataclass(frozen=True, slots=True)
class _Ahead:
    """A guess that was run.

    Attributes:
        rows: Logits after the last token before it and after each of its tokens.
        draft: It.
        start: Length of the history when it was run.
        cost: What the call cost, in decode steps.
    """

    rows: FloatArray
    draft: Draft
    start: int
    cost: float

    def held(self, token_ids: IntArray) -> int:
        """How many of its tokens the history took."""
        drafted = np.asarray(self.draft.token_ids)
        taken = token_ids[self.start : self.start + drafted.size]
        differ = np.flatnonzero(taken != drafted[: taken.size])
        return int(differ[0]) if differ.size else taken.size


class Speculation:
    """The guesses of one request: how long they are, and the logits that they gave.

    Args:
        drafter: Makes the guesses.
        costs: What calls of the target cost.
        most: Most tokens of a guess.
    """

    def __init__(self, drafter: Drafter, costs: StepCosts, *, most: int) -> None:
        self._drafter = drafter
        self._costs = costs
        self._most = most
        self._credit = _CREDIT
        self._chances: dict[int, _Chance] = {}
        self._ahead: _Ahead | None = None
        self.drafted_tokens = 0
        """Tokens guessed and run so far."""
        self.accepted_tokens = 0
        """Those of them that the request took."""

    def pending(self, history: TokenHistory) -> FloatArray | None:
        """Logits of the next position, if a guess already gave them."""
        ahead = self._ahead
        if ahead is None:
            return None
        position = len(history) - ahead.start
        if position < len(ahead.rows) and ahead.held(history.token_ids) == position:
            row: FloatArray = ahead.rows[position]
            return row
        return None

    def draft(self, history: TokenHistory, *, room: int) -> Draft | None:
        """A guess that is worth running, or None.

        Args:
            history: The request's tokens.
            room: Most tokens that there is room for.
        """
        most = min(self._most, room)
        if most < 1 or not self._costs.is_known:
            return None
        draft = self._drafter.propose(history, most)
        most = min(most, len(draft.token_ids))
        length = self._best_length(self._chance_of(draft).value, most)
        if length == 0:
            return None
        return Draft(draft.token_ids[:length], draft.kind, draft.chance)

    def decoded(self, seconds: float) -> None:
        """A step without a guess took so long."""
        self._costs.decoded(seconds)
        self._earn(_ALLOWANCE)

    def verified(self, draft: Draft, rows: FloatArray, *, start: int, seconds: float) -> None:
        """A guess was run.

        Args:
            draft: It.
            rows: Logits after the token before it and after each of its tokens, (n + 1, vocab).
            start: Length of the history, the token before it included.
            seconds: How long the call took, the making of the guess included.
        """
        cost = self._costs.verified(len(draft.token_ids) + 1, seconds)
        self._ahead = _Ahead(rows, draft, start, cost)

    def drop(self, history: TokenHistory, length: int) -> int:
        """Be done with a guess: book what it cost and brought.

        Args:
            history: The request's tokens.
            length: Tokens that the session holds.

        Returns:
            How many of them are the history's: those after are guesses that did not hold.
        """
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return length
        held, count = ahead.held(history.token_ids), len(ahead.draft.token_ids)
        self._chance_of(ahead.draft).update(held, min(held + 1, count))
        self.drafted_tokens += count
        self.accepted_tokens += held
        self._earn(held + 1 - ahead.cost + _ALLOWANCE * (held + 1))
        return min(length, ahead.start + held)

    def _earn(self, steps: float) -> None:
        self._credit = min(self._credit + steps, _MOST_CREDIT)

    def _chance_of(self, draft: Draft) -> _Chance:
        if draft.kind not in self._chances:
            self._chances[draft.kind] = _Chance(draft.chance * _PRIOR_TOKENS, _PRIOR_TOKENS)
        return self._chances[draft.kind]

    def _best_length(self, chance: float, most: int) -> int:
        """The length that promises the most tokens per cost; 0 where none is worth its risk."""
        best, best_rate = 0, _WORTHWHILE
        expected, power = 1.0, 1.0
        for length in range(1, most + 1):
            cost = self._costs.ratio(length + 1)
            if cost - 1 > self._credit:
                break
            power *= chance
            expected += power  # 1 + p + p^2 + …: a token of the target's own, and what holds
            if expected / cost > best_rate:
                best, best_rate = length, expected / cost
        return best
