"""Aliases and small value types shared by every room."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Artifact",
    "ChatMessage",
    "FinishReason",
    "FloatArray",
    "IntArray",
    "LogitsProcessor",
    "Progress",
    "ProgressCallback",
    "PromptLike",
]

FloatArray: TypeAlias = NDArray[np.float32]
"""A float32 array: logits, log-probabilities, dequantized weights."""

IntArray: TypeAlias = NDArray[np.int64]
"""An int64 array: token ids, positions."""

ChatMessage: TypeAlias = dict[str, Any]
"""One chat message: at least ``{"role": ..., "content": ...}``, as chat templates read it."""

PromptLike: TypeAlias = str | list[int] | list[ChatMessage]
"""A prompt: ``str`` is raw text, a list of messages a chat, a list of ints token ids."""

LogitsProcessor: TypeAlias = Callable[[IntArray, FloatArray], FloatArray]
"""``f(token_ids, logits) -> logits``: ids of prompt and output (n,), logits (vocab,)."""

FinishReason: TypeAlias = Literal["stop", "stop_string", "length", "context", "cancelled", "error"]
"""Why a generation ended.

``stop``: a stop token; ``stop_string``: a stop string; ``length``: max_new_tokens;
``context``: the model's context is full; ``cancelled``: the caller closed the stream;
``error``: an exception ended it (what was produced so far is kept).
"""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a long operation (a download, a conversion, a load) has come.

    Attributes:
        stage: What is being done, in a word or two: ``"download"``, ``"convert"``.
        completed: Units done so far.
        total: Units in all, or None where it is not known.
        unit: ``"bytes"`` or ``"tensors"``.
    """

    stage: str
    completed: int
    total: int | None
    unit: Literal["bytes", "tensors"]


ProgressCallback: TypeAlias = Callable[[Progress], None]
"""Receives a `Progress`; called from the thread that works, so it should return quickly."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """A model folder that some backend can load.

    Attributes:
        name: What the user calls it: a catalog name, or the folder's or file's name.
        path: The folder.
        format: Its layout: ``"onnx-genai"`` (genai_config.json and a graph), ``"onnx"``
            (config.json and onnx/model*.onnx, as Optimum exports), ``"openvino"``
            (openvino_model.xml), ``"safetensors"`` (config.json and safetensors files) or
            ``"mlx"`` (the same, quantized by mlx-lm).
        architecture: The decoder's architecture, such as ``"llama"``, where it is known.
        precision: How its weights are stored, such as ``"int8"``, where it is known.
        weights_id: Identifies the weights; two artifacts with one id hold the same values,
            whatever their layout.
    """

    name: str
    path: Path
    format: str
    architecture: str | None
    precision: str | None
    weights_id: str
