"""Guesses that a call judges change nothing in what is generated."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from phirt.errors import UnsupportedParameterError
from phirt.generation.history import TokenHistory
from phirt.generation.loop import DecodeLoop
from phirt.generation.params import GenerationParams
from phirt.generation.params_resolved import GenerationDefaults
from phirt.generation.speculation import Draft
from phirt.testing.subject import Subject, check_greedy, random_ids

__all__ = ["SpeculationConformance"]

_NEW = 24  # tokens; from a prompt of 20 they cross LongRoPE's boundary of 32


class SpeculationConformance:
    """The decode loop over ``verify`` and ``truncate``."""

    @pytest.mark.parametrize("length", [20, 33])
    @pytest.mark.parametrize("right", [0, 1, 3], ids=lambda right: f"{right} of 3 hold")
    def test_guesses(self, subject: Subject, length: int, right: int) -> None:
        """Each token is the oracle's best, whichever guesses hold."""
        prompt = random_ids(length, seed=100 + length)
        model = subject.model
        if not (model.capabilities.verify and model.capabilities.truncate) or model.info.window:
            with pytest.raises(UnsupportedParameterError):
                _loop(subject, prompt, _Guesses([], right))
            return
        plain = [step.token_id for step in _loop(subject, prompt, None)]
        guesses = _Guesses(prompt + plain, right)
        loop = _loop(subject, prompt, guesses)
        ids = prompt + [step.token_id for step in loop]
        subject.check(len(ids) == length + _NEW, f"{len(ids) - length} tokens, not {_NEW}")
        faults = check_greedy(
            subject.oracle.logits,
            ids,
            prompt_length=length,
            rope_boundary=subject.oracle.info.rope_boundary,
            tolerance=2 * subject.tolerance,  # Either of two logits may be off by one.
        )
        subject.check(not faults, f"{right} of 3 guesses hold: {'; '.join(faults)}")
        subject.check(guesses.asked > 0, "nothing was guessed")


class _Guesses:
    """Continues with what is known to come, and wrongly after the first few tokens."""

    def __init__(self, known: Sequence[int], right: int) -> None:
        self._known = known
        self._right = right
        self.asked = 0

    def propose(self, history: TokenHistory, most: int) -> Draft:
        self.asked += 1
        length = len(history)
        drafted = list(self._known[length : length + min(most, 3)])
        for index in range(self._right, len(drafted)):
            drafted[index] = (drafted[index] + 1) % 100
        return Draft(drafted, chance=0.99)

    def close(self) -> None:
        """Nothing to free."""


def _loop(subject: Subject, prompt: list[int], drafter: _Guesses | None) -> DecodeLoop:
    return DecodeLoop(
        subject.model,
        prompt,
        GenerationParams(max_new_tokens=_NEW, ignore_eos=True, temperature=0),
        defaults=GenerationDefaults(),
        drafter=drafter,
    )
