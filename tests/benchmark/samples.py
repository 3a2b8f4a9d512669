"""Reports that were not measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from phirt.benchmark.report import (
    BenchFailure,
    BenchMachine,
    BenchPoint,
    BenchReport,
    BenchRow,
    BenchSample,
    BenchSettings,
)
from phirt.devices.machine import Cpu

SETTINGS = BenchSettings(
    backend="all",
    device="all",
    precision="auto",
    prompt_tokens=(128,),
    new_tokens=4,
    concurrency=(1,),
    repeats=3,
    row_timeout_s=300.0,
)


def sample(step_s: float, *, streams: int = 1) -> BenchSample:
    """Four tokens after a prompt of 128, each as late as the one before."""
    return BenchSample(
        ttft_s=(10 * step_s,) * streams,
        prefill_tokens_per_s=(128 / (10 * step_s),) * streams,
        decode_tokens_per_s=(1 / step_s,) * streams,
        inter_token_s=((step_s,) * 3,) * streams,
        total_s=13 * step_s,
    )


def point(step_s: float, *, prompt_tokens: int = 128, streams: int = 1) -> BenchPoint:
    """Three repeats, of which the first is a tenth faster and the last a tenth slower."""
    return BenchPoint(
        prompt_tokens=prompt_tokens,
        new_tokens=4,
        concurrency=streams,
        samples=tuple(sample(step_s * by, streams=streams) for by in (0.9, 1.0, 1.1)),
        warm_up=sample(9 * step_s, streams=streams),
    )


def row(backend: str, *points: BenchPoint, **changes: Any) -> BenchRow:
    """A row on the CPU."""
    made = BenchRow(
        backend=backend,
        device="cpu",
        version="1.2",
        format="onnx-genai",
        precision="int8",
        weights_id="sha256:a",
        path="somewhere",
        load_s=0.5,
        imported_memory_bytes=40_000_000,
        loaded_memory_bytes=200_000_000,
        peak_memory_bytes=1_234_000_000,
        points=points,
    )
    return replace(made, **changes)


def report(*rows: BenchRow, settings: BenchSettings = SETTINGS, **changes: Any) -> BenchReport:
    """A report of rows."""
    made = BenchReport(
        model="tiny",
        settings=settings,
        rows=rows,
        failures=(
            BenchFailure(
                backend="mlx", device="metal", reason="it is \x1b[31mmissing", fix="get a Mac"
            ),
        ),
        takes_turns=True,
        notes=(),
        machine=BenchMachine(
            system="linux",
            release="6.1",
            cpu=Cpu(name="A CPU", architecture="x86_64", cores=2, threads=4),
            memory_bytes=16_000_000_000,
            pci=(),
            drivers={},
            hardware_id="0123",
            busy_share=0.01,
        ),
        versions={"phirt": "0.1.0", "python": "3.13.0"},
        when="2026-11-22T03:00:00Z",
    )
    return replace(made, **changes)
