"""10,000 seeded bit flips over small models: a typed error, or a model. Row M9.

Never a signal, never a hang, never an exception that is not phirt's, and no warning of NumPy's.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Timer
from typing import Any

import pytest

from phirt.build.convert import convert
from tests.build.bit_flips import KINDS, flip
from tests.tiny_gguf import write_tiny_llama_gguf

FLIPS = {"gguf": 2000, "safetensors": 2000, "onnx": 6000}
SECONDS_A_FLIP = 20  # A conversion takes 0.05.
SECONDS = 180
TINY: dict[str, Any] = {
    "vocab": 280,
    "layers": 1,
    "hidden": 32,
    "intermediate": 32,
    "heads": 2,
    "kv_heads": 1,
}
CONVERTED = {"safetensors": ("safetensors", "fp32"), "onnx": ("onnx-genai", "int4")}
ROOT = Path(__file__).parents[2]


@dataclass
class Report:
    """How the flips of one kind ended."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def write_model(kind: str, folder: Path) -> Path:
    """A small model of a kind, in a folder of its own, without the hashes of its files."""
    if kind == "gguf":
        write_tiny_llama_gguf(
            folder / "model.gguf",
            architecture="phi3",
            tokenizer="llama",
            encoding="Q4_0",
            encodings={"attn_qkv": "Q5_1", "ffn_down": "Q8_0"},
            **TINY,
        )
        return folder
    layout, precision = CONVERTED[kind]
    source = write_tiny_llama_gguf(folder.parent / f"{kind}.gguf", encoding="Q4_1", **TINY)
    convert(source, folder, layout=layout, precision=precision)
    (folder / "phirt.json").unlink()  # Its hashes would find most of the flips.
    return folder


@contextmanager
def worker(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """The process that flips, killed where a flip takes too long."""
    command = [sys.executable, "-m", "tests.build.bit_flips", *map(str, arguments)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def run(kind: str, pristine: Path, scratch: Path) -> Report:
    """All flips of a kind. A worker that dies is replaced, and goes on behind what killed it."""
    report, number, stop = Report(), 0, FLIPS[kind]
    while number < stop:
        with worker(kind, pristine, scratch, number, stop) as process:
            assert process.stdout is not None
            for line in lines_in_time(process):
                found, outcome = line.rstrip().split(" ", 1)
                assert int(found) == number, "the worker printed something else"
                report.outcomes[outcome.split(" ", 1)[0]] += 1
                if outcome.startswith("foreign"):
                    report.wrong.append(line)
                number += 1
            code = process.wait()
        if number < stop:
            report.wrong.append(f"{number}: the worker ended with {code}")
            report.outcomes["ended"] += 1
            number += 1
        if len(report.wrong) > 20:
            break  # Enough to look at.
    return report


def lines_in_time(process: subprocess.Popen[str]) -> Iterator[str]:
    assert process.stdout is not None
    while True:
        clock = Timer(SECONDS_A_FLIP, process.kill)
        clock.start()
        try:
            line = process.stdout.readline()
        finally:
            clock.cancel()
        if not line:
            return
        yield line


def test_the_same_number_is_the_same_flip():
    sizes = {"model.gguf": 20_000, "config.json": 2}
    flips = [flip(sizes, number) for number in range(200)]
    assert flips == [flip(sizes, number) for number in range(200)]
    assert {name for name, _, _ in flips} == set(sizes)
    assert all(place < sizes[name] for name, place, _ in flips)
    assert {mask for _, _, mask in flips} == {1 << bit for bit in range(8)}


@pytest.mark.slow
@pytest.mark.timeout(6 * SECONDS)
def test_ten_thousand_bit_flips(tmp_path):
    assert sum(FLIPS.values()) == 10_000
    assert set(FLIPS) == set(KINDS)

    def run_kind(kind: str) -> Report:
        pristine, scratch = tmp_path / kind, tmp_path / f"{kind}-scratch"
        pristine.mkdir()
        scratch.mkdir()
        return run(kind, write_model(kind, pristine), scratch)

    start = time.monotonic()
    with ThreadPoolExecutor(len(FLIPS)) as pool:
        reports = dict(zip(FLIPS, pool.map(run_kind, FLIPS), strict=True))
    seconds = time.monotonic() - start
    for kind, report in reports.items():
        sys.stdout.write(f"{kind}: {dict(report.outcomes.most_common())}\n")
    sys.stdout.write(f"{sum(FLIPS.values()):,} flips in {seconds:.0f} s\n")
    assert seconds < 5 * SECONDS
    assert not {kind: report.wrong for kind, report in reports.items() if report.wrong}
    for kind, report in reports.items():
        assert report.outcomes.total() == FLIPS[kind]
        # Some flips must be found, and some must not matter, or nothing was read.
        assert report.outcomes["ModelFormatError"] > FLIPS[kind] / 20
        assert report.outcomes["ok"] > FLIPS[kind] / 20
