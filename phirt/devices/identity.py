"""What tells that two runtimes mean the same device, in one form whoever says it.

Every runtime writes PCI addresses, LUIDs and UUIDs in a way of its own. The functions here turn
each into the form that `phirt.types.Hardware` documents, or into None where it is none: a
device without an identity is still a device.
"""

from __future__ import annotations

import re

__all__ = ["format_pci", "parse_luid_bytes", "parse_luid_number", "parse_pci", "parse_uuid"]

_PCI = re.compile(r"(?:([0-9a-f]{1,8}):)?([0-9a-f]{1,2}):([0-9a-f]{1,2})(?:\.([0-7]))?")


def format_pci(domain: int, bus: int, device: int, function: int = 0) -> str:
    """A PCI address from its numbers: ``"0000:01:00.0"``."""
    return f"{domain:04x}:{bus:02x}:{device:02x}.{function}"


def parse_pci(text: object) -> str | None:
    """A PCI address from a text such as ``"00000000:01:00.0"`` or ``"01:00.0"``."""
    match = _PCI.fullmatch(str(text).strip().lower())
    if match is None:
        return None
    domain, bus, device, function = (int(part or "0", 16) for part in match.groups())
    return format_pci(domain, bus, device, function)


def parse_luid_number(value: object) -> str | None:
    """A LUID from a number, or its decimal digits: the high part in the upper 32 bits."""
    text = str(value).strip()
    if not text.isdecimal() or not 0 < int(text) < 1 << 64:
        return None
    return f"{int(text):016x}"


def parse_luid_bytes(value: bytes | str) -> str | None:
    """A LUID from the 8 bytes that Windows stores it in, or from these in hexadecimal.

    The low part comes first, and both parts are little-endian: together, a little-endian
    number of 64 bits.
    """
    try:
        data = bytes.fromhex(value) if isinstance(value, str) else value
    except ValueError:
        return None
    return parse_luid_number(int.from_bytes(data, "little")) if len(data) == 8 else None


def parse_uuid(value: object) -> str | None:
    """A UUID from its 16 bytes, or from a text such as ``"GPU-6d1bb8ad-..."``."""
    text = value.hex() if isinstance(value, bytes) else str(value).strip().lower()
    digits = text.removeprefix("gpu-").replace("-", "")
    if re.fullmatch(r"[0-9a-f]{32}", digits) is None or not int(digits, 16):
        return None
    return digits
