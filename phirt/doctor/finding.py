"""What a look at the installation comes to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["AREAS", "SEVERITIES", "Area", "Finding", "Severity"]

Severity: TypeAlias = Literal["broken", "warning", "note", "ok"]
"""How bad it is.

``broken``: something installed does not work; ``warning``: it may not work, or not as it
should; ``note``: good to know; ``ok``: looked at, and right.
"""

Area: TypeAlias = Literal[
    "packages", "versions", "libraries", "devices", "telemetry", "store", "records"
]
"""What was looked at.

``packages``: files of the installed runtimes; ``versions``: whether they fit together;
``libraries``: of the system; ``devices``: what runtimes do with this machine's; ``telemetry``:
what runtimes would send; ``store``: models on the disk; ``records``: what phirt keeps of this
machine.
"""

SEVERITIES: tuple[Severity, ...] = ("broken", "warning", "note", "ok")
AREAS: tuple[Area, ...] = (
    "packages",
    "versions",
    "libraries",
    "devices",
    "telemetry",
    "store",
    "records",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was found.

    Attributes:
        severity: How bad it is.
        area: What was looked at.
        found: What was found, in a sentence.
        why: Why it matters, in a sentence or two; empty where nothing is wrong.
        command: A command for the shell that mends it, or None where none does.
    """

    severity: Severity
    area: Area
    found: str
    why: str = ""
    command: str | None = None
