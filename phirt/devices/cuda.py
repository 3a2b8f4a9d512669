"""What NVIDIA's driver lists: CUDA devices in CUDA's own order, asked without any runtime.

onnxruntime's CUDA provider knows its devices by number only; the driver's library, which it needs
anyway, tells the rest. Functions and constants: https://docs.nvidia.com/cuda/cuda-driver-api/
(device management).
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

from phirt.devices.identity import parse_luid_bytes, parse_pci, parse_uuid
from phirt.errors import BackendBrokenError, DeviceNotAvailableError
from phirt.types import Hardware

__all__ = ["cuda_devices", "open_driver"]

_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_INTEGRATED = 18  # CU_DEVICE_ATTRIBUTE_INTEGRATED
_TEXT_BYTES = 256


def open_driver() -> Any:
    """The driver's library, which is not started by that.

    Raises:
        DeviceNotAvailableError: The driver is not installed.
    """
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        raise DeviceNotAvailableError(f"NVIDIA's driver is not installed: {error}") from error


def cuda_devices(library: Any) -> list[Hardware]:
    """The CUDA devices that this process may use now, by ascending number.

    ``CUDA_VISIBLE_DEVICES`` is followed. It starts the driver, which takes some tenths of a
    second where there is a device.

    Args:
        library: The driver's.

    Raises:
        DeviceNotAvailableError: The driver finds no device.
        BackendBrokenError: It does not start.
    """
    driver = _Driver(library)
    code = library.cuInit(0)
    count = driver.number("cuDeviceGetCount") if code == 0 else None
    if code == _NO_DEVICE or count == 0:
        raise DeviceNotAvailableError("NVIDIA's driver finds no device")
    if count is None:
        raise BackendBrokenError(
            f"NVIDIA's driver does not start: {driver.name_of(code)}. Restart the machine; if "
            "that does not help, install the driver anew."
        )
    return [driver.describe(index) for index in range(count)]


class _Driver:
    """The driver's library, whose answers may each be missing."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def name_of(self, code: int) -> str:
        """The name of an error: ``CUDA_ERROR_SYSTEM_DRIVER_MISMATCH``."""
        text = ctypes.c_char_p()
        if self._call("cuGetErrorName", code, ctypes.byref(text)) and text.value:
            return text.value.decode(errors="replace")
        return f"error {code}"

    def number(self, function: str) -> int | None:
        value = ctypes.c_int()
        return value.value if self._call(function, ctypes.byref(value)) else None

    def describe(self, index: int) -> Hardware:
        native = f"CUDA {index}"
        device = ctypes.c_int()
        if not self._call("cuDeviceGet", ctypes.byref(device), index):
            return Hardware(native=native, vendor="nvidia")
        integrated = ctypes.c_int()
        is_known = self._call("cuDeviceGetAttribute", ctypes.byref(integrated), _INTEGRATED, device)
        memory = ctypes.c_size_t()
        has_memory = self._call("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
        uuid = (ctypes.c_char * 16)()
        # The second knows an instance of a partitioned GPU (MIG) from the whole of it.
        has_uuid = self._call("cuDeviceGetUuid_v2", uuid, device) or self._call(
            "cuDeviceGetUuid", uuid, device
        )
        return Hardware(
            native=native,
            name=self._text("cuDeviceGetName", device),
            vendor="nvidia",
            memory_bytes=memory.value if has_memory else None,
            pci=parse_pci(self._text("cuDeviceGetPCIBusId", device)),
            luid=self._luid(device),
            uuid=parse_uuid(uuid.raw) if has_uuid else None,
            discrete=not integrated.value if is_known else None,
        )

    def _text(self, function: str, device: ctypes.c_int) -> str | None:
        text = ctypes.create_string_buffer(_TEXT_BYTES)
        if not self._call(function, text, _TEXT_BYTES, device):
            return None
        return text.value.decode(errors="replace")

    def _luid(self, device: ctypes.c_int) -> str | None:
        # Windows has one; elsewhere the call fails.
        luid, mask = (ctypes.c_char * 8)(), ctypes.c_uint()
        found = self._call("cuDeviceGetLuid", luid, ctypes.byref(mask), device)
        return parse_luid_bytes(luid.raw) if found else None

    def _call(self, function: str, *arguments: Any) -> bool:
        # An old driver lacks the newer functions.
        entry = getattr(self._library, function, None)
        return entry is not None and entry(*arguments) == 0
