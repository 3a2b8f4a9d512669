"""What Windows' registry and macOS' commands say, as their documents have it."""

from __future__ import annotations

import json

import pytest

from phirt.devices import macos, windows
from phirt.devices.machine import Cpu, PciDevice

_CLASS = r"SYSTEM\CurrentControlSet\Control\Class"

REGISTRY: dict[str, list[windows.Values]] = {
    r"HARDWARE\DESCRIPTION\System\CentralProcessor": [
        {
            "ProcessorNameString": "Intel(R) Core(TM) Ultra 7 155H",
            "VendorIdentifier": "GenuineIntel",
        },
        {"ProcessorNameString": "Intel(R) Core(TM) Ultra 7 155H"},
    ],
    _CLASS + r"\{4d36e968-e325-11ce-bfc1-08002be10318}": [
        {
            "DriverDesc": "NVIDIA GeForce RTX 4090",
            "DriverVersion": "32.0.15.6094",
            "MatchingDeviceId": r"PCI\VEN_10DE&DEV_2684&SUBSYS_167C10DE",
            "HardwareInformation.qwMemorySize": 25757220864,
        },
        {"DriverDesc": "Intel(R) Arc(TM) Graphics", "MatchingDeviceId": r"pci\ven_8086&dev_7d55"},
        {"Configuration": "a key without a driver"},
    ],
    _CLASS + r"\{f01a9d53-3ff6-48d2-9f97-c8a7004be10c}": [
        {
            "DriverDesc": "Intel(R) AI Boost",
            "DriverVersion": "32.0.100.3159",
            "MatchingDeviceId": r"PCI\VEN_8086&DEV_7D1D&REV_04",
        }
    ],
}


def read_keys(path: str) -> list[windows.Values]:
    return REGISTRY.get(path, [])


def test_windows_devices():
    assert windows.read_pci(read_keys) == (
        PciDevice(
            kind="gpu",
            vendor="nvidia",
            name="NVIDIA GeForce RTX 4090",
            driver="32.0.15.6094",
            memory_bytes=25757220864,
        ),
        PciDevice(kind="gpu", vendor="intel", name="Intel(R) Arc(TM) Graphics"),
        PciDevice(kind="npu", vendor="intel", name="Intel(R) AI Boost", driver="32.0.100.3159"),
    )
    assert windows.read_drivers(read_keys) == {
        "NVIDIA GeForce RTX 4090": "32.0.15.6094",
        "Intel(R) AI Boost": "32.0.100.3159",
    }


def test_windows_on_a_snapdragon_has_a_gpu_that_is_no_pci_device():
    def keys(path: str) -> list[windows.Values]:
        if "4d36e968" not in path:
            return []
        name = "Qualcomm(R) Adreno(TM) X1-85 GPU"
        return [{"DriverDesc": name, "MatchingDeviceId": r"ACPI\QCOM0C36"}]

    (device,) = windows.read_pci(keys)
    assert device.vendor == "qualcomm"


def test_windows_processor():
    assert windows.read_cpu(
        architecture="x86_64", cores=16, threads=22, read_keys=read_keys
    ) == Cpu(
        name="Intel(R) Core(TM) Ultra 7 155H",
        vendor="intel",
        architecture="x86_64",
        cores=16,
        threads=22,
    )


def test_windows_without_a_registry_still_has_a_processor():
    cpu = windows.read_cpu(architecture="arm64", cores=None, threads=8, read_keys=lambda _: [])
    assert (cpu.name, cpu.vendor) == ("arm64 processor", None)


M3 = """\
machdep.cpu.brand_string: Apple M3 Pro
hw.physicalcpu: 11
hw.optional.arm.FEAT_DotProd: 1
hw.optional.arm.FEAT_I8MM: 1
hw.optional.arm.FEAT_SME: 0
"""


def test_a_mac_with_apples_chip_is_asked_one_command():
    asked: list[str] = []

    def run(command: list[str]) -> str:
        asked.append(command[0])
        return M3

    cpu = macos.read_cpu(architecture="arm64", threads=11, run=run)
    assert cpu == Cpu(
        name="Apple M3 Pro",
        vendor="apple",
        architecture="arm64",
        cores=11,
        threads=11,
        features=("asimddp", "i8mm"),
    )
    gpu = PciDevice(kind="gpu", vendor="apple", name="Apple M3 Pro")
    assert macos.read_pci(cpu, run) == (gpu,)
    assert asked == ["/usr/sbin/sysctl"]


INTEL_MAC = Cpu(name="Intel(R) Core(TM) i9", vendor="intel", architecture="x86_64", threads=16)


def test_a_mac_with_intels_names_its_graphics():
    displays = [
        {
            "sppci_model": "AMD Radeon Pro 5500M",
            "spdisplays_vendor": "AMD (0x1002)",
            "spdisplays_vram": "8 GB",
        },
        {"sppci_model": "Intel UHD Graphics 630", "spdisplays_vendor": "sppci_vendor_intel"},
    ]
    text = json.dumps({"SPDisplaysDataType": displays})
    assert macos.read_pci(INTEL_MAC, lambda _: text) == (
        PciDevice(kind="gpu", vendor="amd", name="AMD Radeon Pro 5500M", memory_bytes=8 << 30),
        PciDevice(kind="gpu", vendor="intel", name="Intel UHD Graphics 630"),
    )


@pytest.mark.parametrize("text", ["", "{", "[]", '{"SPDisplaysDataType": [{"name": "other"}]}'])
def test_a_mac_that_says_it_otherwise_has_no_graphics(text):
    assert macos.read_pci(INTEL_MAC, lambda _: text) == ()


def test_a_command_that_is_not_there_says_nothing():
    cpu = macos.read_cpu(architecture="arm64", threads=8, run=lambda _: "")
    assert (cpu.name, cpu.cores) == ("arm64 processor", None)
