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
    "Availability",
    "ChatMessage",
    "FinishReason",
    "FloatArray",
    "Hardware",
    "IntArray",
    "LogitsProcessor",
    "Optimize",
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

Optimize: TypeAlias = Literal["latency", "prefill", "throughput"]
"""What a choice of backend and device is for; docs/tuning.md says which workload that is."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a long operation (a download, a conversion, a load) has come.

    Attributes:
        stage: What is being done, in a word or two: ``"download"``, ``"convert"``,
            ``"compare"``.
        completed: Units done so far.
        total: Units in all, or None where it is not known.
        unit: ``"bytes"``, ``"tensors"``, ``"layers"``, ``"packages"`` or ``"tokens"``.
    """

    stage: str
    completed: int
    total: int | None
    unit: Literal["bytes", "tensors", "layers", "packages", "tokens"]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What a runtime tells of the physical device behind one of its names.

    Two runtimes mean the same device where the PCI address, the LUID or the UUID is the same;
    what a runtime does not tell is None.

    Attributes:
        native: The runtime's own name for it: ``"CUDA 0"``, ``"GPU.0"``, ``"xpu:0"``.
        name: What it is called: ``"NVIDIA H100 80GB HBM3"``.
        vendor: Who made it: ``"nvidia"``, ``"amd"``, ``"intel"``, ``"apple"``, ``"qualcomm"`` ….
        memory_bytes: Its memory; of a device without memory of its own, what it may take.
        driver: Version of its driver.
        pci: PCI address, ``"0000:01:00.0"``, lower case.
        luid: Windows' locally unique identifier, 16 hexadecimal digits, lower case.
        uuid: 32 hexadecimal digits, lower case, without dashes.
        discrete: Whether it has memory of its own.
        software: Whether it is computed on the CPU (SwiftShader, WARP).
    """

    native: str
    name: str | None = None
    vendor: str | None = None
    memory_bytes: int | None = None
    driver: str | None = None
    pci: str | None = None
    luid: str | None = None
    uuid: str | None = None
    discrete: bool | None = None
    software: bool = False


@dataclass(frozen=True, slots=True)
class Availability:
    """What a probe found out about one device.

    Attributes:
        device: Device name, such as ``"cpu"``.
        status: ``found`` (listed), ``loads`` (a session opens) or ``ran`` (a graph ran);
            ``no device`` (the runtime serves this kind of device and sees none),
            ``missing`` (not installed) or ``broken`` (installed, and fails).
        reason: What was seen, in one sentence.
        fix: What the user can do about it, or None.
        version: Of the runtime, ``"onnxruntime 1.31.1"``, or None where it does not import.
        hardware: The physical device, where the runtime tells of it.
    """

    device: str
    status: Literal["found", "loads", "ran", "no device", "missing", "broken"]
    reason: str
    fix: str | None = None
    version: str | None = None
    hardware: Hardware | None = None
