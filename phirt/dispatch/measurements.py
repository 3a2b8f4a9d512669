"""Speeds that were measured on this machine, kept by model, device and versions."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from phirt.devices.record_json import from_json, to_json
from phirt.dispatch.machine_dir import machine_dir, parsed_record, update_record
from phirt.models.remembered import Remembered
from phirt.types import Optimize

__all__ = [
    "WORKLOADS",
    "Batch",
    "Measurement",
    "Measurements",
    "Point",
    "Setting",
    "Workload",
    "artifact_id",
    "fastest",
    "predict_prefill",
    "predict_seconds",
]

_logger = logging.getLogger(__name__)

# Repeated on a quiet machine of two cores, the same setting differs by up to 4 %.
_GAIN = 0.95


@dataclass(frozen=True, slots=True)
class Workload:
    """What is timed in thought.

    Attributes:
        prompt: Tokens of each prompt.
        new_tokens: Tokens of each answer.
        requests: How many come at once.
    """

    prompt: int
    new_tokens: int
    requests: int = 1


WORKLOADS: Mapping[Optimize, Workload] = MappingProxyType(
    {
        "latency": Workload(prompt=128, new_tokens=128),
        "prefill": Workload(prompt=1024, new_tokens=16),
        "throughput": Workload(prompt=128, new_tokens=128, requests=4),
    }
)
"""``latency``: one answer to a prompt of ordinary length; ``prefill``: a long prompt and a
short answer; ``throughput``: several requests at once, whose prompts take turns."""


def artifact_id(weights_id: str, layout: str, precision: str | None) -> str:
    """What speeds and verdicts are of: ``"sha256:...:onnx-genai:int8"``.

    The identity of the weights is not enough: ``fp32`` and ``exact`` hold the same ones, and
    each has kernels of its own.

    Args:
        weights_id: As in `Artifact`.
        layout: As `Artifact.format`.
        precision: As in `Artifact`.
    """
    return ":".join(filter(None, (weights_id, layout, precision)))


@dataclass(frozen=True, slots=True)
class Setting:
    """Settings of a load that were measured together.

    Attributes:
        threads: As in `LoadOptions`; None for the runtime's default.
        spinning: As in `LoadOptions`.
        pinning: As in `LoadOptions`.
    """

    threads: int | None = None
    spinning: bool | None = None
    pinning: bool | None = None


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
class Batch:
    """Speed of decoding several sequences together.

    Attributes:
        rows: How many.
        step_s: Seconds a step of all of them, median.
    """

    rows: int
    step_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """How fast an artifact is with a backend on a device, with one setting.

    Attributes:
        artifact: Its `artifact_id`.
        backend: Name of the backend.
        device: Device name.
        version: Of the runtime, or None where it does not tell.
        hardware: `hardware_id` of the machine.
        setting: Threads, spinning and pinning.
        points: At least one, by ascending length.
        batch: Of several sequences; None without the capability ``batch``.
        when: When, in UTC, ``"2026-11-22T03:00:00Z"``.
    """

    artifact: str
    backend: str
    device: str
    version: str | None
    hardware: str
    setting: Setting
    points: tuple[Point, ...]
    batch: Batch | None = None
    when: str = ""

    def __post_init__(self) -> None:
        lengths = [point.tokens for point in self.points]
        times = [time for each in self.points for time in (each.prefill_s, each.decode_s)]
        times += [] if self.batch is None else [self.batch.step_s, self.batch.rows]
        ascending = all(a < b for a, b in zip([0, *lengths], lengths, strict=False))
        if not lengths or not ascending or min(times) <= 0:
            raise ValueError(
                "A measurement has points of ascending lengths, and times above zero, not "
                f"{self.points} and {self.batch}"
            )


def predict_seconds(measurement: Measurement, optimize: Optimize) -> float:
    """Seconds that a workload would take, from what was measured.

    Between two lengths times are interpolated linearly; beyond the longest, prefill goes on at
    its rate, and a decoded token costs as much more as between the last two.

    Args:
        measurement: What was measured.
        optimize: The workload.
    """
    work = WORKLOADS[optimize]
    points = measurement.points
    lengths = _lengths(measurement)
    prefill = predict_prefill(measurement, optimize)
    middle = work.prompt + work.new_tokens / 2  # the context grows while the answer does
    step = _at(middle, lengths[1:], [point.decode_s for point in points])
    batch = measurement.batch
    if work.requests == 1 or batch is None:
        return work.requests * (prefill + work.new_tokens * step)
    turns = -(-work.requests // batch.rows)
    return work.requests * prefill + turns * work.new_tokens * batch.step_s


def predict_prefill(measurement: Measurement, optimize: Optimize) -> float:
    """Seconds that one prompt of a workload would take, as `predict_seconds` reckons.

    Args:
        measurement: What was measured.
        optimize: The workload.
    """
    times = [0.0, *(point.prefill_s for point in measurement.points)]
    return _at(WORKLOADS[optimize].prompt, _lengths(measurement), times)


def _lengths(measurement: Measurement) -> list[float]:
    return [0.0, *(float(point.tokens) for point in measurement.points)]


def _at(where: float, lengths: Sequence[float], values: Sequence[float]) -> float:
    """Linear interpolation; beyond the last, on with the last slope, which is never downwards."""
    if len(lengths) == 1 or where <= lengths[0]:
        return values[0]
    last = len(lengths) - 2
    index = next((i for i in range(last) if where <= lengths[i + 1]), last)
    slope = (values[index + 1] - values[index]) / (lengths[index + 1] - lengths[index])
    if where > lengths[-1]:
        return values[-1] + max(slope, 0.0) * (where - lengths[-1])
    return values[index] + slope * (where - lengths[index])


def fastest(
    measurements: Iterable[Measurement],
    *,
    artifact: str,
    backend: str,
    device: str,
    version: str | None,
    optimize: Optimize,
) -> Measurement | None:
    """The measurement whose setting is best for a workload, or None where there is none.

    What was measured with another version of the runtime says nothing of this one. The
    runtime's own settings stay unless others are better by more than measurements scatter.

    Args:
        measurements: Of one machine.
        artifact: As in `Measurement`.
        backend: As in `Measurement`.
        device: As in `Measurement`.
        version: Of the runtime now.
        optimize: The workload.
    """
    wanted = (artifact, backend, device, version)
    fitting = [m for m in measurements if (m.artifact, m.backend, m.device, m.version) == wanted]
    own = next((m for m in fitting if m.setting == Setting()), None)
    best = min(fitting, key=lambda m: predict_seconds(m, optimize), default=None)
    if best is None or own is None:
        return best
    is_better = predict_seconds(best, optimize) < _GAIN * predict_seconds(own, optimize)
    return best if is_better else own


_MOST = 1000
_KNOWN: Remembered[list[Measurement]] = Remembered()


class Measurements:
    """The measurements that are kept in the folder of this machine (`machine_dir`)."""

    def __init__(self) -> None:
        self._path = machine_dir() / "measurements.json"

    def find(self, hardware: str) -> list[Measurement]:
        """All that was measured on some hardware, oldest first.

        Args:
            hardware: `hardware_id` of the machine.
        """
        known = parsed_record(self._path, _KNOWN, self._parse)
        return [m for m in known if m.hardware == hardware]

    def save(self, measurements: Sequence[Measurement]) -> None:
        """Keep measurements, in place of earlier ones of the same thing."""

        def rewrite(document: Mapping[str, Any] | None) -> dict[str, Any]:
            kept = {_key(m): m for m in self._parse(document)}
            for measurement in measurements:
                kept.pop(_key(measurement), None)
                kept[_key(measurement)] = measurement
            newest = list(kept.values())[-_MOST:]
            return {"measurements": [to_json(measurement) for measurement in newest]}

        update_record(self._path, rewrite)

    def _parse(self, document: Mapping[str, Any] | None) -> list[Measurement]:
        listed = document.get("measurements") if document else None
        found = []
        for item in listed if isinstance(listed, list) else []:
            try:
                found.append(from_json(Measurement, item, where="measurement"))
            except ValueError as error:
                # Of another version of phirt, or damaged: it is measured again.
                _logger.info("Passed over a measurement in %s: %s", self._path, error)
        return found


def _key(measurement: Measurement) -> tuple[object, ...]:
    """What a measurement replaces: an earlier one with other versions is of no use any more."""
    return (
        measurement.artifact,
        measurement.backend,
        measurement.device,
        measurement.hardware,
        measurement.setting,
    )
