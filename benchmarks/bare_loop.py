"""A bare decode loop on ONNX Runtime: one sequence, one shared KV buffer, nothing else."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from phirt.models.genai_config import GENAI_CONFIG_NAME, read_genai_config

__all__ = ["BareLoop"]


def _open(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class BareLoop:
    """A model folder on the CPU.

    Args:
        folder: The folder; its graph follows onnxruntime-genai's conventions.
        capacity: Most tokens of a sequence.
        threads: Threads within an operator.
        session: An ``InferenceSession`` of that folder to run, in place of an own one.
    """

    def __init__(
        self, folder: Path, *, capacity: int = 2048, threads: int = 2, session: Any = None
    ) -> None:
        spec = read_genai_config(folder / GENAI_CONFIG_NAME)
        self._session = session or _open(folder / spec.filename, threads)
        self._vocab = spec.vocab_size
        optional = [item.name for item in self._session.get_overridable_initializers()]
        self._can_keep = "num_logits_to_keep" in optional
        self._binding = self._session.io_binding()
        shape = (1, spec.num_kv_heads, capacity, spec.head_size)
        for layer in range(spec.num_layers):
            for past, present in zip(
                spec.past_names(layer), spec.present_names(layer), strict=True
            ):
                buffer = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
                self._binding.bind_ortvalue_input(past, buffer)
                self._binding.bind_ortvalue_output(present, buffer)
        self._mask = np.ones((1, capacity), np.int64)
        self.length = 0

    def run(self, token_ids: Sequence[int], *, keep: int = 1) -> NDArray[np.float32]:
        """Append tokens; return logits of the last ``keep`` positions, (keep, vocabulary)."""
        binding, self.length = self._binding, self.length + len(token_ids)
        binding.bind_cpu_input("input_ids", np.array([token_ids], np.int64))
        binding.bind_cpu_input("attention_mask", np.ascontiguousarray(self._mask[:, : self.length]))
        if self._can_keep:
            # Only a bound OrtValue may be an optional input.
            count = onnxruntime.OrtValue.ortvalue_from_numpy(np.array([keep], np.int64))
            binding.bind_ortvalue_input("num_logits_to_keep", count)
        binding.bind_output("logits", "cpu")
        self._session.run_with_iobinding(binding)
        outputs = binding.get_outputs()
        logits = next(output for output in outputs if output.shape()[-1] == self._vocab).numpy()
        kept: NDArray[np.float32] = logits[0, -keep:]
        return kept

    def logits(self, token_ids: Sequence[int], *, chunk: int) -> NDArray[np.float32]:
        """Logits of every position of a new sequence, ``chunk`` tokens a run."""
        self.length = 0
        parts = [token_ids[i : i + chunk] for i in range(0, len(token_ids), chunk)]
        return np.concatenate([self.run(part, keep=len(part)).copy() for part in parts])

    def decode_seconds(self, prompt: Sequence[int], steps: int) -> list[float]:
        """Durations of greedy decode steps after a prompt."""
        self.length = 0
        token = int(self.run(prompt)[-1].argmax())
        durations = []
        for _ in range(steps):
            start = time.perf_counter()
            token = int(self.run([token])[-1].argmax())
            durations.append(time.perf_counter() - start)
        return durations

    def prefill_seconds(self, prompt: Sequence[int]) -> float:
        """Duration of one prefill."""
        self.length = 0
        start = time.perf_counter()
        self.run(prompt)
        return time.perf_counter() - start
