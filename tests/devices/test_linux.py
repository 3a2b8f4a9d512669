"""Files of Linux, as other machines have them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from phirt.devices.linux import read_cpu, read_drivers, read_pci
from phirt.devices.machine import Cpu, PciDevice

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="Windows has no files named 0000:01:00.0, and links by grace"
)


@pytest.fixture
def put(tmp_path):
    """Writes a file below the root of a machine."""

    def write(path: str, text: str) -> None:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")

    return write


@pytest.fixture
def put_pci(put, tmp_path):
    """Writes what sysfs has of a PCI device."""

    def write(address: str, number: int, vendor: int, device: int, driver: str = "") -> None:
        folder = f"sys/bus/pci/devices/{address}"
        put(f"{folder}/class", f"0x{number:06x}\n")
        put(f"{folder}/vendor", f"0x{vendor:04x}\n")
        put(f"{folder}/device", f"0x{device:04x}\n")
        if driver:
            target = tmp_path / "sys/bus/pci/drivers" / driver
            target.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / "driver").symlink_to(target)

    return write


PCI_IDS = """\
# vendor  vendor_name
1002  Advanced Micro Devices, Inc. [AMD/ATI]
\t73bf  Navi 21 [Radeon RX 6800/6800 XT / 6900 XT]
8086  Intel Corporation
\t7d1d  Meteor Lake NPU
\t\t1043 1e63  a subsystem, which is no device
\t7d55  Meteor Lake-P [Intel Arc Graphics]
"""


def test_what_computes_is_found_among_what_else_is_there(put, put_pci, tmp_path):
    put_pci("0000:00:02.0", 0x030000, 0x8086, 0x7D55, "i915")
    put_pci("0000:00:0b.0", 0x120000, 0x8086, 0x7D1D, "intel_vpu")
    put_pci("0000:00:1f.0", 0x060100, 0x8086, 0x7E02)  # a bridge
    put_pci("0000:03:00.0", 0x038000, 0x1002, 0x73BF, "amdgpu")
    put("sys/bus/pci/devices/0000:03:00.0/mem_info_vram_total", "17163091968\n")
    put("usr/share/misc/pci.ids", PCI_IDS)
    assert read_pci(tmp_path) == (
        PciDevice(
            kind="gpu",
            vendor="intel",
            name="Meteor Lake-P [Intel Arc Graphics]",
            pci="0000:00:02.0",
            driver="i915",
        ),
        PciDevice(
            kind="npu",
            vendor="intel",
            name="Meteor Lake NPU",
            pci="0000:00:0b.0",
            driver="intel_vpu",
        ),
        PciDevice(
            kind="gpu",
            vendor="amd",
            name="Navi 21 [Radeon RX 6800/6800 XT / 6900 XT]",
            pci="0000:03:00.0",
            driver="amdgpu",
            memory_bytes=17163091968,
        ),
    )


def test_nvidias_driver_names_its_devices_and_its_version(put, put_pci, tmp_path):
    put_pci("0000:01:00.0", 0x030200, 0x10DE, 0x2330, "nvidia")
    put("proc/driver/nvidia/gpus/0000:01:00.0/information", "Model: \t\t NVIDIA H100 80GB HBM3\n")
    put(
        "proc/driver/nvidia/version",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n",
    )
    (device,) = read_pci(tmp_path)
    assert (device.name, device.driver) == ("NVIDIA H100 80GB HBM3", "nvidia 570.86.15")
    assert read_drivers(tmp_path) == {"nvidia": "570.86.15"}


def test_an_accelerator_of_amds_is_a_gpu(put_pci, tmp_path):
    put_pci("0000:c1:00.0", 0x120000, 0x1002, 0x74A1)
    (device,) = read_pci(tmp_path)
    assert (device.kind, device.driver) == ("gpu", None)


def test_drivers_in_user_space_are_known_by_name(put, tmp_path):
    put("etc/OpenCL/vendors/intel.icd", "libigdrcl.so")
    put("usr/share/vulkan/icd.d/radeon_icd.x86_64.json", "{}")
    put("etc/vulkan/icd.d/nvidia_icd.json", "{}")
    put("sys/module/amdgpu/version", "6.8.5\n")
    assert read_drivers(tmp_path) == {
        "amdgpu": "6.8.5",
        "opencl": "intel",
        "vulkan": "nvidia_icd, radeon_icd.x86_64",
    }


def test_a_machine_that_tells_nothing(tmp_path):
    assert read_pci(tmp_path) == ()
    assert read_drivers(tmp_path) == {}
    assert read_cpu(architecture="riscv64", allowed={0}, root=tmp_path) == Cpu(
        name="riscv64 processor", architecture="riscv64", threads=1
    )


def test_a_processor_of_intels(put, tmp_path):
    put(
        "proc/cpuinfo",
        "processor\t: 0\nvendor_id\t: GenuineIntel\n"
        "model name\t: Intel(R) Xeon(R)  Platinum 8481C CPU @ 2.70GHz\n"
        "flags\t\t: fpu avx2 avx512f amx_tile amx_int8 sgx\n\nprocessor\t: 1\n",
    )
    for number, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        put(f"sys/devices/system/cpu/cpu{number}/topology/core_cpus_list", f"{siblings}\n")
    assert read_cpu(architecture="x86_64", allowed={0, 2, 3}, root=tmp_path) == Cpu(
        name="Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz",
        vendor="intel",
        architecture="x86_64",
        cores=2,
        threads=3,
        features=("amx_int8", "amx_tile", "avx2", "avx512f"),
    )


def test_a_processor_of_qualcomms(put, tmp_path):
    put(
        "proc/cpuinfo",
        "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm bf16\nCPU implementer\t: 0x51\n",
    )
    assert read_cpu(architecture="arm64", allowed={0}, root=tmp_path) == Cpu(
        name="arm64 processor",
        vendor="qualcomm",
        architecture="arm64",
        threads=1,
        features=("asimd", "asimddp", "bf16", "i8mm"),
    )


def test_the_names_of_no_device_are_read_past_its_maker(put, put_pci, tmp_path: Path):
    # 1002:7d1d is nobody's, and 8086:7d1d is further down the same file.
    put_pci("0000:03:00.0", 0x030000, 0x1002, 0x7D1D)
    put("usr/share/misc/pci.ids", PCI_IDS)
    assert read_pci(tmp_path)[0].name is None
