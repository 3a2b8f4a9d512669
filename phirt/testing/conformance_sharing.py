"""Requests that run at once share their steps, and say what they say alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from phirt.generation.loop import DecodeLoop
from phirt.generation.params import GenerationParams
from phirt.generation.params_resolved import GenerationDefaults
from phirt.generation.sharing import SharedModel, can_share
from phirt.testing.subject import Subject, check_greedy, random_ids

__all__ = ["SharingConformance"]

_NEW = 16
_LENGTHS = (3, 10, 18, 26, 36, 45)  # on either side of LongRoPE's boundary of 32


class SharingConformance:
    """`phirt.generation.sharing.SharedModel` over pools of the backend."""

    def test_six_at_once(self, subject: Subject) -> None:
        """Sequences of different lengths, which join and leave in between."""
        if not can_share(subject.model):
            pytest.skip("declared lack: its requests cannot share steps")
        shared = SharedModel(subject.model)
        prompts = [random_ids(length, seed=110 + length) for length in _LENGTHS]

        def run(prompt: list[int]) -> list[int]:
            loop = DecodeLoop(
                shared,
                prompt,
                GenerationParams(max_new_tokens=_NEW, ignore_eos=True, temperature=0),
                defaults=GenerationDefaults(),
            )
            return prompt + [step.token_id for step in loop]

        with ThreadPoolExecutor(len(prompts)) as pool:
            found = list(pool.map(run, prompts))
        shared.rows.close_if_empty()
        for prompt, ids in zip(prompts, found, strict=True):
            faults = check_greedy(
                subject.oracle.logits,
                ids,
                prompt_length=len(prompt),
                rope_boundary=subject.oracle.info.rope_boundary,
                tolerance=2 * subject.tolerance,  # Either of two logits may be off by one.
            )
            subject.check(not faults, f"{len(prompt)} tokens beside others: {'; '.join(faults)}")
