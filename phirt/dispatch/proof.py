"""What a choice takes from no backend on trust: where a model is, and whose fault an error is.

phirt's own adapters prove where a graph runs, and raise phirt's errors. A plugin is somebody
else's code, and a runtime raises what it likes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from phirt.backends.native_errors import first_line
from phirt.devices.names import DeviceName
from phirt.devices.serving import CHOOSERS, CPU_NAMES
from phirt.errors import BackendRuntimeError, DevicePlacementError, PhirtError
from phirt.protocols import LoadedModel

__all__ = ["check_placement", "foreign_errors"]

_ON_CPU = (*CPU_NAMES, *CHOOSERS)


def check_placement(loaded: LoadedModel, *, backend: str, device: str) -> None:
    """Refuse a model that says it is on the CPU, where another device was meant.

    Args:
        loaded: The model.
        backend: Name of the backend that loaded it.
        device: The device that it was to be loaded on.

    Raises:
        DevicePlacementError: It is on the CPU.
    """
    if DeviceName.parse(device).kind in _ON_CPU:
        return
    found = loaded.placement()
    if found.device.lower().partition(":")[0] in CPU_NAMES:
        raise DevicePlacementError(
            f"Device {device!r} is not available to backend {backend!r}: the model was placed on "
            f'the CPU ({found.provider}). Pass device="cpu" to have it there.'
        )


@contextmanager
def foreign_errors(*, backend: str, device: str, settings: bool = False) -> Iterator[None]:
    """Make one error of whatever a backend raises that is none of phirt's.

    Args:
        backend: Name of the backend.
        device: The device that it was asked for.
        settings: Whether the user gave settings of the runtime's own, so that a `ValueError` or
            `TypeError` is about these.

    Raises:
        BackendRuntimeError: It raised another error, which is chained.
    """
    try:
        yield
    except PhirtError:
        raise
    except Exception as error:
        if settings and isinstance(error, ValueError | TypeError):
            raise
        raise BackendRuntimeError(
            f"Backend {backend!r} failed on device {device!r}: {type(error).__name__}: "
            f"{first_line(error).rstrip('.')}. Pass another backend or device, or update what "
            "brings this one."
        ) from error
