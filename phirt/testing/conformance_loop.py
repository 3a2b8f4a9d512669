"""The backend under phirt's own decode loop: greedy answers, threads, and bad input."""

from __future__ import annotations

import threading

import pytest

from phirt.errors import ContextLengthError
from phirt.generation.loop import DecodeLoop
from phirt.generation.params import GenerationParams
from phirt.generation.params_resolved import GenerationDefaults
from phirt.testing.subject import Subject, check_greedy, random_ids

__all__ = ["LoopConformance"]

_NEW = 24  # tokens; from a prompt of 20 they cross LongRoPE's boundary of 32


class LoopConformance:
    """`phirt.generation.loop.DecodeLoop` sees the same model on every backend."""

    @pytest.mark.parametrize("length", [1, 20, 33])
    def test_greedy(self, subject: Subject, length: int) -> None:
        """Every token is the oracle's best, but where two are as good as equal."""
        prompt = random_ids(length, seed=40 + length)
        ids = prompt + generate(subject, prompt)
        subject.check(len(ids) == length + _NEW, f"{len(ids) - length} tokens, not {_NEW}")
        faults = check_greedy(
            subject.oracle.logits,
            ids,
            prompt_length=length,
            rope_boundary=subject.oracle.info.rope_boundary,
            tolerance=2 * subject.tolerance,  # Either of two logits may be off by one.
        )
        subject.check(not faults, f"greedy from {length} tokens: {'; '.join(faults)}")

    def test_eight_threads(self, subject: Subject) -> None:
        """Each answer is what it is alone (row L1)."""
        prompts = [random_ids(10 + 5 * number, seed=50 + number) for number in range(8)]
        alone = [generate(subject, prompt) for prompt in prompts]
        together: list[list[int] | None] = [None] * len(prompts)

        def run(number: int) -> None:
            together[number] = generate(subject, prompts[number])

        threads = [threading.Thread(target=run, args=(number,)) for number in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
        subject.check(together == alone, f"on eight threads: {together}, alone: {alone}")

    def test_cancel_from_another_thread(self, subject: Subject) -> None:
        """The loop ends within a step, and the next one works (row L2)."""
        loop = DecodeLoop(
            subject.model,
            random_ids(33, seed=60),
            GenerationParams(ignore_eos=True, temperature=0),
            defaults=GenerationDefaults(),
        )
        loop.step()
        thread = threading.Thread(target=loop.cancel)
        thread.start()
        thread.join(timeout=120)
        rest = list(loop)
        subject.check(loop.finish_reason == "cancelled", f"finish_reason {loop.finish_reason!r}")
        subject.check(not rest, f"{len(rest)} tokens came after cancel() had returned")
        subject.check(len(generate(subject, [1, 2, 3])) == _NEW, "the next loop is cut short")

    def test_a_prompt_longer_than_the_context(self, subject: Subject) -> None:
        """An error with both lengths, before the backend is called (row L7)."""
        context = subject.model.info.context_length
        with pytest.raises(ContextLengthError) as caught:
            generate(subject, random_ids(context + 1))
        found = (caught.value.required, caught.value.available)
        subject.check(found == (context + 1 + _NEW, context), f"the error says {found}")

    def test_a_context_filled_to_its_end(self, subject: Subject) -> None:
        """The last token of the context is generated, and no more is asked for."""
        context = subject.model.info.context_length
        prompt = random_ids(context - 3, seed=61)
        loop = DecodeLoop(
            subject.model,
            prompt,
            GenerationParams(ignore_eos=True, temperature=0),
            defaults=GenerationDefaults(),
        )
        ids = prompt + [step.token_id for step in loop]
        subject.check(len(ids) == context, f"{len(ids)} tokens in a context of {context}")
        subject.check(loop.finish_reason == "context", f"finish_reason {loop.finish_reason!r}")


def generate(subject: Subject, prompt: list[int]) -> list[int]:
    """The greedy continuation of a prompt, 24 tokens, stop tokens or not."""
    params = GenerationParams(max_new_tokens=_NEW, ignore_eos=True, temperature=0)
    loop = DecodeLoop(subject.model, prompt, params, defaults=GenerationDefaults())
    return [step.token_id for step in loop]
