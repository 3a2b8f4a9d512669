"""The process of one row: loads a model, and times what it is asked to.

``python -m phirt.benchmark.child FOLDER`` is that process (`phirt.devices.worker`). It loads as
a user's program does: `phirt.load`, with the folder, the backend and the device of its row.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass

from phirt.benchmark.report import BenchSample
from phirt.benchmark.streams import Case, time_streams
from phirt.devices.child import CHILD
from phirt.devices.memory import peak_rss
from phirt.devices.record_json import from_json, to_json
from phirt.devices.worker import requests
from phirt.dispatch.asking import check_harmless
from phirt.errors import PhirtError
from phirt.loading import load
from phirt.model import Model

__all__ = ["Load", "Loaded", "Reply", "Request", "main"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is to be loaded.

    Attributes:
        path: The folder.
        backend: Name of the backend.
        device: Device name.
        context: Tokens that there must be memory for.
    """

    path: str
    backend: str
    device: str
    context: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What came of it; the attributes are those of `phirt.benchmark.report.BenchRow`."""

    format: str
    precision: str | None
    weights_id: str
    path: str
    load_s: float
    imported_memory_bytes: int
    loaded_memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One of the two."""

    load: Load | None = None
    case: Case | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What came of a request.

    Attributes:
        loaded: Of a load.
        sample: Of a case.
        peak_memory_bytes: The most that the process had resident so far.
        error: What it failed of, or None.
    """

    loaded: Loaded | None = None
    sample: BenchSample | None = None
    peak_memory_bytes: int = 0
    error: str | None = None


def main() -> None:
    """Serve requests until there are no more, and end the process at once."""
    model: Model | None = None
    for line, answer in requests():
        # From here on it is a program like any other: what `phirt.load` asks runtimes in
        # processes of their own, it may ask.
        os.environ.pop(CHILD, None)
        try:
            request = from_json(Request, json.loads(line), where="request")
            if request.load is not None:
                model, loaded = _load(request.load)
                reply = Reply(loaded=loaded, peak_memory_bytes=peak_rss())
            else:
                assert model is not None  # noqa: S101  # a row is loaded first
                assert request.case is not None  # noqa: S101
                sample = time_streams(model, request.case)
                reply = Reply(sample=sample, peak_memory_bytes=peak_rss())
        # A runtime raises what it likes; whoever asked is told.
        except Exception as failure:
            is_own = isinstance(failure, PhirtError)
            error = str(failure) if is_own else f"{type(failure).__name__}: {failure}"
            reply = Reply(error=error, peak_memory_bytes=peak_rss())
        answer(json.dumps(to_json(reply), allow_nan=False))
    # Some runtimes hang or crash while the interpreter ends.
    os._exit(0)


def _load(wanted: Load) -> tuple[Model, Loaded]:
    # Asking a runtime for the first time in a process of its own is no part of a load.
    check_harmless(wanted.backend)
    imported = peak_rss()
    started = time.perf_counter()
    model = load(
        wanted.path,
        backend=wanted.backend,
        device=wanted.device,
        context=wanted.context,
        offline=True,
    )
    seconds = time.perf_counter() - started
    artifact = model.artifact
    return model, Loaded(
        format=artifact.format,
        precision=artifact.precision,
        weights_id=artifact.weights_id,
        path=str(artifact.path),
        load_s=seconds,
        imported_memory_bytes=imported,
        loaded_memory_bytes=peak_rss(),
    )


if __name__ == "__main__":
    main()
