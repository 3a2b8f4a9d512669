"""Loading the default model again, against what the runtime and the tokenizer need at least."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import phirt
from benchmarks.alternate import alternate
from phirt.backends import distributions
from phirt.dispatch import registry
from phirt.models.remembered import Remembered
from phirt.text import sandbox


def test_second_load(benchmark, model):
    """In a process that has loaded the model before: ``phirt.load`` against its two parts."""
    compare(benchmark, model.path, lambda: None)


def test_load_by_a_new_process(benchmark, model):
    """The same in one that has imported everything, and knows nothing of the model yet."""
    compare(benchmark, model.path, forget)


def forget() -> None:
    """Let go of what was read in earlier loads."""
    for each in gc.get_objects():
        # Some modules' objects answer isinstance with a warning.
        if type(each) is Remembered:
            each._results.clear()
    registry._plugins_of.cache_clear()
    distributions._owners_on_path.cache_clear()
    sandbox._compile.cache_clear()


def compare(benchmark: Any, folder: Path, before: Callable[[], None]) -> None:
    import onnxruntime as ort
    from tokenizers import Tokenizer

    def ours() -> float:
        before()
        started = time.perf_counter()
        loaded = phirt.load(offline=True)
        seconds = time.perf_counter() - started
        loaded.close()
        return 1 / seconds

    def theirs() -> float:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = os.cpu_count() or 1
        started = time.perf_counter()
        session = ort.InferenceSession(
            os.fspath(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        tokenizer = Tokenizer.from_file(os.fspath(folder / "tokenizer.json"))
        seconds = time.perf_counter() - started
        del session, tokenizer
        return 1 / seconds

    result = alternate(benchmark, ours, theirs, rounds=15)
    print(
        "\nloads per second, phirt.load against InferenceSession and Tokenizer.from_file: "
        f"{result}; the load takes {1 / result.ratio:.2f} of their time"
    )
