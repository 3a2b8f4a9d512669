"""Which backends and devices may be tried, in which order.

A named backend or device stands alone; ``"auto"`` is a list. Each backend is asked what it
offers when its turn comes, so that a load imports one runtime and not all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from phirt.devices.names import DeviceName
from phirt.dispatch.registry import automatic_names, get_backend
from phirt.errors import BackendBrokenError, BackendNotInstalledError, DeviceNotAvailableError
from phirt.protocols import Availability, Backend

__all__ = ["Candidate", "Candidates"]

# What "auto" takes of a backend's devices. Others are used by name: choosing one for the user
# needs proof that it computes the right numbers, which a probe is not.
_AUTO_DEVICES = ("cpu",)

# What a probe says of a device that a load may be tried on.
_USABLE = ("found", "loads", "ran")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A backend on a device.

    Attributes:
        backend: The adapter.
        device: Name of the device.
    """

    backend: Backend
    device: str


class Candidates:
    """What may be tried for a device and a backend that a user asked for.

    Iterating gives `Candidate`s in order of preference. It may be done more than once.

    Args:
        device: A device name, or ``"auto"``.
        backend: A backend name, or ``"auto"``.

    Raises:
        UnknownBackendError: No such backend.
        BackendBrokenError: The adapter of the plugin named cannot be imported.
        TypeError: ``device`` or ``backend`` is not a string.
        ValueError: ``device`` is malformed.
    """

    def __init__(self, *, device: str, backend: str) -> None:
        self.device = DeviceName.parse(device)
        if not isinstance(backend, str):
            raise TypeError(f"backend must be a string, not {type(backend).__name__}")
        self._is_named = backend != "auto"
        self._names = [backend] if self._is_named else automatic_names()
        self._probed: dict[str, tuple[Backend | None, list[Availability]]] = {}
        if self._is_named:
            get_backend(backend)

    def __iter__(self) -> Iterator[Candidate]:
        for name in self._names:
            adapter, offered = self._probe(name)
            if adapter is None:
                continue
            usable = [found.device for found in offered if found.status in _USABLE]
            if self.device.kind == "auto":
                chosen = [device for device in _AUTO_DEVICES if device in usable]
                if not chosen and self._is_named:
                    # A backend without the CPU was named: its first device is meant.
                    chosen = usable[:1]
            else:
                chosen = [str(self.device)] if self._may_be_one_of(usable) else []
            for device in chosen:
                yield Candidate(adapter, device)

    def check(self) -> None:
        """Refuse what cannot work on this machine, before a model is fetched for it.

        Raises:
            BackendNotInstalledError: The runtimes that could do it are not installed.
            BackendBrokenError: One is installed, and does not work.
            DeviceNotAvailableError: No runtime here offers the device.
        """
        if next(iter(self), None) is not None:
            return
        offered = [found for name in self._names for found in self._probe(name)[1]]
        if self.device.kind != "auto":
            known = sorted({found.device for found in offered if found.status in _USABLE})
            here = [found for found in offered if self.device.is_one_of([found.device])]
            if known and not here:
                raise DeviceNotAvailableError(
                    f"Device '{self.device}' is not available to {self.described}, which offers: "
                    f'{", ".join(known)}. Pass one of these, or device="auto".'
                )
            # What is not installed offers nothing, so that to say "cpu" of it would be wrong.
            offered = here or offered
        reasons = " ".join(dict.fromkeys(found.reason for found in offered))
        broken = any(found.status == "broken" for found in offered)
        raise (BackendBrokenError if broken else BackendNotInstalledError)(
            reasons or "No backend is registered."
        )

    @property
    def described(self) -> str:
        """The backends, for a message."""
        return f"backend {self._names[0]!r}" if len(self._names) == 1 else "any backend"

    def _may_be_one_of(self, usable: list[str]) -> bool:
        if self.device.is_one_of(usable):
            return True
        # A kind without a number says nothing of how many there are: the load will. A machine
        # has one CPU.
        kind = self.device.kind
        is_numbered = any(name.startswith(f"{kind}:") for name in usable)
        return kind != "cpu" and kind in usable and not is_numbered

    def _probe(self, name: str) -> tuple[Backend | None, list[Availability]]:
        if name not in self._probed:
            try:
                adapter = get_backend(name)
            except BackendBrokenError as error:
                if self._is_named:
                    raise
                # One plugin that does not import is no reason to do without the others.
                self._probed[name] = (None, [Availability("cpu", "broken", str(error))])
            else:
                self._probed[name] = (adapter, adapter.probe())
        return self._probed[name]
