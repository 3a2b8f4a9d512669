"""Tokens/s of streams that run at once on one model."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import phirt

__all__ = ["throughput"]

NEW_TOKENS = 48


def throughput(model: phirt.Model, count: int) -> float:
    """Tokens/s of ``count`` streams together, from the last first token to the first last one."""
    prompts = [
        [(7 * stream + 3 * index) % 9000 + 100 for index in range(24)] for stream in range(count)
    ]
    times: list[list[float]] = [[] for _ in range(count)]

    def run(stream: int) -> None:
        params = phirt.GenerationParams(max_new_tokens=NEW_TOKENS, ignore_eos=True, temperature=0)
        for _ in model.stream(prompts[stream], params=params):
            times[stream].append(time.perf_counter())

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(run, range(count)))
    begin, end = max(each[0] for each in times), min(each[-1] for each in times)
    tokens = sum(begin < moment <= end for each in times for moment in each)
    return tokens / (end - begin)
