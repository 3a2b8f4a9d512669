"""How a model's speed and memory grow with its context and with the streams that it serves.

    python -m benchmarks.growth [--precision int8] [--plot docs/images/growth.png]

Decode steps are timed behind a context of made-up keys and values: what attention computes
with does not change how long it takes, and 8,000 tokens of real ones take minutes. Points of
one curve take turns, so that whatever else the machine does hits all alike.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import psutil

import phirt
from benchmarks.streams import throughput
from phirt.protocols import KVCache, KVLayer, LoadedModel, Session

CONTEXTS = (128, 1024, 4096, 8064)
STREAMS = (1, 2, 4, 8, 16, 32)
STEPS, ROUNDS = 6, 8


def made_up_cache(model: LoadedModel, length: int) -> KVCache:
    """A cache of that length: that of one token, over and over."""
    session = model.new_session(max_length=8, expected_length=8)
    session.prefill([1])
    one = session.export_kv()
    session.close()
    layers = tuple(
        KVLayer(0, np.repeat(layer.key, length, axis=1), np.repeat(layer.value, length, axis=1))
        for layer in one.layers
    )
    return KVCache(layers, length, one.weights_id, one.regime)


def measure_contexts(model: LoadedModel) -> dict[int, tuple[float, float]]:
    """Milliseconds of a decode step, and megabytes that its session takes, by context."""
    sessions: dict[int, Session] = {}
    memory = {}
    process = psutil.Process()
    for context in CONTEXTS:
        cache = made_up_cache(model, context)
        before = process.memory_info().rss
        session = model.new_session(max_length=context + 128, expected_length=context + 128)
        session.import_kv(cache)
        memory[context] = (process.memory_info().rss - before) / 1e6
        sessions[context] = session
        del cache
    times: dict[int, list[float]] = {context: [] for context in CONTEXTS}
    for _ in range(ROUNDS):
        for context, session in sessions.items():
            for _ in range(STEPS):
                started = time.perf_counter()
                session.decode(1)
                times[context].append(time.perf_counter() - started)
            session.truncate(context)
    for session in sessions.values():
        session.close()
    return {
        context: (1000 * statistics.median(times[context]), memory[context]) for context in CONTEXTS
    }


def measure_streams(model: phirt.Model) -> dict[int, float]:
    """Tokens/s of all streams together, by their number."""
    rates: dict[int, list[float]] = {count: [] for count in STREAMS}
    for turn in range(4):
        for count in STREAMS:
            rate = throughput(model, count)
            if turn:  # the first makes the pool
                rates[count].append(rate)
    return {count: statistics.median(found) for count, found in rates.items()}


def plot(
    contexts: dict[int, tuple[float, float]], streams: dict[int, float], title: str, path: Path
) -> None:
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, (time_axis, memory_axis, stream_axis) = plt.subplots(1, 3, figsize=(12, 3.6))
    lengths = list(contexts)
    time_axis.plot(lengths, [each[0] for each in contexts.values()], marker="o")
    time_axis.set(xlabel="context, tokens", ylabel="ms per token", title="A decode step", ylim=0)
    memory_axis.plot(lengths, [each[1] for each in contexts.values()], marker="o", color="C1")
    memory_axis.set(xlabel="context, tokens", ylabel="MB", title="Memory of a session", ylim=0)
    stream_axis.plot(list(streams), list(streams.values()), marker="o", color="C2")
    stream_axis.set_xscale("log", base=2)
    stream_axis.set_xticks(list(streams), [str(count) for count in streams])
    stream_axis.set(xlabel="streams", ylabel="tokens/s together", title="Streams", ylim=0)
    for axis in (time_axis, memory_axis, stream_axis):
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    with phirt.load(precision=arguments.precision, prefix_cache_bytes=0) as model:
        streams = measure_streams(model)
        contexts = measure_contexts(model.loaded)
        title = f"{model.name} in {model.precision}, {model.backend} on {model.device}"
    print("| Context | ms per token | MB |\n|---:|---:|---:|")
    for context, (milliseconds, megabytes) in contexts.items():
        print(f"| {context:,} | {milliseconds:.1f} | {megabytes:.0f} |")
    print("\n| Streams | tokens/s | against one |\n|---:|---:|---:|")
    for count, rate in streams.items():
        print(f"| {count} | {rate:.1f} | {rate / streams[1]:.2f} |")
    if arguments.plot:
        plot(contexts, streams, title, arguments.plot)


if __name__ == "__main__":
    main()
