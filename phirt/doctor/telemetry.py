"""What the installed runtimes would send, and whether they are kept from it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.machinery import PathFinder

from phirt.doctor.commands import set_variable, unset_variable
from phirt.doctor.finding import Finding
from phirt.silence import TELEMETRY, State, Telemetry, state_of

__all__ = ["examine_telemetry"]


def examine_telemetry() -> Iterator[Finding]:
    """What the installed packages send: one finding for those of which the same is to be said."""
    alike: dict[tuple[Telemetry, State], list[str]] = {}
    for package, telemetry in TELEMETRY.items():
        if PathFinder.find_spec(package) is not None:
            alike.setdefault((telemetry, state_of(package)), []).append(package)
    for (telemetry, state), packages in alike.items():
        yield _describe(" and ".join(packages), telemetry, state)


def _describe(packages: str, telemetry: Telemetry, state: State) -> Finding:
    if state.off:
        return Finding(severity="ok", area="telemetry", found=f"{packages}: off; {state.reason}.")
    why = f"What is sent: {telemetry.sends}."
    if state.early:
        why += " Import phirt before it, or turn it off for every program"
        why += ", which is the last that it sends." if telemetry.opt_out else "."
        command = telemetry.opt_out or set_variable(telemetry.variables[0], "1")
    else:
        why += " phirt leaves what you have set; without it, phirt turns it off."
        command = unset_variable(state.variable)
    return Finding(
        severity="warning",
        area="telemetry",
        found=f"{packages}: on; {state.reason}.",
        why=why,
        command=command,
    )
