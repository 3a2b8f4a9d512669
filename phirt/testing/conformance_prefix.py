"""Requests go on from the caches of earlier ones, and say what they would say without."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from phirt.generation.loop import DecodeLoop
from phirt.generation.params import GenerationParams
from phirt.generation.params_resolved import GenerationDefaults
from phirt.generation.prefix import PrefixCache
from phirt.testing.subject import Subject, check_greedy, random_ids

__all__ = ["PrefixConformance"]

_NEW = 6
# On either side of LongRoPE's boundary of 32, and across it.
_TURNS = {"short": (17, 3), "long": (40, 7), "across": (18, 12)}


class PrefixConformance:
    """`phirt.generation.prefix.PrefixCache` over sessions of the backend."""

    @pytest.fixture
    def prefixes(self) -> Iterator[PrefixCache]:
        """An empty cache with room for all that a test does."""
        cache = PrefixCache(capacity_bytes=1 << 30, bytes_per_token=1)
        yield cache
        cache.close()

    @pytest.mark.parametrize("turns", list(_TURNS))
    def test_a_chat(self, subject: Subject, prefixes: PrefixCache, turns: str) -> None:
        """Each turn repeats all before it."""
        first, more = _TURNS[turns]
        prompt = random_ids(first, seed=70)
        for turn in range(2):
            loop = _generate(subject, prefixes, prompt, f"turn {turn}")
            if turn and _can_reuse(subject) and turns != "across":
                cached = loop.usage.cached_tokens
                # The last token that a turn generated was never run.
                held = len(prompt) - more - 1
                subject.check(cached == held, f"turn {turn}: {cached} cached tokens, not {held}")
            prompt = prompt + loop.generated_ids + random_ids(more, seed=80 + turn)

    def test_a_shared_beginning(self, subject: Subject, prefixes: PrefixCache) -> None:
        """Two prompts share a beginning, in turn; neither meets the other's tokens."""
        shared = random_ids(24, seed=71)
        prompts = [shared + random_ids(6, seed=90 + index) for index in range(2)]
        for turn in range(4):
            _generate(subject, prefixes, prompts[turn % 2], f"request {turn}")

    def test_a_long_difference_is_copied(self, subject: Subject, prefixes: PrefixCache) -> None:
        """A prompt that shares little with a long one leaves it its cache, where caches move."""
        context = subject.model.info.context_length
        shared = random_ids(24, seed=72)
        long = shared + random_ids(min(90, context - 24 - _NEW), seed=73)
        _generate(subject, prefixes, long, "the long one")
        _generate(subject, prefixes, [*shared, *random_ids(4, seed=74)], "the short one")
        again = _generate(subject, prefixes, long, "the long one again")
        if _can_reuse(subject) and subject.model.capabilities.kv and len(long) - 24 >= 64:
            cached = again.usage.cached_tokens
            wanted = len(long) - 2
            subject.check(cached == wanted, f"{cached} cached tokens, not {wanted}")


def _can_reuse(subject: Subject) -> bool:
    model = subject.model
    if model.info.window is not None or not model.capabilities.truncate:
        return False
    with subject.session(2) as session:
        session.prefill([1])
        return session.can_extend


def _generate(subject: Subject, prefixes: PrefixCache, prompt: list[int], what: str) -> DecodeLoop:
    """A greedy request, held against the oracle's logits."""
    loop = DecodeLoop(
        subject.model,
        prompt,
        GenerationParams(max_new_tokens=_NEW, ignore_eos=True, temperature=0),
        defaults=GenerationDefaults(),
        prefixes=prefixes,
    )
    ids = prompt + [step.token_id for step in loop]
    faults = check_greedy(
        subject.oracle.logits,
        ids,
        prompt_length=len(prompt),
        rope_boundary=subject.oracle.info.rope_boundary,
        tolerance=2 * subject.tolerance,  # Either of two logits may be off by one.
    )
    subject.check(not faults, f"{what} with {len(prompt)} tokens: {'; '.join(faults)}")
    return loop
