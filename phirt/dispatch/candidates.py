"""What a machine offers for the device and the backend that were asked for.

``"auto"`` asks the survey, which asks every runtime in a process of its own. A backend that
was named is asked here (`phirt.dispatch.asking`): it is used, or an error says why not.
"""

from __future__ import annotations

import platform
import sys
from dataclasses import replace

from phirt._version import __version__
from phirt.devices.hardware import read_system
from phirt.devices.installed import runtime_versions, scan_installed
from phirt.devices.machine import BackendRecord, Machine
from phirt.devices.memory import read_memory
from phirt.devices.names import DeviceName
from phirt.dispatch.asking import ask_here
from phirt.dispatch.plan import Plan, PlanCandidate, PlannedArtifact, PlanRequest
from phirt.dispatch.planner import OFFERED, make_plan, offer_of
from phirt.dispatch.refusal import not_offered, not_working
from phirt.dispatch.registry import backend_names, check_registered, formats_of, is_automatic
from phirt.types import Availability

__all__ = ["check_backend", "check_offered", "machine_for", "targets"]


def check_backend(backend: object) -> None:
    """Refuse what names no backend.

    Raises:
        UnknownBackendError: No such backend.
        TypeError: It is not a string.
    """
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a string, not {type(backend).__name__}")
    if backend != "auto":
        check_registered(backend)


def machine_for(backend: str) -> Machine:
    """The record of this machine, as far as a choice with this backend needs it.

    Args:
        backend: A backend name, or ``"auto"``.

    Raises:
        UnknownBackendError: No such backend.
        BackendBrokenError: The backend named takes the process along which asks it, or the adapter
            of the plugin named cannot be imported.
        TypeError: It is not a string.
    """
    check_backend(backend)
    if backend == "auto":
        # Imported here: a named backend needs no survey.
        from phirt.dispatch.survey import Survey

        return Survey().machine(trials="cached")
    from phirt.dispatch import quarantine

    asked = ask_here(backend)
    system = read_system()
    # Of the others nothing is known, and nothing is needed.
    others = [name for name in backend_names() if name != backend]
    return Machine(
        phirt=__version__,
        python=platform.python_version(),
        system=system.system,
        release=system.release,
        # What was measured on this machine is found by these.
        cpu=system.cpu,
        pci=system.pci,
        drivers=system.drivers,
        memory=read_memory(),
        backends=(asked, *(BackendRecord(backend=name, outcome="not run") for name in others)),
        quarantine=quarantine.entries(),
    )


def check_offered(machine: Machine, *, device: str, backend: str) -> None:
    """Refuse what cannot work on a machine, before a model is looked for.

    Args:
        machine: The record.
        device: A device name, or ``"auto"``.
        backend: A backend name, or ``"auto"``.

    Raises:
        BackendNotInstalledError: The runtimes that could do it are not installed.
        BackendBrokenError: One is installed, and does not work.
        DeviceNotAvailableError: No runtime there offers the device.
        TypeError: ``device`` is not a string.
        ValueError: ``device`` is malformed.
    """
    wanted = DeviceName.parse(device)
    records = [
        record
        for record in machine.backends
        if record.backend == backend or (backend == "auto" and is_automatic(record.backend))
    ]
    for record in records:
        usable = [found for found in _listing(record) if found.status in OFFERED]
        if usable and (wanted.kind == "auto" or offer_of(usable, wanted) is not None):
            return
    if not machine.distributions:  # which only this needs, where a backend was named
        machine = replace(machine, distributions=runtime_versions(scan_installed(sys.path)))
    plan = _plan_of_anything(machine, device=device, backend=backend)
    rows = [row for row in plan.candidates if row.stage == "runtime"]
    listed = [found for record in records for found in _listing(record)]
    # What is not installed, or does not work, says nothing of what it would offer.
    here = [found for found in listed if wanted.is_one_of([found.device])] or listed
    statuses = {found.status for found in here}
    if statuses.isdisjoint(OFFERED) and "broken" in statuses:
        raise not_working(rows)
    is_missing = statuses.isdisjoint(OFFERED) and "missing" in statuses
    raise not_offered(rows, device=wanted, backend=backend, is_missing=is_missing)


def targets(machine: Machine, *, device: str, backend: str) -> list[PlanCandidate]:
    """Backends and devices in the order in which a model is tried on them.

    Args:
        machine: The record.
        device: A device name, or ``"auto"``.
        backend: A backend name, or ``"auto"``.
    """
    plan = _plan_of_anything(machine, device=device, backend=backend)
    return [candidate for candidate in plan.candidates if candidate.status != "rejected"]


def _plan_of_anything(machine: Machine, *, device: str, backend: str) -> Plan:
    """The plan for a model that every backend can have, and has not."""
    request = PlanRequest(model="", device=device, backend=backend)
    anything = [
        PlannedArtifact(
            format=formats[0], precision=None, state="to fetch", backends=(record.backend,)
        )
        for record in machine.backends
        if (formats := formats_of(record.backend, imports=not record.is_fatal))
    ]
    return make_plan(machine, anything, request)


def _listing(record: BackendRecord) -> list[Availability]:
    if record.listing:
        return list(record.listing)
    reason = f"{record.backend}: {record.reason}"
    if record.outcome == "not run":
        return [Availability("cpu", "found", reason)]
    return [Availability("cpu", "broken", reason, record.fix)] if record.reason else []
