"""What a benchmark found: raw times, the figures that follow from them, and what was left out."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phirt.devices.machine import Cpu, PciDevice
from phirt.devices.record_json import to_json

__all__ = [
    "BenchFailure",
    "BenchMachine",
    "BenchPoint",
    "BenchReport",
    "BenchRow",
    "BenchSample",
    "BenchSettings",
    "Spread",
]

_KIND = "phirt benchmark"


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSample:
    """Times of one repeat: one answer to each of as many prompts as there are streams.

    Attributes:
        ttft_s: Of each stream, seconds from its call to its first token.
        prefill_tokens_per_s: Of each stream, tokens of its prompt by the seconds of its prefill.
        decode_tokens_per_s: Of each stream, (n - 1) / (t_last - t_first) over its n tokens.
        inter_token_s: Of each stream, the seconds between each token and the one before.
        total_s: Seconds from the first call to the last token of all streams.
    """

    ttft_s: tuple[float, ...]
    prefill_tokens_per_s: tuple[float, ...]
    decode_tokens_per_s: tuple[float, ...]
    inter_token_s: tuple[tuple[float, ...], ...]
    total_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A figure over the repeats.

    Attributes:
        median: The median.
        low: The least.
        high: The greatest.
    """

    median: float
    low: float
    high: float

    @property
    def relative(self) -> float:
        """Half the range, by the median."""
        return (self.high - self.low) / 2 / self.median


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchPoint:
    """What was measured at one length of the prompt and one number of streams.

    Where there are several streams, what is said of one is the median over them.

    Attributes:
        prompt_tokens: Tokens of each prompt.
        new_tokens: Tokens of each answer.
        concurrency: Streams at once.
        samples: One for each repeat, in order.
        warm_up: The one before them, which is not counted.
    """

    prompt_tokens: int
    new_tokens: int
    concurrency: int
    samples: tuple[BenchSample, ...]
    warm_up: BenchSample

    @property
    def ttft_s(self) -> Spread:
        """Time to first token of a stream, in seconds."""
        return self._over(lambda each: statistics.median(each.ttft_s))

    @property
    def prefill_tokens_per_s(self) -> Spread:
        """Tokens of the prompt by the seconds of its prefill, of a stream."""
        return self._over(lambda each: statistics.median(each.prefill_tokens_per_s))

    @property
    def decode_tokens_per_s(self) -> Spread:
        """(n - 1) / (t_last - t_first) over the n tokens of a stream."""
        return self._over(lambda each: statistics.median(each.decode_tokens_per_s))

    @property
    def total_tokens_per_s(self) -> Spread:
        """Tokens of all answers by the seconds from the first call to the last token."""
        return self._over(lambda each: self.concurrency * self.new_tokens / each.total_s)

    @property
    def inter_token_p50_s(self) -> float:
        """Median of the seconds between two tokens of a stream, over all streams and repeats."""
        return self._inter_token(0.5)

    @property
    def inter_token_p99_s(self) -> float:
        """Their 99th percentile, by linear interpolation; the greatest where they are few."""
        return self._inter_token(0.99)

    def _over(self, figure: Callable[[BenchSample], float]) -> Spread:
        found = [figure(each) for each in self.samples]
        return Spread(median=statistics.median(found), low=min(found), high=max(found))

    def _inter_token(self, quantile: float) -> float:
        gaps = [gap for each in self.samples for stream in each.inter_token_s for gap in stream]
        return float(np.quantile(gaps, quantile))

    def to_json(self) -> dict[str, Any]:
        """The figures, and the times that they are made of."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "concurrency": self.concurrency,
            "ttft_s": to_json(self.ttft_s),
            "prefill_tokens_per_s": to_json(self.prefill_tokens_per_s),
            "decode_tokens_per_s": to_json(self.decode_tokens_per_s),
            "total_tokens_per_s": to_json(self.total_tokens_per_s),
            "inter_token_p50_s": self.inter_token_p50_s,
            "inter_token_p99_s": self.inter_token_p99_s,
            "samples": [to_json(each) for each in self.samples],
            "warm_up": to_json(self.warm_up),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRow:
    """What was measured with one backend on one device.

    Attributes:
        backend: Name of the backend.
        device: Device name.
        version: Of the runtime, or None where it does not tell.
        format: Layout of what was loaded, as in `phirt.types.Artifact`.
        precision: How its weights are stored, where that is known.
        weights_id: Identity of the weights.
        path: The folder.
        load_s: Seconds of `phirt.load` in a new process, importing the runtime included.
        imported_memory_bytes: Resident memory of the process before that.
        loaded_memory_bytes: The most that it had resident until the model was loaded.
        peak_memory_bytes: The most that it ever had resident, all cases included. Memory of a
            device's own is not in it.
        points: What was measured, by length of the prompt and number of streams.
        notes: Why there is no more, in sentences; empty where all was measured.
    """

    backend: str
    device: str
    version: str | None
    format: str
    precision: str | None
    weights_id: str
    path: str
    load_s: float
    imported_memory_bytes: int
    loaded_memory_bytes: int
    peak_memory_bytes: int
    points: tuple[BenchPoint, ...]
    notes: tuple[str, ...] = ()

    @property
    def described(self) -> str:
        """Backend and device, for a message."""
        return f"{self.backend} on {self.device}"

    def point(self, prompt_tokens: int, concurrency: int) -> BenchPoint | None:
        """What was measured at a length and a number of streams, if anything.

        Args:
            prompt_tokens: Tokens of each prompt.
            concurrency: Streams at once.
        """
        wanted = (prompt_tokens, concurrency)
        found = (each for each in self.points if (each.prompt_tokens, each.concurrency) == wanted)
        return next(found, None)

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return to_json(self) | {"points": [each.to_json() for each in self.points]}


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchFailure:
    """A backend and device of which nothing was measured.

    Attributes:
        backend: Name of the backend.
        device: Device name.
        reason: Why not, in one sentence.
        fix: What the user can do about it, or None.
    """

    backend: str
    device: str
    reason: str
    fix: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings:
    """What was asked for.

    Attributes:
        backend: A backend name, or ``"all"``.
        device: A device name, or ``"all"``.
        precision: A precision, or ``"auto"``.
        prompt_tokens: Lengths of the prompts.
        new_tokens: Tokens of each answer.
        concurrency: Numbers of streams.
        repeats: How often each is measured.
        row_timeout_s: Seconds that one backend on one device may take.
    """

    backend: str
    device: str
    precision: str
    prompt_tokens: tuple[int, ...]
    new_tokens: int
    concurrency: tuple[int, ...]
    repeats: int
    row_timeout_s: float

    @property
    def cases(self) -> list[tuple[int, int]]:
        """Each length of the prompt with each number of streams."""
        return [(length, count) for count in self.concurrency for length in self.prompt_tokens]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchMachine:
    """Where it was measured.

    Attributes:
        system: ``"linux"``, ``"windows"`` or ``"macos"``.
        release: The system's release.
        cpu: The processor.
        memory_bytes: The host's memory.
        pci: Graphics and compute devices that the system sees.
        drivers: Versions of drivers, by name.
        hardware_id: What measurements of `phirt tune` on this hardware are kept under.
        busy_share: Share of the processors' time that was taken just before, by whomever.
    """

    system: str
    release: str
    cpu: Cpu
    memory_bytes: int
    pci: tuple[PciDevice, ...]
    drivers: Mapping[str, str]
    hardware_id: str
    busy_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchReport:
    """What was measured, row by row.

    Attributes:
        model: The model, as it was asked for.
        settings: What was asked for.
        rows: One for each backend on each device that could be measured.
        failures: Those of which nothing was measured, and why.
        takes_turns: Whether the rows took turns, repeat by repeat, so that what else the machine
            did met all of them alike; else one was measured after the other.
        notes: What the reader should know of how the figures came about, in sentences.
        machine: Where it was measured.
        versions: Of phirt, Python and the packages that have to do with a runtime.
        when: When it began, in UTC, ``"2026-11-22T03:00:00Z"``.
    """

    model: str
    settings: BenchSettings
    rows: tuple[BenchRow, ...]
    failures: tuple[BenchFailure, ...]
    takes_turns: bool
    notes: tuple[str, ...]
    machine: BenchMachine
    versions: Mapping[str, str]
    when: str

    def to_json(self) -> dict[str, Any]:
        """All of it in values of JSON, with its ``kind``; names end in their unit."""
        document = to_json(self) | {"rows": [each.to_json() for each in self.rows]}
        return {"kind": _KIND, **document}

    def save_plot(self, path: str | Path) -> None:
        """Draw the speeds of all rows, and curves where several cases were measured.

        Args:
            path: The file; ``.png``, ``.svg`` or ``.pdf``.

        Raises:
            ValueError: It ends otherwise, or nothing was measured.
            BackendNotInstalledError: matplotlib is missing, which draws.
            OSError: It cannot be written.
        """
        # Imported here: few reports are drawn.
        from phirt.benchmark.plots import check_plot, draw

        check_plot(Path(path))
        draw(self, Path(path))
