"""Times streams of one model: what happens in the process of a row."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from phirt.benchmark.report import BenchSample
from phirt.errors import BackendRuntimeError
from phirt.model import Model
from phirt.stream import Generation

__all__ = ["Case", "prompt_of", "time_streams"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is timed.

    Attributes:
        prompt_tokens: Tokens of each prompt.
        new_tokens: Tokens of each answer, at least 2.
        concurrency: Streams at once.
        number: Number of the first of its prompts; those after it have the numbers that follow.
    """

    prompt_tokens: int
    new_tokens: int
    concurrency: int
    number: int


@dataclass(frozen=True, slots=True)
class _Run:
    """One stream: when it was called, when each token came, and its result."""

    started: float
    moments: list[float]
    result: Generation


def prompt_of(number: int, length: int, vocab_size: int) -> list[int]:
    """Token ids, varied, and the same for every model of that vocabulary.

    Prompts of two numbers differ from the first token on (as long as there are as many tokens),
    so that what a cache keeps of one is of no use to another.

    Args:
        number: From 0.
        length: Tokens.
        vocab_size: Ids are below it.
    """
    ids = np.random.default_rng(number).integers(0, vocab_size, length)
    ids[0] = number % vocab_size
    return [int(each) for each in ids]


def time_streams(model: Model, case: Case) -> BenchSample:
    """Let as many threads as there are streams generate one answer each, all at once.

    Raises:
        PhirtError: A stream fails.
    """
    vocab_size = model.loaded.info.vocab_size
    numbers = range(case.number, case.number + case.concurrency)
    prompts = [prompt_of(number, case.prompt_tokens, vocab_size) for number in numbers]
    barrier = threading.Barrier(case.concurrency)

    def run(prompt: list[int]) -> _Run:
        barrier.wait()
        return _run(model, prompt, case.new_tokens)

    if case.concurrency == 1:
        runs = [run(prompts[0])]
    else:
        with ThreadPoolExecutor(case.concurrency, thread_name_prefix="phirt-bench") as pool:
            runs = list(pool.map(run, prompts))
    return BenchSample(
        ttft_s=tuple(each.moments[0] - each.started for each in runs),
        prefill_tokens_per_s=tuple(_prefill_rate(each) for each in runs),
        decode_tokens_per_s=tuple(_decode_rate(each.moments) for each in runs),
        inter_token_s=tuple(tuple(_gaps(each.moments)) for each in runs),
        total_s=max(each.moments[-1] for each in runs) - min(each.started for each in runs),
    )


def _run(model: Model, prompt: list[int], new_tokens: int) -> _Run:
    started = time.perf_counter()
    # Greedy, and on through end tokens: every row generates as many tokens.
    stream = model.stream(prompt, max_new_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    with closing(stream):
        moments = [time.perf_counter() for _ in stream]
    if len(moments) != new_tokens:
        raise BackendRuntimeError(
            f"A stream of {new_tokens} tokens ended after {len(moments)}: "
            f"{stream.result.finish_reason}."
        )
    return _Run(started, moments, stream.result)


def _prefill_rate(run: _Run) -> float:
    rate = run.result.timings.prefill_tokens_per_s
    # A clock may be too coarse for a tiny model.
    return run.result.usage.prompt_tokens / (run.moments[0] - run.started) if rate is None else rate


def _decode_rate(moments: list[float]) -> float:
    return (len(moments) - 1) / (moments[-1] - moments[0])


def _gaps(moments: list[float]) -> Iterator[float]:
    return (after - before for before, after in itertools.pairwise(moments))
