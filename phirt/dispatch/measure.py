"""Times one backend on one device with one artifact: prefill and decode, setting by setting.

What is timed is phirt's own decode loop, which is what a user of the model gets. It is done in
a process of its own, where one runs: threads of other runtimes do not spin beside it, its
memory goes when it ends, and a crash is one candidate's and not the application's.

``python -m phirt.dispatch.measure TASK FILE`` is that process.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil

from phirt.devices.child import end_with_parent, run_child
from phirt.devices.record_json import from_json, to_json
from phirt.dispatch.measurements import (
    WORKLOADS,
    Batch,
    Measurement,
    Point,
    Setting,
    artifact_id,
    predict_seconds,
)
from phirt.dispatch.registry import get_backend
from phirt.errors import BackendRuntimeError, PhirtError
from phirt.generation.loop import DecodeLoop
from phirt.generation.params import GenerationParams
from phirt.generation.params_resolved import GenerationDefaults
from phirt.protocols import LoadedModel, LoadOptions
from phirt.types import Artifact

__all__ = ["Effort", "Task", "main", "measure", "measure_apart"]

# Which settings a backend does anything with. Of a plugin nothing is known.
_KNOBS = {
    "onnxruntime": ("threads", "spinning", "pinning"),
    "onnxruntime-genai": ("threads", "spinning"),
    "openvino": ("threads", "pinning"),
    "transformers": ("threads",),
}
# A prompt that took longer is the last of its candidate: longer ones would take minutes, and a
# rate is known by then.
_SLOW_S = 4.0
_TIMEOUT_S = 900.0
_ROWS = WORKLOADS["throughput"].requests


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much time may be spent on one candidate.

    Attributes:
        lengths: Tokens of the prompts, ascending.
        decode_tokens: Tokens that are decoded after each.
        rounds: How often each is timed; the median counts.
        settings: Most settings that are tried.
        budget_s: Seconds after which no further setting is begun.
    """

    lengths: tuple[int, ...]
    decode_tokens: int
    rounds: int
    settings: int
    budget_s: float

    @classmethod
    def thorough(cls) -> Effort:
        """Up to a long prompt, and every setting that may matter."""
        return cls(
            lengths=(32, 128, 512, 1024), decode_tokens=24, rounds=3, settings=8, budget_s=90.0
        )

    @classmethod
    def quick(cls) -> Effort:
        """Two lengths, with the runtime's default settings."""
        return cls(lengths=(32, 256), decode_tokens=12, rounds=2, settings=1, budget_s=20.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is to be timed.

    Attributes:
        name: What the user calls the model.
        path: The folder.
        format: As in `Artifact`.
        architecture: As in `Artifact`.
        precision: As in `Artifact`.
        weights_id: As in `Artifact`.
        backend: Name of the backend.
        device: Device name.
        version: Of the runtime, or None where it does not tell.
        hardware: `hardware_id` of the machine.
        cores: Physical cores, or None.
        threads: Logical processors.
        effort: How much time may be spent.
    """

    name: str
    path: str
    format: str
    architecture: str | None
    precision: str | None
    weights_id: str
    backend: str
    device: str
    version: str | None
    hardware: str
    cores: int | None
    threads: int
    effort: Effort

    @property
    def artifact(self) -> Artifact:
        """What is loaded."""
        return Artifact(
            name=self.name,
            path=Path(self.path),
            format=self.format,
            architecture=self.architecture,
            precision=self.precision,
            weights_id=self.weights_id,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """What a child found."""

    measurements: tuple[Measurement, ...] = ()
    error: str | None = None


def measure_apart(task: Task) -> list[Measurement]:
    """Time a candidate in a process of its own, or in this one where none can be started.

    Returns:
        One measurement a setting.

    Raises:
        BackendRuntimeError: It fails, crashes or hangs before one setting was timed.
    """
    end = run_child("phirt.dispatch.measure", [json.dumps(to_json(task))], timeout_s=_TIMEOUT_S)
    if end.ending == "not run":
        return list(measure(task))
    if end.ending != "answered":
        raise BackendRuntimeError(f"The process that timed it {end.reason}.")
    answer = from_json(_Answer, json.loads(end.answer), where="answer")
    if answer.error is not None:
        raise BackendRuntimeError(answer.error)
    return list(answer.measurements)


def measure(task: Task) -> Iterator[Measurement]:
    """Time a candidate in this process, setting by setting, the runtime's defaults first.

    Raises:
        PhirtError: It cannot be loaded or fails.
    """
    backend = get_backend(task.backend)

    def load(setting: Setting) -> LoadedModel:
        options = LoadOptions(
            threads=setting.threads, spinning=setting.spinning, pinning=setting.pinning
        )
        return backend.load(task.artifact, task.device, options)

    started = time.perf_counter()
    found: list[Measurement] = []
    for setting in _settings(task, found):
        if found and time.perf_counter() - started > task.effort.budget_s:
            return
        model = load(setting)
        try:
            points = _points(model, task.effort)
            batch = _batch(model, task.effort)
        finally:
            model.close()
        found.append(
            Measurement(
                artifact=artifact_id(task.weights_id, task.format, task.precision),
                backend=task.backend,
                device=task.device,
                version=task.version,
                hardware=task.hardware,
                setting=setting,
                points=points,
                batch=batch,
                when=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            )
        )
        yield found[-1]


def _settings(task: Task, found: Sequence[Measurement]) -> Iterator[Setting]:
    """Settings to try: the default, numbers of threads, and what else there is with the best.

    Args:
        task: What is timed.
        found: What was found so far, which grows while this is iterated.
    """
    yield Setting()
    knobs = _KNOBS.get(task.backend, ()) if task.device == "cpu" else ()
    left = task.effort.settings - 1
    if "threads" in knobs:
        cores = task.cores or task.threads
        counts = dict.fromkeys((cores, task.threads, max(1, cores // 2), 1))
        for count in list(counts)[:left]:
            yield Setting(threads=count)
            left -= 1
    if "spinning" in knobs:
        best = _best(found)
        for spinning in (True, False)[:left]:
            yield replace(best, spinning=spinning)
            left -= 1
    if "pinning" in knobs and left > 0 and hasattr(psutil.Process, "cpu_affinity"):
        yield replace(_best(found), pinning=True)


def _best(found: Sequence[Measurement]) -> Setting:
    return min(found, key=lambda m: predict_seconds(m, "latency")).setting


def _points(model: LoadedModel, effort: Effort) -> tuple[Point, ...]:
    points: list[Point] = []
    longest = model.info.context_length - effort.decode_tokens
    # A context shorter than the shortest is measured as far as it goes.
    lengths = [n for n in effort.lengths if n <= longest] or [max(1, longest // 2)]
    _time(model, lengths[0], effort.decode_tokens)  # what is made once is made now
    for length in lengths:
        times = [_time(model, length, effort.decode_tokens)]
        rounds = 1 if times[0][0] > _SLOW_S else effort.rounds
        times += [_time(model, length, effort.decode_tokens) for _ in range(rounds - 1)]
        prefill, decode = (statistics.median(column) for column in zip(*times, strict=True))
        points.append(Point(tokens=length, prefill_s=prefill, decode_s=decode))
        if prefill > _SLOW_S:
            break
    return tuple(points)


def _time(model: LoadedModel, length: int, new_tokens: int) -> tuple[float, float]:
    """Seconds of a prefill, and of each token after it."""
    room = model.info.context_length - length
    params = GenerationParams(
        max_new_tokens=max(1, min(new_tokens, room)), temperature=0.0, ignore_eos=True
    )
    started = time.perf_counter()
    loop = DecodeLoop(
        model, _prompt(model, length), params, defaults=GenerationDefaults.from_config({})
    )
    moments = [time.perf_counter() for _ in loop]
    steps = [after - before for before, after in itertools.pairwise(moments)]
    first = moments[0] - started
    return first, statistics.median(steps) if steps else first


def _batch(model: LoadedModel, effort: Effort) -> Batch | None:
    """Seconds of a step of several rows; None where the model decodes them one by one."""
    if not model.capabilities.batch:
        return None
    length, steps = effort.lengths[0], effort.decode_tokens
    if length + steps > model.info.context_length:
        return None
    room = length + steps
    pool = model.new_pool(slots=_ROWS, capacity=room, expected_length=room)
    try:
        rows = [pool.acquire() for _ in range(_ROWS)]
        for row in rows:
            row.prefill(_prompt(model, length))
        times = [_timed(lambda: pool.decode(rows, [1] * _ROWS).numpy()) for _ in range(steps)]
    finally:
        pool.close()
    return Batch(rows=_ROWS, step_s=statistics.median(times))


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _prompt(model: LoadedModel, length: int) -> list[int]:
    """Tokens as good as any: a decoder without experts takes as long for all of them."""
    ids = np.random.default_rng(length).integers(0, model.info.vocab_size, length)
    return [int(each) for each in ids]


def main(arguments: Sequence[str]) -> None:
    """Carry out a task, and end the process at once."""
    document, file = arguments
    end_with_parent(Path(file).parent)
    task = from_json(Task, json.loads(document), where="task")
    found: list[Measurement] = []
    try:
        for measurement in measure(task):
            found.append(measurement)
            # Settings that were timed before one fails, crashes or hangs are worth having.
            _write(_Answer(measurements=tuple(found)), file)
    # A runtime raises what it likes; the caller is told.
    except Exception as failure:
        if not found:
            is_own = isinstance(failure, PhirtError)
            error = str(failure) if is_own else f"{type(failure).__name__}: {failure}"
            _write(_Answer(error=error), file)
    # Some runtimes hang or crash while the interpreter ends.
    os._exit(0)


def _write(answer: _Answer, file: str) -> None:
    partial = Path(f"{file}.partial")
    partial.write_text(json.dumps(to_json(answer), allow_nan=False), encoding="utf-8")
    partial.replace(file)


if __name__ == "__main__":
    main(sys.argv[1:])
