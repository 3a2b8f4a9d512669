"""``phirt doctor``: what is wrong with the installation, and the command that mends it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from phirt.cli.devices import survey_machine
from phirt.cli.lines import Line, paragraph, print_lines
from phirt.cli.progress import ProgressBars
from phirt.cli.selection import print_json
from phirt.cli.terminal import plain

if TYPE_CHECKING:
    from phirt.doctor import Finding, Severity

__all__ = ["doctor"]

_INDENT = 9  # the longest severity, and two spaces
_STYLES: dict[Severity, str] = {
    "broken": "bold red",
    "warning": "yellow",
    "note": "cyan",
    "ok": "green",
}


def doctor(arguments: argparse.Namespace) -> int:
    """Carry out ``phirt doctor``.

    Returns:
        1 where something is broken, else 0.
    """
    # Imported here: what it looks with is not what the other commands need.
    from phirt.doctor import diagnose

    machine = survey_machine(refresh=False, trials=arguments.deep)
    with ProgressBars() as bars:
        findings = diagnose(deep=arguments.deep, machine=machine, progress=bars)
    broken = any(finding.severity == "broken" for finding in findings)
    if arguments.json:
        print_json({"broken": broken, "findings": [asdict(finding) for finding in findings]})
    else:
        print_lines(lambda width: _lines(findings, width=width))
    return int(broken)


def _lines(findings: Sequence[Finding], *, width: int) -> Iterator[Line]:
    for finding in findings:
        label = (f"{finding.severity:<{_INDENT}}", _STYLES[finding.severity])
        first, *rest = paragraph(f"{finding.area}: {finding.found}", width=width, indent=_INDENT)
        yield [label, (first[0][0].lstrip(), "")]
        yield from rest
        yield from paragraph(finding.why, width=width, indent=_INDENT)
        if finding.command is not None:
            # In one piece, however long, so that it can be copied.
            yield [(" " * _INDENT, ""), (f"$ {plain(finding.command)}", "bold")]
        if finding.severity != "ok":
            yield []
    yield [(_verdict(findings), "")]


def _verdict(findings: Sequence[Finding]) -> str:
    broken = sum(finding.severity == "broken" for finding in findings)
    warnings = sum(finding.severity == "warning" for finding in findings)
    counts = f"{broken} broken, {warnings} warning{'s' * (warnings != 1)}."
    if any(finding.command is not None for finding in findings):
        counts += " The command after $ mends what it stands below."
    return counts if broken or warnings else "Nothing is broken."
