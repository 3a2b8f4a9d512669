"""The devices of this machine, as `phirt.devices` tells them."""

from __future__ import annotations

from phirt.devices.device import Device

__all__ = ["devices"]


def devices(*, refresh: bool = False) -> list[Device]:
    """The devices of this machine, and what each backend can do with them.

    Every runtime that is installed is asked in a process of its own, and runs a tiny model on
    each of its devices, so that one that crashes or hangs costs the application nothing. That
    takes seconds once; the answers are kept until a package, a driver, the hardware or the
    environment changes.

    Args:
        refresh: Forget what is known, and ask again.
    """
    # Imported here, so that `import phirt` stays light.
    from phirt.devices.merge import devices_of
    from phirt.dispatch.survey import Survey

    survey = Survey()
    if refresh:
        survey.refresh()
    return devices_of(survey.machine(trials="all"))
