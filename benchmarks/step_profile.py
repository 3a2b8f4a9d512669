"""Where the time of a decode step goes: onnxruntime's operators, and phirt.

    python -m benchmarks.step_profile [--precision int8] [--context 64]

Operators are timed by onnxruntime itself, which costs some microseconds a node and so makes
small nodes look larger than they are; the step as a whole is timed without that.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnxruntime

import phirt
from benchmarks.bare_loop import BareLoop

STEPS = 64


class Timed:
    """An ``InferenceSession`` that adds up the time of its runs."""

    def __init__(self, inference: Any) -> None:
        self._inference = inference
        self.seconds: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inference, name)

    def run_with_iobinding(self, *arguments: Any) -> None:
        started = time.perf_counter()
        self._inference.run_with_iobinding(*arguments)
        self.seconds.append(time.perf_counter() - started)


def share(path: Path, prompt: list[int]) -> tuple[float, float]:
    """Seconds of a whole step, text included, and of the runtime's run in it: medians."""
    with phirt.load(path, backend="onnxruntime", prefix_cache_bytes=0) as model:
        loaded: Any = model.loaded
        timed = loaded.inference = Timed(loaded.inference)
        moments: list[float] = []
        with model.stream(prompt, max_new_tokens=STEPS, ignore_eos=True) as stream:
            moments = [time.perf_counter() for _ in stream]
        steps = [after - before for before, after in pairwise(moments)]
        return statistics.median(steps), statistics.median(timed.seconds[-len(steps) :])


def operators(path: Path, prompt: list[int]) -> Counter[str]:
    """Seconds a step of each kind of node, as onnxruntime's profiler has them."""
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(
            path / "model.onnx", options, providers=["CPUExecutionProvider"]
        )
        loop = BareLoop(path, session=session, capacity=len(prompt) + STEPS + 1)
        loop.decode_seconds(prompt, STEPS)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    runs = sorted(event["ts"] for event in events if event["name"] == "model_run")
    begin = runs[len(runs) - STEPS]
    found: Counter[str] = Counter()
    for event in events:
        if event["ts"] < begin or not event["name"].endswith("_kernel_time"):
            continue
        kind = event["args"]["op_name"]
        if "lm_head" in event["name"] and kind.startswith("MatMul"):
            kind += " (LM head)"
        found[kind] += event["dur"] / STEPS / 1e6
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--context", type=int, default=64)
    arguments = parser.parse_args()
    path = phirt.pull(backend="onnxruntime", precision=arguments.precision)
    prompt = [11 * index % 9000 + 100 for index in range(arguments.context)]
    step, run = share(path, prompt)
    print(
        f"A step takes {1000 * step:.2f} ms, of which onnxruntime runs {1000 * run:.2f} ms; "
        f"{1e6 * (step - run):.0f} us ({(step - run) / step:.1%}) are phirt's, text included.\n"
    )
    found = operators(path, prompt)
    total = sum(found.values())
    print("| Operator | ms a step, profiled | Share |\n|---|---:|---:|")
    for kind, seconds in found.most_common():
        if seconds >= total / 100:
            print(f"| {kind} | {1000 * seconds:.2f} | {seconds / total:.0%} |")


if __name__ == "__main__":
    main()
