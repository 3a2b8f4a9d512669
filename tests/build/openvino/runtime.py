"""Graphs in OpenVINO, without phirt's adapter: the graph alone is under test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phirt.backends.openvino.runtime import import_openvino
from phirt.build.checkpoint import Checkpoint
from phirt.build.openvino_decoder import write_openvino
from phirt.build.precision import Precision
from phirt.build.recipe import Recipe
from phirt.types import FloatArray

_EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "INFERENCE_NUM_THREADS": 2,
}


class OpenVinoDecoder:
    """A written graph, compiled for the CPU in float32."""

    def __init__(self, path: Path) -> None:
        self._ov = import_openvino()
        self.compiled = self._ov.Core().compile_model(path, "CPU", _EXACT)
        self._request = self.compiled.create_infer_request()
        self._length = 0

    def reset(self) -> None:
        self._request.reset_state()
        self._length = 0

    def run(self, token_ids: Sequence[int]) -> FloatArray:
        """Append tokens, and return the logits of every one."""
        total = self._length + len(token_ids)
        feeds: dict[str, Any] = {
            "input_ids": np.array([token_ids], np.int64),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(self._length, total, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        logits: FloatArray = self._request.infer(feeds)["logits"][0]
        self._length = total
        return logits

    def logits(self, token_ids: Sequence[int]) -> FloatArray:
        """Logits of every position of a prompt."""
        self.reset()
        return self.run(token_ids)

    def layer_types(self) -> list[str]:
        """What the plugin made of the graph."""
        nodes = self.compiled.get_runtime_model().get_ops()
        return [node.get_rt_info()["layerType"].astype(str) for node in nodes]


def written(checkpoint: Checkpoint, folder: Path, precision: str = "fp32") -> OpenVinoDecoder:
    """A checkpoint, written and compiled."""
    out = folder / f"openvino-{precision}"
    out.mkdir()
    write_openvino(checkpoint, out, recipe=Recipe(Precision(precision)))
    return OpenVinoDecoder(out / "openvino_model.xml")
