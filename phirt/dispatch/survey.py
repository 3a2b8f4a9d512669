"""Asks every runtime what it finds on this machine, each in a process of its own, and remembers.

A runtime is asked twice: for a list of devices, and to run a tiny model on each
(`phirt.dispatch.trial_model`). What it answers stays the same until a package, a driver, the
hardware or an environment variable changes; the answers are kept in a file that is named by
all of these.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, TypeVar

from phirt._version import __version__
from phirt.backends.importing import import_runtime, unavailable
from phirt.devices.child import CHILD, run_child
from phirt.devices.hardware import System, read_environment, read_system
from phirt.devices.installed import Installed, runtime_versions, scan_installed
from phirt.devices.machine import BackendRecord, Machine, Trial
from phirt.devices.memory import read_memory
from phirt.devices.merge import to_try
from phirt.devices.record_json import from_json
from phirt.dispatch.machine_dir import machine_dir
from phirt.dispatch.probing import DEVICE_FIX, RUNTIME_FIX, list_backend
from phirt.dispatch.registry import backend_names
from phirt.dispatch.survey_cache import SurveyCache, forget_surveys, with_trial
from phirt.errors import BackendError, BackendNotInstalledError

__all__ = ["Report", "Survey", "Trials", "is_imported"]

Trials: TypeAlias = Literal["none", "cached", "all"]
"""Which trials a record has: none, those that were made before, or one of every device."""

Report: TypeAlias = Callable[[str], None]
"""Told what is being asked, in a few words; called from several threads."""

T = TypeVar("T")
R = TypeVar("R")

_LISTING_S = 60.0
_TRIAL_S = 120.0
# One runtime that hangs must not keep the others waiting, and two do not crowd a small machine.
_AT_ONCE = 2

# The modules without which a backend's runtime is not installed, and the extra that brings them.
# One that is not there needs no process to be found missing.
_RUNTIMES = {
    "onnxruntime": (("onnxruntime",), "cpu"),
    "openvino": (("openvino",), "openvino"),
    "onnxruntime-genai": (("onnxruntime_genai",), "genai"),
    "mlx": (("mlx", "mlx_lm"), "mlx"),
    "transformers": (("transformers", "torch"), "torch"),
}
_WITHOUT_RUNTIME = ("reference",)
_CHILD = "phirt.dispatch.probe_child"


class Survey:
    """What is known of this machine, and the way to find out more.

    Args:
        listing_timeout_s: Seconds after which a runtime that lists its devices is given up.
        trial_timeout_s: Seconds after which a trial is given up.
        report: Told what is being asked.
    """

    def __init__(
        self,
        *,
        listing_timeout_s: float = _LISTING_S,
        trial_timeout_s: float = _TRIAL_S,
        report: Report | None = None,
    ) -> None:
        self._listing_timeout_s = listing_timeout_s
        self._trial_timeout_s = trial_timeout_s
        self._report: Report = report or (lambda _: None)
        self._stop = threading.Event()

    def machine(self, *, trials: Trials = "cached") -> Machine:
        """The record of this machine. Memory is read anew, all else where it is not known.

        Args:
            trials: Which trials it is to have.
        """
        here = _Here.look()
        known = here.cache.read()
        names = backend_names()
        missing = [name for name in names if name not in known]
        found = self._two_at_a_time(lambda name: self._listed(here.cache, name), missing)
        known |= dict(zip(missing, found, strict=True))
        records = [known[name] for name in names]
        if trials == "all":
            records = self._try_all(here.cache, records)
        elif trials == "none":
            records = [replace(record, trials=()) for record in records]
        return here.record(records)

    def backend(self, name: str) -> BackendRecord:
        """What is known of one backend, which is asked where nothing is.

        Args:
            name: Name of the backend.
        """
        cache = _Here.look().cache
        return cache.read().get(name) or self._listed(cache, name)

    def trial(self, backend: str, device: str) -> Trial:
        """Run a tiny model on a device, or say what came of it before.

        Args:
            backend: Name of the backend.
            device: The device, as the backend lists it.
        """
        return self._tried(_Here.look().cache, backend, device)

    def refresh(self) -> None:
        """Forget lists, trials and verdicts of this machine, and end all quarantines."""
        from phirt.dispatch import quarantine
        from phirt.dispatch.canary import forget_verdicts

        forget_surveys(machine_dir())
        forget_verdicts()
        quarantine.release()

    def _try_all(self, cache: SurveyCache, records: list[BackendRecord]) -> list[BackendRecord]:
        wanted = [(record.backend, device) for record in records for device in to_try(record)]
        made = self._two_at_a_time(lambda each: self._tried(cache, *each), wanted)
        tried = {record.backend: record for record in records}
        for (name, _), trial in zip(wanted, made, strict=True):
            tried[name] = with_trial(tried[name], trial)
        return list(tried.values())

    def _listed(self, cache: SurveyCache, name: str) -> BackendRecord:
        missing = _find_missing(name)
        if missing is not None:
            return missing
        # Of several processes that start at once, one asks, and the others read.
        with cache.held(name):
            known = cache.read().get(name)
            if known is None:
                self._report(f"asking {name}")
                known, is_lasting = self._list(name)
                if is_lasting:
                    cache.save(known)
            return known

    def _tried(self, cache: SurveyCache, name: str, device: str) -> Trial:
        with cache.held(name):
            known = cache.read().get(name)
            trial = None if known is None else known.trial(device)
            if trial is None:
                self._report(f"trying {name} on {device}")
                trial, is_lasting = self._try(name, device)
                if is_lasting:
                    cache.add_trial(name, trial)
            return trial

    def _list(self, name: str) -> tuple[BackendRecord, bool]:
        """What a backend lists, and whether to expect the same again."""
        end = run_child(
            _CHILD,
            ["list", name, str(2 * self._listing_timeout_s)],
            timeout_s=self._listing_timeout_s,
            stop=self._stop,
        )
        if end.ending == "not run" and not self._stop.is_set():
            found = list_backend(name)
            reason = found.reason or f"Asked in this process: {end.reason}."
            return replace(found, reason=reason), False
        if end.ending == "answered":
            record = from_json(BackendRecord, json.loads(end.answer), where=name)
        else:
            record = BackendRecord(
                backend=name,
                outcome=end.ending,
                reason=f"Asked for its devices, its process {end.reason}.",
                fix=RUNTIME_FIX,
            )
        return replace(record, seconds=round(end.seconds, 3)), end.lasts

    def _try(self, name: str, device: str) -> tuple[Trial, bool]:
        """What came of a trial, and whether to expect the same again."""
        end = run_child(
            _CHILD,
            ["try", name, device, str(2 * self._trial_timeout_s)],
            timeout_s=self._trial_timeout_s,
            stop=self._stop,
        )
        if end.ending == "not run":
            reason = f"Not tried: {end.reason}."
            return Trial(device=device, outcome="not run", reason=reason), False
        if end.ending == "answered":
            trial = from_json(Trial, json.loads(end.answer), where=f"{name} on {device}")
        else:
            trial = Trial(
                device=device,
                outcome=end.ending,
                reason=f"Running a tiny model there, its process {end.reason}.",
                fix=DEVICE_FIX,
            )
        return replace(trial, seconds=round(end.seconds, 3)), end.lasts

    def _two_at_a_time(self, work: Callable[[T], R], items: Iterable[T]) -> list[R]:
        pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="phirt-survey")
        try:
            return list(pool.map(work, items))
        except BaseException:
            # After Ctrl-C, what has begun is ended, and what has not does not begin.
            self._stop.set()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            self._stop.clear()


def is_imported(backend: str) -> bool:
    """Whether a backend's runtime is in this process already, or need not be imported.

    A process that was started to ask a backend is spared nothing by another one, either.
    """
    if CHILD in os.environ or backend in _WITHOUT_RUNTIME:
        return True
    modules, _ = _RUNTIMES.get(backend, ((), ""))
    return bool(modules) and all(module in sys.modules for module in modules)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Here:
    """What this machine is without asking any runtime, and where its answers are kept."""

    system: System
    environment: Mapping[str, str]
    distributions: Mapping[str, str]
    cache: SurveyCache

    @classmethod
    def look(cls) -> _Here:
        if CHILD in os.environ:
            raise BackendError(
                "This process was started to ask a backend for its devices, and the backend asks "
                "phirt for them."
            )
        system, environment = read_system(), read_environment()
        installed = scan_installed(sys.path)
        return cls(
            system=system,
            environment=environment,
            distributions=runtime_versions(installed),
            cache=SurveyCache(machine_dir(), _fingerprint(system, environment, installed)),
        )

    def record(self, backends: Iterable[BackendRecord]) -> Machine:
        from phirt.dispatch import quarantine

        return Machine(
            phirt=__version__,
            python=platform.python_version(),
            system=self.system.system,
            release=self.system.release,
            cpu=self.system.cpu,
            memory=read_memory(),
            pci=self.system.pci,
            drivers=self.system.drivers,
            environment=self.environment,
            distributions=self.distributions,
            backends=tuple(backends),
            quarantine=quarantine.entries(),
        )


def _fingerprint(
    system: System, environment: Mapping[str, str], installed: Iterable[Installed]
) -> str:
    """Changes whenever a runtime may answer otherwise."""
    parts = [
        __version__,
        # A cache in the home folder may be read by several machines and interpreters.
        *(sys.version, sys.prefix, system.system, system.release),
        *(system.cpu.name, system.cpu.features, system.pci, sorted(system.drivers.items())),
        *(sorted(environment.items()), sorted(installed)),
    ]
    return hashlib.sha256("\n".join(map(repr, parts)).encode()).hexdigest()[:16]


def _find_missing(name: str) -> BackendRecord | None:
    """The record of a backend whose runtime is not installed, or None where it may be."""
    modules, extra = _RUNTIMES.get(name, ((), ""))
    for module in modules:
        if _may_be_installed(module):
            continue
        try:
            import_runtime(module, backend=name, extra=extra)
        except BackendNotInstalledError as error:
            listing = tuple(unavailable(error, extra=extra))
            return BackendRecord(backend=name, outcome="listed", listing=listing)
    return None


def _may_be_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return True  # a module that an application has put in its place
