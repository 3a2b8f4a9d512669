"""One device has one identity, however a runtime writes it."""

from __future__ import annotations

import pytest

from phirt.devices.identity import (
    format_pci,
    parse_luid_bytes,
    parse_luid_number,
    parse_pci,
    parse_uuid,
)


@pytest.mark.parametrize(
    "text",
    [
        "0000:01:00.0",  # /sys/bus/pci/devices
        "00000000:01:00.0",  # NVML
        "0000:01:00",  # MLX before it wrote functions
        "01:00.0",  # lspci
        "0000:01:00.0\n",
    ],
)
def test_pci_addresses(text: str) -> None:
    assert parse_pci(text) == format_pci(0, 1, 0) == "0000:01:00.0"


def test_pci_addresses_are_lower_case() -> None:
    assert parse_pci("0000:C1:0A.1") == format_pci(0, 0xC1, 0x0A, 1) == "0000:c1:0a.1"


@pytest.mark.parametrize("text", ["", "None", None, "GPU-0", "0000:01", "1:2:3:4.0"])
def test_what_is_no_pci_address(text: object) -> None:
    assert parse_pci(text) is None


def test_a_luid_is_the_same_as_number_and_as_bytes() -> None:
    # onnxruntime gives (HighPart << 32) | LowPart in decimal digits, OpenVINO the bytes of the
    # structure {LowPart, HighPart}.
    assert parse_luid_number(str(0x1_0000_D3A7)) == "000000010000d3a7"
    assert parse_luid_bytes("a7d3000001000000") == "000000010000d3a7"
    assert parse_luid_bytes(bytes.fromhex("a7d3000001000000")) == "000000010000d3a7"


@pytest.mark.parametrize("value", ["", "0" * 16, "a7d3", "not hexadecimal."])
def test_what_is_no_luid(value: str) -> None:
    assert parse_luid_bytes(value) is None


@pytest.mark.parametrize("value", ["", "0", None, "-1", str(1 << 64), "0xa7"])
def test_what_is_no_luid_as_a_number(value: object) -> None:
    assert parse_luid_number(value) is None


@pytest.mark.parametrize(
    "value",
    [
        "GPU-6d1bb8ad-4c2e-8a3f-9d10-0123456789ab",  # nvidia-smi, MLX
        "6d1bb8ad-4c2e-8a3f-9d10-0123456789ab",  # torch
        "6D1BB8AD4C2E8A3F9D100123456789AB",
        bytes.fromhex("6d1bb8ad4c2e8a3f9d100123456789ab"),  # CUDA's driver
    ],
)
def test_uuids(value: object) -> None:
    assert parse_uuid(value) == "6d1bb8ad4c2e8a3f9d100123456789ab"


@pytest.mark.parametrize("value", ["", None, "0" * 32, b"short", "GPU-0", "g" * 32])
def test_what_is_no_uuid(value: object) -> None:
    assert parse_uuid(value) is None
