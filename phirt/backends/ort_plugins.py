"""Plugins of onnxruntime: libraries that bring execution providers, for every adapter on it."""

from __future__ import annotations

import threading
from typing import Any

from phirt.backends.ort_devices import describe
from phirt.backends.probing import may_start_drivers
from phirt.errors import BackendBrokenError
from phirt.silence import import_silently
from phirt.types import Availability

__all__ = ["plugin_devices", "plugin_entries"]

_registered: dict[str, tuple[str, ...]] = {}
_lock = threading.Lock()


def plugin_devices(
    ort: Any, module: str, hardware: str | None, *, backend: str = "onnxruntime"
) -> list[Any]:
    """The ``OrtEpDevice``s of a plugin; its library is registered once per process.

    Args:
        ort: The onnxruntime module.
        module: The package that brings the library.
        hardware: Which devices: ``"CPU"``, ``"GPU"`` or ``"NPU"``; None for any.
        backend: Name of the backend that asks, for the message.

    Raises:
        BackendBrokenError: The plugin is installed and cannot be loaded.
    """
    names = _provider_names(ort, module, backend)
    return [
        found
        for found in ort.get_ep_devices()
        if found.ep_name in names and hardware in (None, found.device.type.name)
    ]


def plugin_entries(
    ort: Any,
    module: str,
    hardware: str | None,
    *,
    kind: str,
    version: str,
    reason: str,
    backend: str = "onnxruntime",
) -> list[Availability]:
    """What a plugin has: its devices, where it is loaded already or may be for a probe.

    Args:
        ort: The onnxruntime module.
        module: The package that brings the library.
        hardware: As in `plugin_devices`.
        kind: What phirt calls the device, without a number.
        version: Of the runtime.
        reason: What is installed for it.
        backend: Name of the backend that asks, for the message.
    """
    if module not in _registered and not may_start_drivers():
        return [Availability(kind, "found", f"{reason}: not tried", version=version)]
    try:
        devices = plugin_devices(ort, module, hardware, backend=backend)
    except BackendBrokenError as error:
        return [Availability(kind, "broken", str(error), version=version)]
    if not devices:
        return [
            Availability(kind, "no device", f"{reason}: it finds no such device", version=version)
        ]
    return [
        Availability(
            kind if len(devices) == 1 else f"{kind}:{index}",
            "found",
            f"{reason}: not tried",
            version=version,
            hardware=describe(device, index),
        )
        for index, device in enumerate(devices)
    ]


def _provider_names(ort: Any, module: str, backend: str) -> tuple[str, ...]:
    with _lock:
        if module not in _registered:
            try:
                plugin = _import_plugin(module)
                ort.register_execution_provider_library(module, plugin.get_library_path())
                _registered[module] = tuple(plugin.get_ep_names())
            # A native library may raise anything at all while it initialises.
            except Exception as error:
                raise BackendBrokenError(
                    f"Backend {backend!r}: the plugin {module!r} is installed, but loading it "
                    f"failed with {type(error).__name__}: {error}. Reinstall it, in a version "
                    f"made for onnxruntime {ort.__version__}."
                ) from error
        return _registered[module]


def _import_plugin(module: str) -> Any:
    return import_silently(module)
