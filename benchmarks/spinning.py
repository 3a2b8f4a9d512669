"""What spinning workers cost and bring: decode speed, alone and beside a busy process.

    python -m benchmarks.spinning [--rounds N]

Prints a table in which all settings of ONNX Runtime's thread pool take turns on the default
model, and the processor time that each burns in the third of a second after an answer.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import phirt
from phirt.backends.onnxruntime import OnnxRuntimeBackend
from phirt.generation.loop import DecodeLoop
from phirt.generation.params import GenerationParams
from phirt.generation.params_resolved import GenerationDefaults
from phirt.models.folder import read_folder
from phirt.protocols import LoadedModel, LoadOptions

DURATION = "session.intra_op.spin_duration_us"
SETTINGS = {
    "onnxruntime's default": LoadOptions(spinning=True),
    "never": LoadOptions(spinning=False),
    "phirt's default": LoadOptions(),
    "50 us": LoadOptions(spinning=True, extra={DURATION: "50"}),
    "200 us": LoadOptions(spinning=True, extra={DURATION: "200"}),
    "1,000 us": LoadOptions(spinning=True, extra={DURATION: "1000"}),
}
PROMPT = list(range(100, 130))
NEW_TOKENS = 64


def decode_rate(model: LoadedModel, new_tokens: int = NEW_TOKENS) -> float:
    params = GenerationParams(max_new_tokens=new_tokens, ignore_eos=True)
    loop = DecodeLoop(model, PROMPT, params, defaults=GenerationDefaults())
    for _ in loop:
        pass
    rate = loop.timings(load_s=0.0).decode_tokens_per_s
    assert rate is not None
    return rate


def take_turns(models: Mapping[str, LoadedModel], rounds: int) -> dict[str, float]:
    rates: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name, model in models.items():
            time.sleep(0.05)  # until the workers of the one before have gone to sleep
            rate = decode_rate(model)
            if turn > 0:  # the first turn warms up
                rates[name].append(rate)
    return {name: statistics.median(found) for name, found in rates.items()}


def idle_milliseconds(model: LoadedModel) -> float:
    """Processor time that the process uses while it has nothing to do."""
    decode_rate(model, new_tokens=4)
    before = time.process_time()
    time.sleep(0.3)
    return (time.process_time() - before) * 1000


def _burn(stop: Any) -> None:
    while not stop.is_set():
        for _ in range(100_000):
            pass


@contextmanager
def busy_process() -> Iterator[None]:
    """A process that keeps one core busy."""
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    process = context.Process(target=_burn, args=(stop,), daemon=True)
    process.start()
    try:
        yield
    finally:
        stop.set()
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    artifact = read_folder(phirt.pull()).artifact
    backend = OnnxRuntimeBackend()
    models = {name: backend.load(artifact, "cpu", options) for name, options in SETTINGS.items()}
    alone = take_turns(models, rounds)
    idle = {name: idle_milliseconds(model) for name, model in models.items()}
    with busy_process():
        beside = take_turns(models, rounds)
    for name in models:
        print(
            f"{name:22s} alone {alone[name]:6.1f} tokens/s   beside a busy process "
            f"{beside[name]:6.1f} tokens/s   idle {idle[name]:5.1f} ms"
        )


if __name__ == "__main__":
    main()
