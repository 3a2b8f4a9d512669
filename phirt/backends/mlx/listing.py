"""Which devices MLX offers on this machine, and what it tells of them."""

from __future__ import annotations

from typing import Any

from phirt.devices.identity import parse_pci, parse_uuid
from phirt.devices.names import DeviceName
from phirt.devices.vendors import cpu_vendor
from phirt.protocols import Availability
from phirt.types import Hardware

__all__ = ["device_names", "list_devices"]


def device_names(mx: Any) -> list[str]:
    """What phirt calls MLX's devices.

    Args:
        mx: The module ``mlx.core``.
    """
    names = ["cpu"]
    if mx.metal.is_available():
        names.append("metal")
    if mx.cuda.is_available():
        count = _count(mx)
        names += ["cuda"] if count == 1 else [f"cuda:{index}" for index in range(count)]
    return names


def _count(mx: Any) -> int:
    try:
        return int(mx.device_count(mx.gpu))
    # It starts CUDA, which fails in ways of its own.
    except Exception:
        return 0


def list_devices(mx: Any) -> list[Availability]:
    """Every device that MLX offers, and CUDA where this build finds no device for it."""
    version = f"mlx {mx.__version__}"
    names = device_names(mx)
    entries = [
        Availability(
            name, "found", version, version=version, hardware=_describe(mx, DeviceName.parse(name))
        )
        for name in names
    ]
    if mx.cuda.is_available() and not any(name.startswith("cuda") for name in names):
        reason = f"{version} is built for CUDA, and finds no device"
        entries.append(Availability("cuda", "no device", reason, version=version))
    return entries


def _describe(mx: Any, device: DeviceName) -> Hardware:
    """The hardware, from ``mx.device_info``, whose keys differ by build (mlx/backend/*)."""
    native = mx.Device(mx.cpu if device.kind == "cpu" else mx.gpu, device.index or 0)
    try:
        info = dict(mx.device_info(native))
    # It asks drivers, and an older MLX has it for Metal only.
    except Exception:
        info = {}
    name = info.get("device_name")
    vendor = cpu_vendor(name or "")
    if device.kind == "cpu":
        return Hardware(native=str(native), name=name, vendor=vendor)
    is_cuda = device.kind == "cuda"
    return Hardware(
        native=str(native),
        name=name,
        vendor="nvidia" if is_cuda else vendor,
        # Metal's memory is the host's; so much of it MLX may take.
        memory_bytes=info.get("total_memory" if is_cuda else "max_recommended_working_set_size"),
        pci=parse_pci(info.get("pci_bus_id")),
        uuid=parse_uuid(info.get("uuid")),
        discrete=None if is_cuda or vendor is None else vendor != "apple",
    )
