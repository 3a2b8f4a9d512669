"""Runs a written graph on ONNX Runtime, the way a backend would."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from phirt.build.checkpoint import Checkpoint
from phirt.build.onnx_decoder import write_decoder
from phirt.build.precision import Precision
from phirt.build.recipe import Recipe
from phirt.types import FloatArray


class OnnxDecoder:
    """One sequence on a written graph; its cache grows with every run."""

    def __init__(self, model_path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # The optional input is worth a warning to ONNX Runtime.
        options.intra_op_num_threads = 2
        self.session = onnxruntime.InferenceSession(
            model_path, options, providers=["CPUExecutionProvider"]
        )
        self._outputs = [output.name for output in self.session.get_outputs()]
        self._empty = {
            item.name: np.zeros(
                (1, item.shape[1], 0, item.shape[3]),
                np.float16 if item.type == "tensor(float16)" else np.float32,
            )
            for item in self.session.get_inputs()
            if item.name.startswith("past_key_values")
        }
        self.reset()

    def reset(self) -> None:
        """Forget every token."""
        self.cache, self.length = dict(self._empty), 0

    def run(self, token_ids: Sequence[int], *, keep: int | None = None) -> FloatArray:
        """Append tokens; return logits (kept positions, vocabulary)."""
        self.length += len(token_ids)
        feeds = {
            "input_ids": np.array([token_ids], np.int64),
            "attention_mask": np.ones((1, self.length), np.int64),
            **self.cache,
        }
        if keep is not None:
            feeds["num_logits_to_keep"] = np.array([keep], np.int64)
        results = dict(zip(self._outputs, self.session.run(self._outputs, feeds), strict=True))
        logits: FloatArray = results.pop("logits")[0].astype(np.float32)
        self.cache = {
            name.replace("present", "past_key_values"): cache for name, cache in results.items()
        }
        return logits

    def logits(self, token_ids: Sequence[int], *, chunk: int | None = None) -> FloatArray:
        """Logits of every position of a new sequence, ``chunk`` tokens a run."""
        self.reset()
        step = chunk or len(token_ids)
        parts = [token_ids[i : i + step] for i in range(0, len(token_ids), step)]
        return np.concatenate([self.run(part, keep=len(part)) for part in parts])


def written(
    checkpoint: Checkpoint, folder: Path, *, precision: Precision = Precision.FP32
) -> OnnxDecoder:
    """Write a checkpoint's graph and open it."""
    path = folder / "model.onnx"
    write_decoder(checkpoint, path, recipe=Recipe(precision))
    return OnnxDecoder(path)


def mean_kl(reference: FloatArray, logits: FloatArray) -> float:
    """Mean KL divergence of ``logits`` from ``reference``, in nats."""
    expected, found = _log_softmax(reference), _log_softmax(logits)
    return float((np.exp(expected) * (expected - found)).sum(axis=-1).mean())


def _log_softmax(logits: FloatArray) -> FloatArray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: FloatArray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result
