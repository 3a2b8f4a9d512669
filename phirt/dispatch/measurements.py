"""Speeds that were measured on this machine, kept by model, device and versions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["Measurement", "Optimize", "Point", "Setting"]

Optimize: TypeAlias = Literal["latency", "prefill", "throughput"]
"""What a choice is for.

``latency``: one answer to a prompt of ordinary length; ``prefill``: long prompts and short
answers; ``throughput``: tokens a second of many requests at once.
"""


@dataclass(frozen=True, slots=True)
class Setting:
    """Settings of a load that were measured together.

    Attributes:
        threads: As in `LoadOptions`; None for the runtime's default.
        spinning: As in `LoadOptions`.
    """

    threads: int | None = None
    spinning: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Speed at one length of the context.

    Attributes:
        tokens: Tokens of the prompt.
        prefill_s: Seconds to prefill them, median.
        decode_s: Seconds a decoded token after them, median.
    """

    tokens: int
    prefill_s: float
    decode_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """How fast an artifact is with a backend on a device, with one setting.

    Attributes:
        artifact: `Artifact.weights_id` and layout: ``"sha256:...:onnx-genai"``.
        backend: Name of the backend.
        device: Device name.
        version: Of the runtime.
        hardware: `hardware_id` of the machine.
        setting: Threads and spinning.
        points: By ascending length.
        batch: Rows decoded together, and seconds a step of all of them; None without the
            capability ``batch``.
        when: When, in UTC, ``"2026-11-22T03:00:00Z"``.
    """

    artifact: str
    backend: str
    device: str
    version: str
    hardware: str
    setting: Setting
    points: tuple[Point, ...]
    batch: tuple[int, float] | None = None
    when: str = ""
