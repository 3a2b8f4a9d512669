"""From a name to a loaded model: `load`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phirt.devices.names import DeviceName
from phirt.dispatch.registry import formats_of
from phirt.errors import ModelNotFoundError
from phirt.failover import LoadNext, check_failover
from phirt.model import Model
from phirt.models.folder import ModelFolder
from phirt.prefixes import check_capacity, new_prefix_cache
from phirt.protocols import LoadOptions
from phirt.remote import Announce
from phirt.types import Optimize, ProgressCallback

if TYPE_CHECKING:
    from phirt.devices.machine import Trial
    from phirt.dispatch.plan import PlanCandidate
    from phirt.dispatch.select import Selection
    from phirt.planning import Prepared

__all__ = ["FolderFinder", "explain_removal", "load", "try_first"]

_MAX_THREADS = 1024


def load(
    model: str | Path | None = None,
    *,
    device: str = "auto",
    backend: str = "auto",
    precision: str = "auto",
    context: int | None = None,
    optimize: Optimize = "latency",
    threads: int | None = None,
    spinning: bool | None = None,
    pinning: bool | None = None,
    kv_precision: str = "auto",
    options: Mapping[str, Any] | None = None,
    offline: bool = False,
    prefix_cache_bytes: int | None = None,
    prefill: str | None = None,
    decode: str | None = None,
    failover: bool = False,
    tune: bool = False,
    progress: ProgressCallback | None = None,
    announce: Announce | None = None,
) -> Model:
    """Load a model, fetching and converting it first if that has not been done yet.

    Args:
        model: A name (``"smollm2-135m-instruct"``), a hub's name
            (``"org/name[@revision][:subfolder-or-file]"``), a model folder, or a ``.gguf``
            file. None is the small default model.
        device: A device name such as ``"cpu"``; ``"auto"`` chooses. A named device is
            used, or an error is raised.
        backend: A backend name such as ``"onnxruntime"``; ``"auto"`` chooses.
        precision: How a checkpoint (a ``.gguf`` file, a folder of safetensors) is converted
            to what the backend reads: ``"fp32"``, ``"fp16"``, ``"bf16"``, ``"int8"``,
            ``"int4"``, ``"exact"`` (its own quantized values, repacked), or ``"auto"``: see
            docs/precision.md. A folder that the backend reads as it is has the precision
            that it was built with.
        context: Tokens of prompt and answer that there must be memory for; None for 2,048,
            or the model's own limit if that is less. It bounds nothing: memory is taken as
            it is needed.
        optimize: What ``"auto"`` chooses for, where speeds were measured: ``"latency"``,
            ``"prefill"`` or ``"throughput"``, as for `phirt.plan`.
        threads: Threads within one operator; None for what was measured best, or else the
            runtime's default.
        spinning: Whether idle threads spin while they wait for work: True is best on a
            machine that does nothing else, False on a busy one; None for what was measured
            best, or else a brief spin, which costs little on either.
        pinning: Whether worker threads are bound to a processor each, on onnxruntime and
            OpenVINO; None for what was measured best, or else as their pages say.
        kv_precision: How keys and values are kept: ``"fp32"``, ``"fp16"`` or ``"int8"``, on the
            backends that can; ``"auto"`` is what a backend does by itself. See
            docs/kv-precision.md.
        options: Settings of one runtime, by the names that the page of its backend gives;
            they need a named ``backend``.
        offline: Never touch the network; so does the environment variable
            ``HF_HUB_OFFLINE``.
        prefix_cache_bytes: Most bytes of KV caches that are kept when their requests end, for
            requests that begin with the same tokens; 0 keeps none, None keeps 8,192 tokens,
            and no more than an eighth of the memory that is free. See docs/prefix-reuse.md.
        prefill: With ``decode``, two runtimes for one generation: this backend runs the long
            parts of prompts, the other everything else. On the CPU, or ``"backend:device"``.
            They stand for ``backend`` and ``device``. Both ``"auto"``: the two that were
            measured to be fastest together, or one, where none are. See docs/two-runtimes.md.
        decode: As ``prefill``; the KV cache is handed over between the two.
        failover: Where the backend fails in the middle of a generation, go on with the next
            candidate of the plan: see docs/failover.md. Needs ``"auto"`` as ``device`` or
            ``backend``.
        tune: Time every candidate first that was not measured on this machine yet, and
            choose by that: minutes, once. `phirt.tune` does the same, and tells what came.
        progress: Called as a download or a conversion advances.
        announce: Called with a `phirt.PullPlan` before something is downloaded. What it
            raises ends the load.

    Returns:
        The model. Close it, or use it as a context manager, to free its weights.

    Raises:
        ModelError: The model cannot be found, read, trusted or run.
        BackendError: The backend is unknown, missing or broken, or failed.
        DeviceError: The device is not there, or its memory does not suffice.
        TypeError: An argument is of a wrong type.
        ValueError: A name is malformed or a setting out of range.
    """
    # Imported here: `import phirt` should stay quick.
    from phirt.dispatch.candidates import check_offered, machine_for
    from phirt.dispatch.plan import PlanRequest
    from phirt.dispatch.select import PlanLoader
    from phirt.planning import check_settings, name_of, prepare

    check_settings(
        model, precision=precision, context=context, optimize=optimize, kv_precision=kv_precision
    )
    _check_threads(threads, spinning=spinning, pinning=pinning)
    check_capacity(prefix_cache_bytes)
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(f"options must be a mapping of names to values, not {options!r}")
    if options and backend == "auto":
        raise ValueError(
            f"options={dict(options)!r} are settings of one runtime: name its backend as well"
        )
    DeviceName.parse(device)
    if prefill is not None or decode is not None:
        # Imported here: few loads take two runtimes.
        from phirt.pairing import check_pair, load_fastest_pair, load_pair, preparer

        parts = check_pair(
            prefill,
            decode,
            device=device,
            backend=backend,
            options=options,
            failover=failover,
            tune=tune,
            kv_precision=kv_precision,
        )
        prepare_part = preparer(
            model,
            precision=precision,
            context=context,
            optimize=optimize,
            offline=offline,
            progress=progress,
        )
        pair_options = LoadOptions(threads=threads, spinning=spinning, pinning=pinning)
        if parts is not None:
            selection, started = load_pair(parts, prepare_part, pair_options, announce=announce)
            return _as_model(selection, prefix_cache_bytes, started=started)
    if failover:
        check_failover(device=device, backend=backend)
    machine = machine_for(backend)
    check_offered(machine, device=device, backend=backend)
    request = PlanRequest(
        model=name_of(model),
        device=device,
        backend=backend,
        precision=precision,
        optimize=optimize,
        kv_precision=kv_precision,
    )

    def planned() -> Prepared:
        return prepare(
            model,
            machine=machine,
            request=request,
            context=context,
            offline=offline,
            progress=progress,
        )

    started = time.perf_counter()
    prepared = planned()
    if tune:
        # Imported here: few loads measure.
        from phirt.tuning import time_candidates

        if time_candidates(prepared, announce=announce):
            started = time.perf_counter()
            prepared = planned()
    note = ""
    if prefill is not None:
        found = load_fastest_pair(prepared, pair_options, announce=announce)
        if not isinstance(found, str):
            return _as_model(found[0], prefix_cache_bytes, started=found[1])
        note = f"{found[0].upper()}{found[1:].rstrip('.')}."
    find_folder = FolderFinder(prepared, announce, started=started)
    loader = PlanLoader(
        machine,
        find_folder,
        LoadOptions(
            threads=threads,
            spinning=spinning,
            pinning=pinning,
            kv_precision=None if kv_precision == "auto" else kv_precision,
            extra=dict(options or {}),
        ),
        try_first=try_first,
        refusals=prepared.refusals,
    )
    with explain_removal(find_folder.located):
        return _as_model(
            loader.load(prepared.plan.with_note(note) if note else prepared.plan),
            prefix_cache_bytes,
            started=find_folder.started,
            load_next=loader.load_next if failover else None,
        )


def _as_model(
    selection: Selection,
    prefix_cache_bytes: int | None,
    *,
    started: float,
    load_next: LoadNext | None = None,
) -> Model:
    """The face of what was loaded, which is freed if it cannot be had."""
    try:
        prefixes = new_prefix_cache(selection, prefix_cache_bytes)
        return Model(selection, started=started, prefixes=prefixes, load_next=load_next)
    except BaseException:
        selection.loaded.close()
        raise


class FolderFinder:
    """Finds or makes the folders of candidates, one load long.

    Attributes:
        started: When the load started, by `time.perf_counter`. A download or a conversion
            happens once, and is no part of it.
        located: The folders, in the order in which they were found.
    """

    def __init__(self, prepared: Prepared, announce: Announce | None, *, started: float) -> None:
        self._forms = prepared.forms
        self._announce = announce
        self.started = started
        self.located: list[Path] = []

    def __call__(self, candidate: PlanCandidate) -> ModelFolder:
        """The folder of a candidate, as `phirt.dispatch.select.FindFolder`."""
        assert candidate.artifact is not None  # noqa: S101  # as that of all that are usable
        folder = self._forms.obtain(
            candidate.artifact,
            formats=formats_of(candidate.backend),
            device=DeviceName.parse(candidate.device).kind,
            announce=self._announce,
        )
        if candidate.artifact.state != "here":
            self.started = time.perf_counter()
        self.located.append(folder.artifact.path)
        return folder


def try_first(backend: str, device: str) -> Trial:
    """Run a tiny model there, as `phirt.dispatch.select.TryFirst`."""
    from phirt.dispatch.survey import Survey

    return Survey().trial(backend, device)


@contextmanager
def explain_removal(located: Sequence[Path]) -> Iterator[None]:
    """Say that a model was removed, where that is behind whatever a runtime raised."""
    try:
        yield
    except Exception as error:
        if located and not located[-1].exists():
            raise ModelNotFoundError(
                f"The model at {located[-1]} was removed while it was being loaded."
            ) from error
        raise


def _check_threads(threads: object, **switches: object) -> None:
    for name, value in switches.items():
        if value is not None and not isinstance(value, bool):
            raise TypeError(f"{name} must be True, False or None, not {value!r}")
    if threads is None:
        return
    if isinstance(threads, bool) or not isinstance(threads, int):
        raise TypeError(f"threads must be an int or None, not {threads!r}")
    if not 1 <= threads <= _MAX_THREADS:
        raise ValueError(f"threads={threads} must be from 1 to {_MAX_THREADS}, or None")
