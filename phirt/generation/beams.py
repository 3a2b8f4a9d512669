"""Beam search: which continuations are kept, which are finished, and when it ends.

Only scores enter here; whoever drives it runs the model and says which sequences have ended.
The rules are those of `transformers` 5.x (``GenerationMixin._beam_search``), for one prompt and
without sampling:

- A sequence's score is the sum of its tokens' processed log-probabilities.
- Each step ranks the ``(stop tokens + 1) * num_beams`` best continuations of all beams, at
  least ``2 * num_beams``. The best ``num_beams`` that have not ended go on.
- One that has ended is a hypothesis only if it is among the best ``num_beams`` of that ranking.
  Its score is divided by its generated tokens to the power of ``length_penalty``, and the best
  ``num_beams`` hypotheses are kept.

`transformers` fills places that no sequence takes (a vocabulary smaller than the ranking,
forbidden tokens) with scores of -1e9; here they stay empty, so that no such filler is returned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from phirt.types import IntArray

__all__ = ["Beam", "BeamSearch", "Continuations", "Hypothesis"]

Continuations: TypeAlias = tuple[IntArray, NDArray[np.float64]]
"""Token ids (c,) in ascending order that may follow a beam, and their log-probabilities (c,)."""


@dataclass(slots=True, eq=False)
class Beam:
    """A sequence of generated tokens: its last one, after those of its parent.

    Attributes:
        parent: The sequence without the last token; None for the prompt.
        row: Place of the parent among the beams that were running.
        token_id: The last token.
        score: Sum of the processed log-probabilities of its tokens.
        length: Generated tokens.
    """

    parent: Beam | None
    row: int
    token_id: int
    score: float
    length: int

    @property
    def token_ids(self) -> list[int]:
        """Its tokens, the first one first."""
        return [beam.token_id for beam in self.path]

    @property
    def path(self) -> list[Beam]:
        """The sequences that it grew from, each with one token more, and itself at the end."""
        path: list[Beam] = []
        beam = self
        while beam.parent is not None:
            path.append(beam)
            beam = beam.parent
        return path[::-1]


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A sequence that has ended.

    Attributes:
        beam: Its tokens.
        score: Its log-probability over its length to the power of the length penalty.
    """

    beam: Beam
    score: float


class BeamSearch:
    """The beams that go on and the hypotheses so far, from one step to the next.

    Args:
        num_beams: Sequences to keep at each step.
        max_new_tokens: Tokens after which every sequence ends.
        stop_tokens: How many tokens end a sequence: so many continuations of a beam may end
            at once, and others must be left to go on.
        length_penalty: Power of the length that scores are divided by.
        early_stopping: See `phirt.GenerationParams`.

    Attributes:
        running: The beams that go on, best first; at first the prompt alone.
        hypotheses: The sequences that have ended, best first.
        is_done: Whether nothing that could go on would change the hypotheses, by the rule that
            ``early_stopping`` chose.
    """

    def __init__(
        self,
        *,
        num_beams: int,
        max_new_tokens: int,
        stop_tokens: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool | Literal["never"] = False,
    ) -> None:
        self._num_beams = num_beams
        self._max_new_tokens = max_new_tokens
        self._length_penalty = length_penalty
        self._early_stopping = early_stopping
        self._ranked = max(2, 1 + stop_tokens) * num_beams
        self.running = [Beam(None, 0, -1, 0.0, 0)]
        self.hypotheses: list[Hypothesis] = []
        self.is_done = False

    @property
    def ranked(self) -> int:
        """How many continuations a step ranks: more of one beam are of no use."""
        return self._ranked

    def candidates(self, continuations: Sequence[Continuations]) -> list[Beam]:
        """The best continuations of all beams, best first; of equal ones the first beam's.

        Args:
            continuations: What may follow each of ``running``. Forbidden tokens are left out,
                so that there may be none.
        """
        scores = np.concatenate(
            [
                beam.score + log_probs
                for beam, (_, log_probs) in zip(self.running, continuations, strict=True)
            ]
        )
        tokens = np.concatenate([ids for ids, _ in continuations])
        rows = np.repeat(np.arange(len(continuations)), [ids.size for ids, _ in continuations])
        best = np.argsort(-scores, kind="stable")[: self._ranked]
        length = self.running[0].length + 1
        return [
            Beam(self.running[row], row, token, score, length)
            for row, token, score in zip(
                rows[best].tolist(), tokens[best].tolist(), scores[best].tolist(), strict=True
            )
        ]

    def advance(self, candidates: Sequence[Beam], ended: Sequence[bool]) -> None:
        """Take one step.

        Args:
            candidates: What `candidates` gave for it.
            ended: Which of them have come to a stop.
        """
        for beam, has_ended in zip(candidates[: self._num_beams], ended, strict=False):
            if has_ended:
                score = self._normalized(beam.score, beam.length)
                self.hypotheses.append(Hypothesis(beam, score))
        self.hypotheses.sort(key=lambda hypothesis: -hypothesis.score)
        del self.hypotheses[self._num_beams :]
        going = [beam for beam, has_ended in zip(candidates, ended, strict=True) if not has_ended]
        self.running = going[: self._num_beams]
        self.is_done = not self.running or not self._can_improve()

    def _can_improve(self) -> bool:
        if len(self.hypotheses) < self._num_beams:
            return True
        if self._early_stopping is True:
            return False
        best = self.running[0]
        length = best.length
        if self._early_stopping == "never" and self._length_penalty > 0:
            length = self._max_new_tokens
        return self._normalized(best.score, length) > self.hypotheses[-1].score

    def _normalized(self, score: float, length: int) -> float:
        # A power out of the range of numbers makes every score 0 or -inf, and is no error.
        with np.errstate(all="ignore"):
            return float(np.float64(score) / np.float64(length) ** self._length_penalty)
