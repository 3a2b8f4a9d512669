"""Logits that stay on the device until somebody asks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from phirt.backends.base import HostLogits
from phirt.backends.onnxruntime.errors import translate
from phirt.protocols import TopK
from phirt.types import FloatArray

if TYPE_CHECKING:
    from phirt.backends.onnxruntime.adapter import OrtModel

__all__ = ["DeviceLogits"]


class DeviceLogits:
    """The logits output of one run.

    Args:
        model: The model that ran.
        value: The tensor, (batch, positions, vocab), on the device.
        every_position: Whether the positions are rows; else the last of each sequence is.
    """

    def __init__(self, model: OrtModel, value: Any, *, every_position: bool) -> None:
        self._model = model
        self._value = value
        self._every_position = every_position

    def numpy(self) -> FloatArray:
        """The logits, shape (n, vocab)."""
        return self._model.execution.run(self._read)

    def top(self, k: int) -> TopK:
        """The k largest logits of each position, chosen by the device."""
        if not 1 <= k <= self._value.shape()[-1]:
            raise ValueError(
                f"k={k} must be from 1 to the vocabulary's size, {self._value.shape()[-1]}"
            )
        if not self._model.capabilities.topk:
            return HostLogits(self.numpy()).top(k)
        return self._model.execution.run(self._top, k)

    def _read(self) -> FloatArray:
        element = self._model.graph.logits_type
        stored = self._model.memory.read(self._value, element)
        rows: FloatArray = self._rows(element.to_float32(stored))
        return rows

    def _top(self, k: int) -> TopK:
        selection = self._model.selection
        binding = selection.io_binding()
        binding.bind_ortvalue_input("logits", self._value)
        binding.bind_cpu_input("k", np.array([k], np.int64))
        for name in ("values", "ids", "logsumexp"):
            binding.bind_output(name)
        try:
            selection.run_with_iobinding(binding)
        except Exception as error:
            raise translate(error, f"choosing the {k} largest logits") from error
        values, ids, total = (output.numpy() for output in binding.get_outputs())
        element = self._model.graph.logits_type
        return TopK(
            self._rows(ids),
            self._rows(element.to_float32(values)),
            self._rows(element.to_float32(total)[..., None])[:, 0],
        )

    def _rows(self, array: Any) -> Any:
        """(batch, positions, width) as rows."""
        chosen = array if self._every_position else array[:, -1:]
        return np.ascontiguousarray(chosen.reshape(-1, array.shape[-1]))
