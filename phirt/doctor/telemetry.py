"""What the installed runtimes would send, and whether they are kept from it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.machinery import PathFinder

from phirt.doctor.commands import set_variable, unset_variable
from phirt.doctor.finding import Finding
from phirt.silence import TELEMETRY, State, Telemetry, state_of

__all__ = ["examine_telemetry"]


def examine_telemetry() -> Iterator[Finding]:
    """One finding for each package that sends something and is installed."""
    for package, telemetry in TELEMETRY.items():
        if PathFinder.find_spec(package) is not None:
            yield _describe(package, telemetry, state_of(package))


def _describe(package: str, telemetry: Telemetry, state: State) -> Finding:
    if state.off:
        found = f"{package}: off; {state.reason}."
        return Finding(severity="ok", area="telemetry", found=found)
    why = f"It sends {telemetry.sends}."
    if state.early:
        if telemetry.opt_out is not None:
            command = telemetry.opt_out
        else:
            command = set_variable(telemetry.variables[0], "1")
        why += " Import phirt's model before it, or turn it off for every program."
    else:
        command = unset_variable(state.reason.split()[-1].partition("=")[0])
        why += " phirt leaves what you have set; without it, phirt turns it off."
    return Finding(
        severity="warning",
        area="telemetry",
        found=f"{package}: on; {state.reason}.",
        why=why,
        command=command,
    )
