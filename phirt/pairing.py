"""`phirt.load(prefill=..., decode=...)`: one model over two runtimes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from phirt.backends.paired import PairedModel
from phirt.devices.machine import Machine
from phirt.devices.memory import read_memory
from phirt.devices.names import DeviceName
from phirt.dispatch.candidates import check_backend, check_offered, machine_for
from phirt.dispatch.fit import check_pair_fit
from phirt.dispatch.measurements import WORKLOADS
from phirt.dispatch.pair import choose_pair, join_plans
from phirt.dispatch.plan import PlanRequest
from phirt.dispatch.select import PlanLoader, Selection, without_wrong
from phirt.errors import BackendError, DeviceError, UnsupportedModelError
from phirt.loading import FolderFinder, explain_removal, try_first
from phirt.models.folder import ModelFolder
from phirt.planning import Prepared, name_of, prepare
from phirt.protocols import LoadOptions
from phirt.remote import Announce
from phirt.types import Optimize, ProgressCallback

__all__ = ["Part", "Prepare", "check_pair", "load_fastest_pair", "load_pair", "preparer"]


@dataclass(frozen=True, slots=True)
class Part:
    """One of the two runtimes.

    Attributes:
        backend: Name of the backend.
        device: Device name.
    """

    backend: str
    device: str


def check_pair(
    prefill: object,
    decode: object,
    *,
    device: str,
    backend: str,
    options: Mapping[str, Any] | None,
    failover: bool,
    tune: bool,
    kv_precision: str = "auto",
) -> tuple[Part, Part] | None:
    """What ``prefill`` and ``decode`` name; what cannot be meant is refused.

    None where both are ``"auto"``.

    Args:
        prefill: As for `phirt.load`, and so are the others.
        decode: A backend, or ``"backend:device"``.
        device: ``"auto"``, since the two name theirs.
        backend: ``"auto"``, likewise.
        options: None or empty.
        failover: False.
        tune: False.
        kv_precision: ``"auto"``.

    Raises:
        UnknownBackendError: There is no such backend.
        TypeError: A name is not a string.
        ValueError: A name is malformed or missing, or does not go with the other arguments.
    """
    both = f"prefill={prefill!r} and decode={decode!r}"
    if prefill is None or decode is None:
        there = decode if prefill is None else prefill
        raise ValueError(
            f"{both}: two runtimes share a generation, so both are needed. For one runtime alone, "
            f"pass backend={there!r}."
        )
    is_auto = prefill == decode == "auto"
    parts = None if is_auto else (_part("prefill", prefill), _part("decode", decode))
    first = "openvino" if parts is None else parts[0].backend
    if parts is not None and parts[0] == parts[1]:
        raise ValueError(f"{both} are the same. Pass backend={first!r} instead.")
    for name, value, advice in (
        ("backend", backend, "these name the backends: leave one or the other out"),
        ("kv_precision", kv_precision, "each of the two keeps its cache as it does by itself"),
        ("device", device, f'name it behind its backend: prefill="{first}:{device}"'),
    ):
        if value != "auto":
            raise ValueError(f"{name}={value!r} with {both}: {advice}")
    if options:
        raise ValueError(
            f"options={dict(options)!r} are settings of one runtime, and {both} are two. "
            "Leave the options out."
        )
    if failover:
        raise ValueError(
            f"failover=True with {both}: what is named is used or an error says why not, so that "
            "nothing may take over. Leave one or the other out."
        )
    if tune:
        raise ValueError(
            f"tune=True with {both}: call phirt.tune beforehand, for each backend, and what it "
            "finds is used."
        )
    return parts


def _part(name: str, value: object) -> Part:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a backend's name, not {value!r}")
    backend, colon, device = value.partition(":")
    parsed = DeviceName.parse(device if colon else "cpu")
    if backend == "auto" or parsed.kind == "auto":
        raise ValueError(
            f"{name}={value!r} must name a backend, and the device behind a colon where it is "
            'not the CPU: "openvino", "onnxruntime:cuda"; or both are "auto".'
        )
    check_backend(backend)
    return Part(backend, str(parsed))


Prepare: TypeAlias = Callable[[Part, Machine], Prepared]
"""Plans the load of one part."""


def preparer(
    model: str | Path | None,
    *,
    precision: str,
    context: int | None,
    optimize: Optimize,
    offline: bool,
    progress: ProgressCallback | None,
) -> Prepare:
    """What plans each part of a load alike.

    Args:
        model: As for `phirt.load`, and so are the others.
        precision: A precision.
        context: Tokens.
        optimize: A workload.
        offline: Never touch the network.
        progress: Called as a conversion advances.
    """

    def prepare_part(part: Part, machine: Machine) -> Prepared:
        request = PlanRequest(
            model=name_of(model),
            device=part.device,
            backend=part.backend,
            precision=precision,
            optimize=optimize,
        )
        return prepare(
            model,
            machine=machine,
            request=request,
            context=context,
            offline=offline,
            progress=progress,
        )

    return prepare_part


def load_pair(
    parts: tuple[Part, Part],
    prepare_part: Prepare,
    options: LoadOptions,
    *,
    announce: Announce | None,
) -> tuple[Selection, float]:
    """Load a model on two runtimes.

    Args:
        parts: The one for prefill and the one for decode.
        prepare_part: Plans each of the two.
        options: Passed on to both backends.
        announce: As for `phirt.load`.

    Returns:
        The two as one, and when the load started by `time.perf_counter`, downloads and
        conversions left out.

    Raises:
        OutOfMemoryError: They do not fit beside each other.
        PhirtError: As `phirt.load`.
    """
    started = time.perf_counter()
    sides = []
    for part in parts:
        machine = machine_for(part.backend)
        check_offered(machine, device=part.device, backend=part.backend)
        prepared = prepare_part(part, machine)
        sides.append(_Side(machine, prepared, options, announce, started=started))
    return _load_sides(sides, why="as was asked for")


def _load_sides(
    sides: Sequence[_Side], *, why: str, prompt: int | None = None
) -> tuple[Selection, float]:
    """Load both; a model that does not take a prompt of so many tokens in parts is refused."""
    first, second = (side.prepared.plan.chosen for side in sides)
    if first is not None and second is not None:  # else loading it says why not
        check_pair_fit(first, second, model=sides[0].prepared.plan.model)
    decode = sides[1].load()
    try:
        if prompt is not None:
            _check_window(decode.loaded.info.window, prompt)
        prefill = sides[0].load(beside=decode)
        try:
            loaded = PairedModel(prefill.loaded, decode.loaded)
        except BaseException:
            prefill.loaded.close()
            raise
    except BaseException:
        decode.loaded.close()
        raise
    plan = join_plans(prefill.plan, decode.plan, prefill_from=loaded.prefill_from, why=why)
    chosen = plan.chosen
    assert chosen is not None  # noqa: S101  # as both were
    joined = Selection(chosen.backend, chosen.device, decode.folder, loaded, plan)
    return joined, max(side.started for side in sides)


def load_fastest_pair(
    prepared: Prepared, options: LoadOptions, *, announce: Announce | None
) -> tuple[Selection, float] | str:
    """Load the two candidates of a plan that are fastest together.

    Args:
        prepared: The plan.
        options: Passed on to both backends.
        announce: Called before a download.

    Returns:
        As `load_pair`; or why one of them alone is better, or the two could not be loaded.
    """
    started, plan = time.perf_counter(), without_wrong(prepared.plan, prepared.machine)
    choice = choose_pair(plan)
    if isinstance(choice, str):
        return choice
    # Each as it was measured, or not at all: of other candidates nothing was predicted. Neither
    # was named, so that one that computes wrong numbers is refused.
    sides = [
        _Side(
            prepared.machine,
            replace(prepared, plan=replace(plan, candidates=(replace(each, status="chosen"),))),
            options,
            announce,
            started=started,
        )
        for each in (choice.prefill, choice.decode)
    ]
    try:
        prompt = WORKLOADS[plan.optimize].prompt
        return _load_sides(sides, why=choice.reason, prompt=prompt)
    except (BackendError, DeviceError, UnsupportedModelError) as error:
        return f"no pair was taken: {error}"


class _Side:
    """One of the two, on its way.

    Args:
        machine: The record that its plan was made of.
        prepared: The plan.
        options: Passed on to its backend.
        announce: Called before a download.
        started: When the load started.
    """

    def __init__(
        self,
        machine: Machine,
        prepared: Prepared,
        options: LoadOptions,
        announce: Announce | None,
        *,
        started: float,
    ) -> None:
        self._machine = machine
        self._options = options
        self.prepared = prepared
        self._finder = FolderFinder(prepared, announce, started=started)

    @property
    def started(self) -> float:
        """When its load started."""
        return self._finder.started

    def load(self, *, beside: Selection | None = None) -> Selection:
        """Load it; ``beside`` is what was loaded before it."""
        find_folder, machine = self._finder, self._machine
        if beside is not None:
            machine = replace(machine, memory=read_memory())

        def find(candidate: Any) -> ModelFolder:
            folder = find_folder(candidate)
            if beside is not None:
                _check_one_source(folder, beside.folder)
            return folder

        loader = PlanLoader(
            machine, find, self._options, try_first=try_first, refusals=self.prepared.refusals
        )
        with explain_removal(find_folder.located):
            return loader.load(self.prepared.plan)


def _check_window(window: int | None, prompt: int) -> None:
    """Refuse two runtimes for a prompt that one would run most of.

    Raises:
        UnsupportedModelError: It goes beyond the model's window.
    """
    if window is not None and window <= prompt:
        raise UnsupportedModelError(
            f"beyond the model's window of {window} tokens one runtime does all of a prompt"
        )


def _check_one_source(prefill: ModelFolder, decode: ModelFolder) -> None:
    """Refuse what nobody can tell to be one model.

    Raises:
        UnsupportedModelError: The two are not conversions of one checkpoint.
    """
    found, wanted = _source_of(prefill), _source_of(decode)
    if found != wanted:
        raise UnsupportedModelError(
            f"The forms of the model for the two runtimes are not known to be of one source: "
            f"{prefill.artifact.path} is of {found}, {decode.artifact.path} of {wanted}. Load a "
            "checkpoint (a .gguf file, a folder of safetensors), which phirt converts for both."
        )


def _source_of(folder: ModelFolder) -> str:
    """The identity of the weights that a folder was made of, or is."""
    manifest = folder.manifest
    if manifest is None:
        return folder.artifact.weights_id
    return str(manifest.source.get("id", manifest.weights_id))
