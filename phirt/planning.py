"""What `phirt.load` would do with a model on this machine, and why: `plan`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from phirt.conversion import check_precision_name
from phirt.devices.hardware import hardware_id
from phirt.devices.machine import Machine
from phirt.devices.names import DeviceName
from phirt.dispatch.candidates import check_backend, machine_for
from phirt.dispatch.measurements import Measurements
from phirt.dispatch.plan import DEFAULT_CONTEXT, Plan, PlannedArtifact, PlanRequest
from phirt.dispatch.planner import OFFERED, Accepts, make_plan
from phirt.dispatch.registry import formats_of, get_backend
from phirt.errors import (
    BackendError,
    ModelNotFoundError,
    PhirtError,
    UnknownBackendError,
    UnsupportedModelError,
)
from phirt.forms import Forms
from phirt.models.catalog import DEFAULT_MODEL
from phirt.protocols import KV_PRECISIONS, Accept, Reject
from phirt.types import Artifact, Optimize, ProgressCallback

if TYPE_CHECKING:
    from collections.abc import Mapping

    from phirt.dispatch.shape import ModelShape

__all__ = ["Prepared", "check_settings", "name_of", "plan", "plan_on", "prepare"]

_OPTIMIZE = ("latency", "prefill", "throughput")
_MAX_CONTEXT = 1 << 31


def plan(
    model: str | Path | None = None,
    *,
    device: str = "auto",
    backend: str = "auto",
    precision: str = "auto",
    context: int | None = None,
    optimize: Optimize = "latency",
    kv_precision: str = "auto",
    offline: bool = False,
) -> Plan:
    """Say what `phirt.load` would do with a model, and why. Nothing is fetched or converted.

    Every backend and device is in the plan, ranked, or rejected with the reason and what
    would mend it.

    Args:
        model: As for `phirt.load`.
        device: As for `phirt.load`.
        backend: As for `phirt.load`.
        precision: As for `phirt.load`.
        context: Tokens of prompt and answer that there must be memory for; None for 2,048,
            or the model's own limit if that is less.
        optimize: What the choice is for: ``"latency"`` (one answer to a prompt of ordinary
            length), ``"prefill"`` (long prompts, short answers) or ``"throughput"`` (tokens a
            second of many requests at once). It counts where speeds were measured.
        kv_precision: As for `phirt.load`.
        offline: As for `phirt.load`.

    Raises:
        ModelError: There is no such model, or it cannot be read.
        UnknownBackendError: There is no such backend.
        TypeError: An argument is of a wrong type.
        ValueError: A name is malformed, or a setting out of range.
    """
    return plan_on(
        None,
        model,
        device=device,
        backend=backend,
        precision=precision,
        context=context,
        optimize=optimize,
        kv_precision=kv_precision,
        offline=offline,
    ).plan


def plan_on(
    machine: Machine | None,
    model: str | Path | None,
    *,
    device: str,
    backend: str,
    precision: str,
    context: int | None,
    optimize: Optimize,
    offline: bool,
    kv_precision: str = "auto",
    progress: ProgressCallback | None = None,
) -> Prepared:
    """`plan`, on this machine or on that of a record, and what it was made of.

    Args:
        machine: The record, or None for this machine.
        model: As for `plan`, and so are the others.
        device: A device name.
        backend: A backend name.
        precision: A precision.
        context: Tokens.
        optimize: A workload.
        kv_precision: One of a KV cache.
        offline: Never touch the network.
        progress: Called where a form of the model is converted later on.
    """
    check_settings(
        model, precision=precision, context=context, optimize=optimize, kv_precision=kv_precision
    )
    check_backend(backend)
    DeviceName.parse(device)
    prepared = prepare(
        model,
        machine=machine or machine_for("auto"),
        request=PlanRequest(
            model=name_of(model),
            device=device,
            backend=backend,
            precision=precision,
            optimize=optimize,
            kv_precision=kv_precision,
        ),
        context=context,
        offline=offline,
        progress=progress,
        # The runtimes of another machine are not here to be asked.
        ask_adapters=machine is None,
    )
    if machine is not None:
        return prepared
    # Imported here: what loads a plan, a plan of another machine does not need.
    from phirt.dispatch.select import without_wrong

    return replace(prepared, plan=without_wrong(prepared.plan, prepared.machine))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A plan, and what it was made of.

    Attributes:
        plan: The plan.
        machine: The record of the machine.
        forms: The forms of the model.
        refusals: Why a backend can have it in none, by backend.
    """

    plan: Plan
    machine: Machine
    forms: Forms
    refusals: Mapping[str, PhirtError]


def prepare(
    model: str | Path | None,
    *,
    machine: Machine,
    request: PlanRequest,
    context: int | None,
    offline: bool,
    progress: ProgressCallback | None,
    ask_adapters: bool = False,
) -> Prepared:
    """Plan a load on this machine.

    Args:
        model: As for `phirt.load`.
        machine: The machine's record.
        request: What was asked for.
        context: As for `plan`.
        offline: As for `phirt.load`.
        progress: As for `phirt.load`.
        ask_adapters: Whether adapters are asked if they accept what is here, which may import
            their runtimes; those that crashed when they were listed are not.

    Raises:
        ModelError: There is no such model, or it cannot be read.
        ValueError: A precision was named for a folder that cannot be converted.
    """
    forms = Forms(model, precision=request.precision, offline=offline, progress=progress)
    artifacts, refusals = _forms_for(machine, forms, request)
    shape = forms.shape(artifacts, thorough=ask_adapters)
    planned = make_plan(
        machine,
        artifacts,
        _with_context(request, context, shape),
        refusals={name: str(error) for name, error in refusals.items()},
        shape=shape,
        measurements=Measurements().find(hardware_id(machine)),
        accepts=_adapters_of(request.model) if ask_adapters else None,
    )
    return Prepared(plan=planned, machine=machine, forms=forms, refusals=refusals)


def name_of(model: str | Path | None) -> str:
    """What a model was asked for as."""
    return DEFAULT_MODEL if model is None else str(model)


def check_settings(
    model: object,
    *,
    precision: str,
    context: object = None,
    optimize: object = "latency",
    kv_precision: object = "auto",
) -> None:
    """Refuse what cannot be meant.

    Raises:
        TypeError: An argument is of a wrong type.
        ValueError: A setting is out of range.
    """
    if model is not None and not isinstance(model, str | Path):
        raise TypeError(f"model must be a name or a path, not {type(model).__name__}")
    if optimize not in _OPTIMIZE:
        raise ValueError(f"optimize={optimize!r} is not one of {', '.join(_OPTIMIZE)}")
    if kv_precision not in ("auto", *KV_PRECISIONS):
        names = ", ".join(KV_PRECISIONS)
        raise ValueError(f"kv_precision={kv_precision!r} is not auto or one of {names}")
    if context is not None:
        if isinstance(context, bool) or not isinstance(context, int):
            raise TypeError(f"context must be an int or None, not {context!r}")
        if not 1 <= context <= _MAX_CONTEXT:
            raise ValueError(f"context={context} must be from 1 to {_MAX_CONTEXT}, or None")
    check_precision_name(precision)


def _with_context(
    request: PlanRequest, context: int | None, shape: ModelShape | None
) -> PlanRequest:
    limit = DEFAULT_CONTEXT if shape is None else shape.context_length
    if context is None:
        return replace(request, context=min(DEFAULT_CONTEXT, limit))
    if shape is not None and context > limit:
        raise ValueError(
            f"context={context} is more than the {limit} tokens that {request.model!r} was made "
            "for. Pass less, or None."
        )
    return replace(request, context=context)


def _forms_for(
    machine: Machine, forms: Forms, request: PlanRequest
) -> tuple[list[PlannedArtifact], dict[str, PhirtError]]:
    """What each backend that may be meant could load, and why others can load nothing."""
    wanted = DeviceName.parse(request.device)
    found: dict[PlannedArtifact, None] = {}
    refusals: dict[str, PhirtError] = {}
    for record in machine.backends:
        name = record.backend
        if request.backend not in ("auto", name):
            continue
        try:
            formats = formats_of(name, imports=not record.is_fatal)
        except UnknownBackendError as error:
            refusals[name] = error  # a plugin of the machine that was recorded
            continue
        kinds = {wanted.kind}
        if wanted.kind == "auto":
            # Of one that is not installed too: what the store holds for it, "auto" does not
            # fetch once more for another.
            offered = [each.device for each in record.listing if each.status in OFFERED]
            kinds = {DeviceName.parse(device).kind for device in offered or ["cpu"]}
        for kind in sorted(kinds):
            try:
                artifacts = forms.read_by(formats, kind)
            except (ModelNotFoundError, UnsupportedModelError, BackendError) as error:
                refusals[name] = error
                continue
            found |= dict.fromkeys(replace(each, backends=(name,)) for each in artifacts)
    absent = [each for each in refusals.values() if isinstance(each, ModelNotFoundError)]
    if absent and not found:
        raise absent[0]  # for nobody, which is no matter of backends
    return list(found), refusals


def _adapters_of(model: str) -> Accepts:
    """Asks the adapters whether they take what is here."""

    def ask(artifact: PlannedArtifact, backend: str, device: str) -> Accept | Reject:
        assert artifact.path is not None  # noqa: S101  # it is here
        described = Artifact(
            name=model,
            path=artifact.path,
            format=artifact.format,
            architecture=None,
            precision=artifact.precision,
            weights_id=artifact.id or "",
        )
        try:
            return get_backend(backend).accepts(described, device)
        except PhirtError as error:
            return Reject(str(error))

    return ask
