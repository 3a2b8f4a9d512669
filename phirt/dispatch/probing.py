"""Asks one backend for its devices, or tries one of them, in the process that this runs in."""

from __future__ import annotations

import math
import time
from dataclasses import replace

from phirt.devices.machine import BackendRecord, Trial, TrialOutcome
from phirt.devices.record_json import from_json, to_json
from phirt.dispatch.proof import check_placement
from phirt.dispatch.registry import get_backend
from phirt.errors import (
    DeviceNotAvailableError,
    DevicePlacementError,
    NonFiniteLogitsError,
    OutOfMemoryError,
    PhirtError,
    UnsupportedModelError,
)
from phirt.protocols import Availability, LoadOptions

__all__ = ["DEVICE_FIX", "RUNTIME_FIX", "list_backend", "try_device"]

_REFRESH = "Once that is mended, `phirt devices --refresh` asks again."
RUNTIME_FIX = f"Reinstall or update its runtime. {_REFRESH}"
DEVICE_FIX = f"Update the driver of the device, or the runtime. {_REFRESH}"

# Numbers of a device that works may differ from the expected ones by this, in nats, beyond what
# rounding the weights took: the bound that a model's own canary has, too.
_TOLERANCE = 0.02

# What a reason is cut to: some runtimes append the source of a kernel.
_MOST_CHARACTERS = 1500

_OUTCOMES: tuple[tuple[type[PhirtError], TrialOutcome], ...] = (
    (UnsupportedModelError, "not run"),
    (DeviceNotAvailableError, "no device"),
    (DevicePlacementError, "elsewhere"),
    (NonFiniteLogitsError, "wrong numbers"),
)


def list_backend(name: str) -> BackendRecord:
    """What a backend's probe says, and how long it took."""
    started = time.perf_counter()
    try:
        record = BackendRecord(
            backend=name, outcome="listed", listing=tuple(get_backend(name).probe())
        )
        # What is no list of availabilities is found here, and not where it is used.
        found = from_json(BackendRecord, to_json(record), where="its answer").listing
    # A probe does not raise, but a plugin is somebody else's code.
    except Exception as error:
        return BackendRecord(
            backend=name,
            outcome="raised",
            reason=_sentence(error),
            fix=_fix(error, RUNTIME_FIX),
            seconds=time.perf_counter() - started,
        )
    listing: dict[str, Availability] = {}
    for offer in found:
        listing.setdefault(offer.device, replace(offer, reason=_cut(offer.reason)))
    return BackendRecord(
        backend=name,
        outcome="listed",
        version=next((offer.version for offer in found if offer.version), None),
        listing=tuple(listing.values()),
        seconds=time.perf_counter() - started,
    )


def try_device(name: str, device: str) -> Trial:
    """Run the trial model on a device, and compare its numbers.

    Raises:
        OutOfMemoryError: Something else has the device's memory now, which says nothing of it.
    """
    started = time.perf_counter()
    try:
        kl, bound = _measure(name, device)
    except OutOfMemoryError:
        raise
    # A runtime raises what it likes; what it said is the reason.
    except Exception as error:
        outcome: TrialOutcome = "raised"
        for kind, found in _OUTCOMES:
            outcome = found if isinstance(error, kind) else outcome
        fix = _fix(error, DEVICE_FIX)
        return Trial(device=device, outcome=outcome, reason=_sentence(error), fix=fix)
    seconds = time.perf_counter() - started
    right = kl <= bound  # False for NaN, too
    verdict = "gave the right numbers" if right else "gave wrong numbers"
    return Trial(
        device=device,
        outcome="ran" if right else "wrong numbers",
        reason=f"A tiny model ran there and {verdict}: KL {kl:.1g}, at most {bound:.2g} is right.",
        fix=None if right else DEVICE_FIX,
        kl=kl if math.isfinite(kl) else None,
        seconds=seconds,
    )


def _measure(name: str, device: str) -> tuple[float, float]:
    """The divergence from the expected numbers, and the most that is right."""
    from phirt.dispatch.canary import run_canary
    from phirt.dispatch.trial_model import trial_folder
    from phirt.models.canary import read_canary
    from phirt.models.folder import read_folder

    backend = get_backend(name)
    path = trial_folder(backend.formats)
    if not path.is_dir():  # as where phirt itself is in a zip file
        raise UnsupportedModelError(f"The trial model is no folder of its own: {path}")
    folder = read_folder(path, formats=backend.formats)
    canary = read_canary(folder.artifact.path)
    if canary is None:
        raise UnsupportedModelError(f"{folder.artifact.path} has no canary.json")
    loaded = backend.load(folder.artifact, device, LoadOptions())
    try:
        check_placement(loaded, backend=name, device=device)
        return float(run_canary(loaded, canary)), _TOLERANCE + (canary.own_kl or 0.0)
    finally:
        loaded.close()


def _fix(error: Exception, fix: str) -> str | None:
    """What mends it, where the error does not say so itself as phirt's own do."""
    return None if isinstance(error, PhirtError) else fix


def _sentence(error: Exception) -> str:
    """What an error says; phirt's own need no name of a class before it."""
    text = " ".join(str(error).split())
    is_own = isinstance(error, PhirtError) and text
    return _cut(text if is_own else f"{type(error).__name__}: {text}".rstrip(": "))


def _cut(text: str) -> str:
    """A text without its middle, where it is long."""
    half = _MOST_CHARACTERS // 2
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:half]} [...] {text[-half:]}"
