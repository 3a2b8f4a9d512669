"""Who made a device, from what systems and processors call its maker."""

from __future__ import annotations

__all__ = ["cpu_vendor", "pci_vendor"]

# https://pcisig.com/membership/member-companies; Qualcomm has two.
_PCI = {
    0x10DE: "nvidia",
    0x1002: "amd",
    0x1022: "amd",
    0x8086: "intel",
    0x106B: "apple",
    0x17CB: "qualcomm",
    0x5143: "qualcomm",
    0x1414: "microsoft",
    0x1AE0: "google",
    0x1AF4: "virtio",
    0x15AD: "vmware",
    0x80EE: "virtualbox",
    0x1234: "qemu",
    0x1B36: "qemu",
    0x1013: "cirrus",
    0x1A03: "aspeed",
    0x102B: "matrox",
}
# What CPUID leaf 0 says, the implementer codes of Arm (MIDR_EL1), and words of a CPU's name.
_CPU = {
    "genuineintel": "intel",
    "authenticamd": "amd",
    "0x41": "arm",
    "0x4e": "nvidia",
    "0x51": "qualcomm",
    "0x61": "apple",
    "0xc0": "ampere",
    "intel": "intel",
    "amd": "amd",
    "apple": "apple",
    "qualcomm": "qualcomm",
    "snapdragon": "qualcomm",
    "microsoft sq": "qualcomm",
    "ampere": "ampere",
}


def pci_vendor(identifier: int) -> str | None:
    """The maker of a PCI device, or None where phirt does not know it."""
    return _PCI.get(identifier)


def cpu_vendor(*texts: str) -> str | None:
    """The maker of a processor, from its vendor's identification, then from its name."""
    for text in texts:
        for word, vendor in _CPU.items():
            if word in text.lower():
                return vendor
    return None
