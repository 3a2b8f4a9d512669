"""``phirt doctor``: what is wrong with the installation, and the command that mends it."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from phirt.cli.progress import ProgressBars
from phirt.cli.selection import print_json
from phirt.cli.terminal import is_terminal, plain

if TYPE_CHECKING:
    from phirt.doctor import Finding, Severity

__all__ = ["doctor"]

_WIDEST = 100
_INDENT = " " * 9  # the longest severity, and two
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

    with ProgressBars() as bars:
        findings = diagnose(deep=arguments.deep, progress=bars)
    broken = any(finding.severity == "broken" for finding in findings)
    if arguments.json:
        print_json({"broken": broken, "findings": [asdict(finding) for finding in findings]})
    else:
        _print(findings)
    return int(broken)


def _print(findings: Sequence[Finding]) -> None:
    if not is_terminal(sys.stdout):
        for finding in findings:
            for label, rest, _ in _lines(finding, width=80):
                print((label + rest).rstrip())
        print(_verdict(findings))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for finding in findings:
        for label, rest, style in _lines(finding, width=min(console.width, _WIDEST)):
            console.print(Text.assemble((label, style), rest), soft_wrap=True)
    console.print(_verdict(findings), soft_wrap=True, markup=False)


def _lines(finding: Finding, *, width: int) -> Iterator[tuple[str, str, str]]:
    """A finding, line by line: a beginning, the rest, and the style of the beginning."""
    label, style = finding.severity.ljust(len(_INDENT)), _STYLES[finding.severity]
    for line in _wrapped(f"{finding.area}: {finding.found}", width):
        yield label, line, style
        label, style = _INDENT, ""
    for line in _wrapped(finding.why, width):
        yield _INDENT, line, ""
    if finding.command is not None:
        # In one piece, however long, so that it can be copied.
        yield f"{_INDENT}$ {plain(finding.command)}", "", "bold"
    if finding.severity != "ok":
        yield "", "", ""


def _wrapped(text: str, width: int) -> list[str]:
    # A path or a name is not broken, or it could not be copied.
    return textwrap.wrap(
        plain(text), width - len(_INDENT), break_long_words=False, break_on_hyphens=False
    )


def _verdict(findings: Sequence[Finding]) -> str:
    broken = sum(finding.severity == "broken" for finding in findings)
    warnings = sum(finding.severity == "warning" for finding in findings)
    counts = f"{broken} broken, {warnings} warning{'s' * (warnings != 1)}."
    if any(finding.command is not None for finding in findings):
        counts += " The command after $ mends what it stands below."
    return counts if broken or warnings else "Nothing is broken."
