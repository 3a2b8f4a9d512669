"""What NVIDIA's driver lists, from a double of its library."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from phirt.devices.cuda import cuda_devices, open_driver
from phirt.errors import BackendBrokenError, DeviceNotAvailableError
from phirt.types import Hardware

UUID = bytes.fromhex("6d1bb8ad4c2e8a3f9d100123456789ab")


class FakeDriver:
    """The functions of the driver that are called, with one H100."""

    def __init__(self, *, init: int = 0, count: int = 1) -> None:
        self._init = init
        self._count = count

    def cuInit(self, flags: int) -> int:  # noqa: N802  # the driver's own names
        return self._init

    def cuGetErrorName(self, code: int, text: Any) -> int:  # noqa: N802
        text._obj.value = b"CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = self._count
        return self._init

    def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
        device._obj.value = 40 + index
        return 0

    def cuDeviceGetName(self, text: Any, size: int, device: Any) -> int:  # noqa: N802
        text.value = b"NVIDIA H100 80GB HBM3"
        return 0

    def cuDeviceGetPCIBusId(self, text: Any, size: int, device: Any) -> int:  # noqa: N802
        text.value = b"0000:%02X:00.0" % device.value
        return 0

    def cuDeviceTotalMem_v2(self, size: Any, device: Any) -> int:  # noqa: N802
        size._obj.value = 85_045_870_592
        return 0

    def cuDeviceGetUuid_v2(self, uuid: Any, device: Any) -> int:  # noqa: N802
        ctypes.memmove(uuid, UUID, 16)
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:  # noqa: N802
        value._obj.value = 0
        return 0 if attribute == 18 else 1


def test_a_device() -> None:
    assert cuda_devices(FakeDriver()) == [
        Hardware(
            native="CUDA 0",
            name="NVIDIA H100 80GB HBM3",
            vendor="nvidia",
            memory_bytes=85_045_870_592,
            pci="0000:28:00.0",
            uuid=UUID.hex(),
            discrete=True,
        )
    ]


def test_devices_are_numbered() -> None:
    found = cuda_devices(FakeDriver(count=2))
    assert [(each.native, each.pci) for each in found] == [
        ("CUDA 0", "0000:28:00.0"),
        ("CUDA 1", "0000:29:00.0"),
    ]


def test_a_property_that_fails_leaves_the_rest() -> None:
    class Half(FakeDriver):
        cuDeviceGetUuid_v2 = None  # type: ignore[assignment]  # noqa: N815  # an older driver

        def cuDeviceTotalMem_v2(self, size: Any, device: Any) -> int:  # noqa: N802
            return 999

    (found,) = cuda_devices(Half())
    assert (found.name, found.memory_bytes, found.uuid) == ("NVIDIA H100 80GB HBM3", None, None)


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", fail)
    with pytest.raises(DeviceNotAvailableError, match=r"not installed: .*cuda.*cannot open"):
        open_driver()


@pytest.mark.parametrize("driver", [FakeDriver(init=100), FakeDriver(count=0)])
def test_a_driver_without_a_device(driver: FakeDriver) -> None:
    with pytest.raises(DeviceNotAvailableError, match="finds no device"):
        cuda_devices(driver)


def test_a_driver_that_does_not_start() -> None:
    with pytest.raises(BackendBrokenError, match=r"SYSTEM_DRIVER_MISMATCH\. Restart"):
        cuda_devices(FakeDriver(init=803))
