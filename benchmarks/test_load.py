"""Loading the default model again, against what the runtime and the tokenizer need at least."""

from __future__ import annotations

import os
import time

import phirt
from benchmarks.alternate import alternate


def test_second_load(benchmark, model):
    """Imports are done, and the model is in the store: ``phirt.load`` against its two parts."""
    import onnxruntime as ort
    from tokenizers import Tokenizer

    def ours() -> float:
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
            os.fspath(model.path / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        tokenizer = Tokenizer.from_file(os.fspath(model.path / "tokenizer.json"))
        seconds = time.perf_counter() - started
        del session, tokenizer
        return 1 / seconds

    result = alternate(benchmark, ours, theirs, rounds=15)
    print(
        "\nloads per second, phirt.load against InferenceSession and Tokenizer.from_file: "
        f"{result}; the load takes {1 / result.ratio:.2f} of their time"
    )
