"""Importing runtimes with their telemetry off.

Some of them report to their makers: onnxruntime and onnxruntime-genai what they run, OpenVINO
that it was imported, Hugging Face's libraries what else is installed. Each has a switch, which
is read when it is imported. So all of phirt that imports one of them does it here, which
``tests/test_silence.py`` holds every file to. A user's own setting stands.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

__all__ = ["TELEMETRY", "State", "Telemetry", "import_silently", "silence", "state_of"]

_ON = ("1", "true", "yes", "on")


@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry:
    """What a package sends, and how it is told not to.

    Attributes:
        sends: What it sends, and to whom.
        variables: Environment variables of which any one turns it off, with a value of "1",
            "true", "yes" or "on" in any case; phirt sets the first.
        function: A function of the package that turns it off as well, for what is not sent by
            the package itself (on Windows, onnxruntime hands events to the system).
        hidden: A package that sends for it, and that is kept from it while it is imported.
        opt_out: A command after which it sends nothing, whoever imports it; that it was opted
            out of is the last that is sent.
    """

    sends: str
    variables: tuple[str, ...] = ()
    function: str | None = None
    hidden: str | None = None
    opt_out: str | None = None


@dataclass(frozen=True, slots=True)
class State:
    """Whether a package's telemetry is off, and what says so.

    Attributes:
        off: Whether it sends nothing.
        reason: Why, as a clause.
        early: Whether it is on because it was imported before phirt could turn it off.
        variable: The environment variable that says so, or "".
    """

    off: bool
    reason: str
    early: bool = False
    variable: str = ""


_ORT = Telemetry(
    sends="what is run and on what, with a number for this machine, to Microsoft",
    variables=("ORT_DISABLE_TELEMETRY",),
    function="disable_telemetry_events",
)
_HUB = Telemetry(
    sends="what else is installed and what started it, with every request to a hub",
    variables=("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY", "DO_NOT_TRACK"),
)

TELEMETRY = {
    "onnxruntime": _ORT,
    "onnxruntime_genai": _ORT,
    "openvino": Telemetry(
        sends="that it was imported, with a number for this user, to Google Analytics",
        hidden="openvino_telemetry",
        opt_out="opt_in_out --opt_out",
    ),
    "huggingface_hub": _HUB,
    "transformers": _HUB,  # which asks the hub through huggingface_hub
}
"""The packages known to send something, by the name that is imported."""

_EARLY = State(off=False, reason="it was imported before phirt", early=True)
_lock = threading.Lock()
# Variables that phirt has set: what the user had not said.
_ours: set[str] = set()
# Packages that somebody else had imported, with nothing to turn them off.
_early: set[str] = set()


def import_silently(module: str) -> ModuleType:
    """Import a module of a runtime, or of a plugin to one, with its telemetry off.

    Args:
        module: Full name of the module, such as ``"openvino.opset13"``.

    Raises:
        Exception: Whatever the import raises.
    """
    package = module.partition(".")[0]
    telemetry = TELEMETRY.get(package)
    silence(package)
    if telemetry is None:
        return importlib.import_module(module)
    with _hidden(None if package in sys.modules else telemetry.hidden):
        imported = importlib.import_module(module)
    _call_off(package, telemetry)
    return imported


def silence(package: str) -> None:
    """Turn a package's telemetry off by its variable: for a plain import after this.

    `import_silently` does more where there is more to do.
    """
    telemetry = TELEMETRY.get(package)
    if telemetry is None:
        return
    with _lock:
        is_off = _is_off_by_variable(telemetry)
        if package in sys.modules and not is_off and telemetry.variables:
            _early.add(package)
        # An empty variable is one that is not set, to all of them.
        if telemetry.variables and not any(map(os.environ.get, telemetry.variables)):
            os.environ[telemetry.variables[0]] = "1"
            _ours.add(telemetry.variables[0])


def state_of(package: str) -> State:
    """Whether a package's telemetry is off when phirt uses it. Imports nothing."""
    telemetry = TELEMETRY[package]
    if telemetry.hidden is not None:
        if telemetry.hidden in sys.modules:
            return _EARLY
        return State(off=True, reason=f"phirt keeps {telemetry.hidden} from it")
    said = [name for name in telemetry.variables if os.environ.get(name)]
    if package in _early or (not said and package in sys.modules):
        return _EARLY
    if not said:
        name = telemetry.variables[0]
        return State(off=True, reason=f"phirt sets {name}=1")
    name = next((name for name in said if os.environ[name].lower() in _ON), said[0])
    who = "phirt" if name in _ours else "the environment"
    is_off = os.environ[name].lower() in _ON
    return State(off=is_off, reason=f"{who} has set {name}={os.environ[name]}", variable=name)


def _is_off_by_variable(telemetry: Telemetry) -> bool:
    values = (os.environ.get(name, "") for name in telemetry.variables)
    return any(value.lower() in _ON for value in values)


def _call_off(package: str, telemetry: Telemetry) -> None:
    """Call the package's own function, unless the user has said that it may send."""
    if telemetry.function is None or not _is_off_by_variable(telemetry):
        return
    # Older versions lack it, and have nothing to call off.
    function = getattr(sys.modules[package], telemetry.function, None)
    if function is not None:
        function()


@contextmanager
def _hidden(module: str | None) -> Iterator[None]:
    """Make ``import module`` fail for a while; what was imported before stays as it was."""
    if module is None:
        yield
        return
    with _lock:
        shown = {
            name: sys.modules.pop(name)
            for name in list(sys.modules)
            if name == module or name.startswith(module + ".")
        }
        sys.modules[module] = None  # type: ignore[assignment]  # Python's own word for "absent"
        try:
            yield
        finally:
            del sys.modules[module]
            sys.modules.update(shown)
