"""Importing a runtime: one that is missing and one that is broken are told apart."""

from __future__ import annotations

from types import ModuleType

from phirt.backends.distributions import check_single_owner
from phirt.errors import BackendBrokenError, BackendNotInstalledError
from phirt.protocols import Availability
from phirt.silence import import_silently

__all__ = ["import_runtime", "unavailable"]


def import_runtime(module: str, *, backend: str, extra: str) -> ModuleType:
    """Import a runtime's top-level module, with its telemetry off.

    Raises:
        BackendNotInstalledError: There is no such module.
        BackendBrokenError: The module is there and its import fails, or two distributions
            have installed it over each other. An installed runtime that does not import is a
            broken install, not a missing one.
    """
    check_single_owner(module, backend=backend)
    try:
        return import_silently(module)
    except ModuleNotFoundError as error:
        if error.name == module:
            raise BackendNotInstalledError(
                f"Backend {backend!r} needs the package {module!r}, which is not installed. "
                f'Install it with: python -m pip install "phirt[{extra}]"'
            ) from error
        raise _broken(module, backend, error) from error
    # A native module may raise anything at all while it initialises.
    except Exception as error:
        raise _broken(module, backend, error) from error


def unavailable(
    error: BackendNotInstalledError | BackendBrokenError, *, extra: str
) -> list[Availability]:
    """What a probe answers whose runtime did not import, and why.

    What mends a broken install depends on what broke it, so its error says that.
    """
    if isinstance(error, BackendNotInstalledError):
        return [Availability("cpu", "missing", str(error), f'pip install "phirt[{extra}]"')]
    return [Availability("cpu", "broken", str(error))]


def _broken(module: str, backend: str, error: Exception) -> BackendBrokenError:
    return BackendBrokenError(
        f"Backend {backend!r}: {module!r} is installed, but importing it failed with "
        f"{type(error).__name__}: {error}. Reinstall it with: "
        f"python -m pip install --force-reinstall {module}"
    )
