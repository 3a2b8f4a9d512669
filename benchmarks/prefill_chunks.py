"""How long the parts of a long prompt should be: speed and memory by the tokens of a part.

    python -m benchmarks.prefill_chunks [--backend onnxruntime] [--precision int8] [--tokens 2000]

All lengths take turns, three times; memory is that of a process of its own for each length.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from typing import Any

import phirt
from phirt.devices.memory import peak_rss

CHUNKS = (128, 256, 512, 1024, 2048)
ROUNDS = 3


def prefill(model: Any, ids: list[int], chunk: int) -> float:
    """Seconds of a prompt in parts."""
    session = model.new_session(max_length=len(ids), expected_length=len(ids))
    started = time.perf_counter()
    for start in range(0, len(ids), chunk):
        part = ids[start : start + chunk]
        logits = session.prefill(part, needs_logits=start + chunk >= len(ids))
    logits.numpy()
    seconds = time.perf_counter() - started
    session.close()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--only", type=int, help="print the peak of a process with this length")
    arguments = parser.parse_args()
    ids = [11 * index % 9000 + 100 for index in range(arguments.tokens)]
    with phirt.load(backend=arguments.backend, precision=arguments.precision) as model:
        if arguments.only is not None:
            prefill(model.loaded, ids, arguments.only)
            print(round(peak_rss() / 1e6))
            return
        times: dict[int, list[float]] = {chunk: [] for chunk in CHUNKS}
        for _ in range(ROUNDS):
            for chunk, found in times.items():
                found.append(prefill(model.loaded, ids, chunk))
    print("| Tokens of a part | tokens/s | against 512 | peak of the process, MB |")
    print("|---:|---:|---:|---:|")
    for chunk, found in times.items():
        ratio = statistics.median(
            theirs / ours for ours, theirs in zip(found, times[512], strict=True)
        )
        command = [sys.executable, "-m", "benchmarks.prefill_chunks", *sys.argv[1:]]
        memory = subprocess.run(  # noqa: S603  # this very file
            [*command, "--only", str(chunk)], check=True, capture_output=True, text=True
        ).stdout.strip()
        rate = arguments.tokens / statistics.median(found)
        print(f"| {chunk:,} | {rate:.0f} | {ratio:.2f} | {memory} |")


if __name__ == "__main__":
    main()
