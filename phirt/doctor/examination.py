"""Looks at everything, and says what is wrong, worst first."""

from __future__ import annotations

from phirt.devices.machine import Machine
from phirt.dispatch.survey import Survey
from phirt.doctor.finding import AREAS, SEVERITIES, Finding
from phirt.doctor.packages import examine_packages, read_installed
from phirt.doctor.runtimes import examine_machine
from phirt.doctor.storage import examine_records, examine_store
from phirt.doctor.telemetry import examine_telemetry
from phirt.doctor.versions import examine_versions
from phirt.types import ProgressCallback

__all__ = ["diagnose"]


def diagnose(
    *,
    deep: bool = False,
    machine: Machine | None = None,
    progress: ProgressCallback | None = None,
) -> list[Finding]:
    """What is wrong with this installation of phirt, and what mends it.

    Nothing is changed, beyond what is remembered of the machine. Runtimes are asked in
    processes of their own, so that one that crashes is a finding and no more.

    Args:
        deep: Hash every file of the store, and try every device; else sizes and times are
            compared, and only what was tried before is known of devices.
        machine: The record of the machine; None to ask it.
        progress: Told how far hashing has come.

    Returns:
        All that was looked at, by severity, and within it by area.
    """
    # Before the machine is asked: what phirt turns off then must not look as if the user had.
    telemetry = list(examine_telemetry())
    installed = read_installed()
    if machine is None:
        machine = Survey().machine(trials="all" if deep else "cached")
    files = [*examine_packages(installed), *examine_versions(installed)]
    findings = [
        *files,
        *examine_machine(machine, installed, told=files),
        *telemetry,
        *examine_store(deep=deep, progress=progress),
        *examine_records(),
    ]
    return sorted(
        findings, key=lambda each: (SEVERITIES.index(each.severity), AREAS.index(each.area))
    )
