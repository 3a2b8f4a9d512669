"""A backend that was named is asked in this process, once it is known to leave a process alone."""

from __future__ import annotations

from phirt.backends.native_errors import first_line
from phirt.devices.machine import BackendRecord, Trial
from phirt.dispatch.registry import backend_names, get_backend
from phirt.errors import BackendBrokenError, PhirtError
from phirt.types import Availability

__all__ = ["ask_here", "check_harmless"]


def ask_here(backend: str) -> BackendRecord:
    """What a backend lists now, and those trials of it that ended with their process.

    How other trials ended says nothing of today: a device that was named may be used, or says
    itself what is wrong.

    Args:
        backend: Name of the backend.

    Raises:
        UnknownBackendError: No such backend.
        BackendBrokenError: A plugin cannot be imported or asked, or the process that asked the
            backend crashed or hung.
    """
    fatal = check_harmless(backend)
    listing = _probe(backend)
    version = next((found.version for found in listing if found.version), None)
    return BackendRecord(
        backend=backend, outcome="listed", version=version, listing=listing, trials=fatal
    )


def check_harmless(backend: str) -> tuple[Trial, ...]:
    """Refuse a backend that takes the process along which asks it (row L10).

    Asked in a process of its own, where that was not done before; that takes a second, once.

    Args:
        backend: Name of the backend; of one that is not registered nothing is said.

    Returns:
        The trials of its devices that ended so.

    Raises:
        BackendBrokenError: The process that asked it crashed or hung.
    """
    # Imported here, as most runtimes are in memory from the second load on.
    from phirt.dispatch.survey import Survey, is_imported

    if backend not in backend_names() or is_imported(backend):
        return ()
    record = Survey().backend(backend)
    if record.is_fatal:
        raise BackendBrokenError(
            " ".join(filter(None, (f"Backend {backend!r}: {record.reason}", record.fix)))
        )
    return tuple(each for each in record.trials if each.outcome in ("crashed", "timed out"))


def _probe(backend: str) -> tuple[Availability, ...]:
    try:
        return tuple(get_backend(backend).probe())
    except PhirtError:
        raise
    # A probe does not raise, but a plugin is somebody else's code.
    except Exception as error:
        raise BackendBrokenError(
            f"Backend {backend!r} could not list its devices: {type(error).__name__}: "
            f"{first_line(error).rstrip('.')}. Reinstall or update what brings it."
        ) from error
