"""Which backend loads an artifact, and on which device.

A named backend or device is used or an error says why not; only ``"auto"`` chooses.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from phirt.devices.names import DeviceName
from phirt.dispatch.registry import backend_names, get_backend
from phirt.errors import (
    BackendBrokenError,
    BackendError,
    BackendNotInstalledError,
    DeviceError,
    DeviceNotAvailableError,
    UnsupportedModelError,
)
from phirt.protocols import LoadedModel, LoadOptions, Reject
from phirt.types import Artifact

__all__ = ["Selection", "check_available", "load_artifact"]

_logger = logging.getLogger(__name__)

# What "auto" tries, in order. A device enters this list with the backend that drives it.
_AUTO_DEVICES = ("cpu",)

# What a probe says of a device that a load may be tried on.
_USABLE = ("found", "loads", "ran")


@dataclass(frozen=True, slots=True)
class Selection:
    """A loaded model, and how it came to be loaded this way.

    Attributes:
        backend: Name of the backend that loaded it.
        device: Name of the device that it runs on.
        loaded: The model.
        reasons: One sentence for each candidate that was passed over.
    """

    backend: str
    device: str
    loaded: LoadedModel
    reasons: tuple[str, ...]


def check_available(*, device: str, backend: str) -> None:
    """Refuse what cannot work on this machine, before a model is fetched for it.

    Args:
        device: A device name, or ``"auto"``.
        backend: A backend name, or ``"auto"``.

    Raises:
        UnknownBackendError: No such backend.
        BackendNotInstalledError: The runtimes that could do it are not installed.
        BackendBrokenError: One is installed, and does not import.
        DeviceNotAvailableError: No runtime here offers the device.
        ValueError: ``device`` is malformed.
    """
    wanted = DeviceName.parse(device)
    names = backend_names() if backend == "auto" else [backend]
    offered = [found for name in names for found in get_backend(name).probe()]
    if wanted.kind != "auto":
        known = sorted({found.device for found in offered})
        offered = [found for found in offered if found.device == str(wanted)]
        if not offered:
            raise DeviceNotAvailableError(
                f"Device '{wanted}' is not available to {_which(names)}, which offers: "
                f'{", ".join(known) or "none"}. Pass one of these, or device="auto".'
            )
    if any(found.status in _USABLE for found in offered):
        return
    reasons = " ".join(found.reason for found in offered) or "No backend is registered."
    broken = any(found.status == "broken" for found in offered)
    raise (BackendBrokenError if broken else BackendNotInstalledError)(reasons)


def load_artifact(
    artifact: Artifact, *, device: str, backend: str, options: LoadOptions
) -> Selection:
    """Load an artifact on the backend and device asked for.

    Args:
        artifact: What to load.
        device: A device name, or ``"auto"``.
        backend: A backend name, or ``"auto"``.
        options: Passed on to the backend.

    Raises:
        UnknownBackendError: No such backend.
        DeviceNotAvailableError: The named device is not to be had.
        BackendError: The named backend cannot load the model here, or none can.
        ModelError: The model itself is at fault; no other backend is tried.
    """
    wanted = DeviceName.parse(device)
    devices = _AUTO_DEVICES if wanted.kind == "auto" else (str(wanted),)
    names = backend_names() if backend == "auto" else [backend]
    rejected: list[str] = []
    failed: list[BackendError | DeviceError] = []
    for name in names:
        adapter = get_backend(name)
        for candidate in devices:
            verdict = adapter.accepts(artifact, candidate)
            if isinstance(verdict, Reject):
                rejected.append(_sentence(name, candidate, verdict))
                continue
            try:
                loaded = adapter.load(artifact, candidate, options)
            except (BackendError, DeviceError) as error:
                failed.append(error)
                continue
            reasons = (*rejected, *map(str, failed))
            for reason in reasons:
                _logger.info("Passed over: %s", reason)
            return Selection(name, candidate, loaded, reasons)
    raise _nothing_fits(artifact, wanted, names, rejected, failed)


def _sentence(name: str, device: str, verdict: Reject) -> str:
    fix = f" {verdict.fix}" if verdict.fix else ""
    return f"{name} on {device}: {verdict.reason}.{fix}"


def _nothing_fits(
    artifact: Artifact,
    wanted: DeviceName,
    names: list[str],
    rejected: list[str],
    failed: list[BackendError | DeviceError],
) -> Exception:
    if len(failed) == 1:
        return failed[0]
    if failed:
        tried = " ".join(map(str, failed))
        return BackendError(f"No backend could load {artifact.name!r}: {tried}")
    reasons = " ".join(rejected)
    if wanted.kind not in ("auto", *_AUTO_DEVICES):
        return DeviceNotAvailableError(
            f"Device '{wanted}' is not available to {_which(names)}: {reasons}"
        )
    return UnsupportedModelError(f"No backend can run {artifact.name!r}: {reasons}")


def _which(names: list[str]) -> str:
    return f"backend {names[0]!r}" if len(names) == 1 else "any backend"
