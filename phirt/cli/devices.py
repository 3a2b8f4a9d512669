"""``phirt devices``: what this machine has, and what each backend can do with it."""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phirt.cli.arguments import UsageError
from phirt.cli.lines import Line, paragraph, print_lines
from phirt.cli.selection import print_json
from phirt.cli.terminal import is_terminal, plain

if TYPE_CHECKING:
    from phirt.devices.device import Device, DeviceBackend, Status
    from phirt.devices.machine import Machine

__all__ = ["print_devices", "read_machine", "survey_machine"]

_INDENT = 14  # the longest status, between two spaces each
_KINDS = {"cpu": "CPU", "gpu": "GPU", "npu": "NPU"}
_STYLES: dict[Status, str] = {
    "ready": "green",
    "unverified": "yellow",
    "no-device": "dim",
    "missing": "dim",
    "broken": "bold red",
}


def print_devices(arguments: argparse.Namespace) -> None:
    """Carry out ``phirt devices``.

    Raises:
        UsageError: The file named is no record of a machine.
    """
    if arguments.machine is None:
        machine = survey_machine(refresh=arguments.refresh, trials=arguments.trials)
    elif arguments.refresh:
        raise UsageError("--refresh asks this machine, and --machine reads the record of another")
    else:
        machine = read_machine(arguments.machine)
    if arguments.raw:
        from phirt.devices.record_json import to_json

        print_json(_without_home(to_json(machine)))
        return
    from phirt.devices.merge import devices_of

    devices = devices_of(machine)
    if arguments.json:
        print_json([_as_json(device) for device in devices])
    else:
        print_lines(lambda width: _lines(devices, width=width))


def survey_machine(*, refresh: bool, trials: bool) -> Machine:
    """The record of this machine; what is being asked is shown meanwhile.

    Args:
        refresh: Whether to forget what is known, and ask again.
        trials: Whether to try every device; else only what was tried before is known.
    """
    from phirt.dispatch.survey import Survey

    with _progress() as report:
        survey = Survey(report=report)
        if refresh:
            survey.refresh()
        return survey.machine(trials="all" if trials else "cached")


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Shows what is being asked, on a terminal's stderr, and leaves no trace of it."""
    if not is_terminal(sys.stderr):
        yield lambda _: None
        return
    from rich.console import Console
    from rich.markup import escape

    with Console(stderr=True).status("Looking at this machine") as status:
        yield lambda text: status.update(escape(plain(text[:1].upper() + text[1:])))


def read_machine(name: str) -> Machine:
    """The record of a machine in a file, as ``phirt devices --raw`` prints it.

    Args:
        name: The file; ``-`` for stdin.

    Raises:
        UsageError: It is none.
    """
    from phirt.devices.record_json import machine_from_json

    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        # As bytes: PowerShell's ">" writes UTF-16.
        return machine_from_json(json.loads(content))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"--machine {name}: {error}") from error


def _without_home(value: Any) -> Any:
    """A record to give away: paths in it may have the user's name."""
    try:
        home = str(Path.home())
    except RuntimeError:
        return value
    if home == Path(home).anchor:
        return value  # of a user who has none
    pattern = re.compile(rf"{re.escape(home)}(?![\w.-])")

    def strip(part: Any) -> Any:
        if isinstance(part, str):
            return pattern.sub("~", part)
        if isinstance(part, list):
            return [strip(each) for each in part]
        return {key: strip(each) for key, each in part.items()} if isinstance(part, dict) else part

    return strip(value)


def _as_json(device: Device) -> dict[str, Any]:
    fields = asdict(device)
    # What is long comes last.
    return fields | {"backends": fields.pop("backends")}


def _lines(devices: list[Device], *, width: int) -> Iterator[Line]:
    for device in devices:
        name = " ".join(plain(device.name).split())
        yield [(name, "bold"), (_facts(device), "")]
        for row in device.backends:
            yield from _row(row, width=width, is_cpu=device.kind == "cpu")
        yield []
    if any(row.status == "broken" for device in devices for row in device.backends):
        yield from paragraph(
            "What is broken is remembered: `phirt devices --refresh` asks again.", width=width
        )


def _facts(device: Device) -> str:
    facts = [_KINDS[device.kind] + (", computed on the CPU" if device.software else "")]
    if device.memory_bytes:
        facts.append(f"{device.memory_bytes / 1e9:.1f} GB")
    if device.driver:
        facts.append(f"driver {device.driver}")
    return plain(f" ({', '.join(facts)})")


def _row(row: DeviceBackend, *, width: int, is_cpu: bool) -> Iterator[Line]:
    # There is one CPU, whatever a runtime calls it.
    native = None if is_cpu or row.native == row.device else row.native
    head = plain(f"{row.backend:<18} {row.device:<13} ")
    version = ", ".join(filter(None, (row.version, native)))
    first, *others = textwrap.wrap(plain(version), width - _INDENT - len(head)) or [""]
    yield [(f"  {row.status:<{_INDENT - 2}}", _STYLES[row.status]), (f"{head}{first}".rstrip(), "")]
    for line in others:
        yield [(" " * (_INDENT + len(head)) + line, "")]
    # Of what was never installed, the command says it all.
    is_plain = row.status == "missing" and row.version is None and row.fix is not None
    if row.status != "ready" and not is_plain:
        yield from paragraph(row.reason, width=width, indent=_INDENT)
    if row.fix:
        yield from paragraph(row.fix, width=width, indent=_INDENT, style="cyan")
