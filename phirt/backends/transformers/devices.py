"""What of transformers and torch is installed, and which devices torch offers."""

from __future__ import annotations

import importlib.metadata
import re
from typing import Any

from phirt.backends.importing import import_runtime
from phirt.devices.names import DeviceName
from phirt.errors import BackendBrokenError, BackendNotInstalledError, DeviceNotAvailableError

__all__ = [
    "BACKEND",
    "EXTRA",
    "check_device",
    "find_versions",
    "import_both",
    "native_names",
    "offered_names",
    "parse_device",
]

BACKEND = "transformers"
EXTRA = "torch"
# Earlier ones lose the context where LongRoPE changes its factors.
_OLDEST = (5, 23)
# Kinds of device in phirt's words and in torch's. AMD's GPUs are "cuda" in torch, too.
_KINDS = {"cpu": "cpu", "cuda": "cuda", "metal": "mps", "gpu": "xpu"}


def import_both() -> tuple[Any, Any]:
    """The modules torch and transformers.

    Raises:
        BackendNotInstalledError: One is not installed.
        BackendBrokenError: One does not import, or transformers is too old.
    """
    find_versions()
    # torch first: without it transformers imports, and fails at the first model.
    torch = import_runtime("torch", backend=BACKEND, extra=EXTRA)
    return torch, import_runtime("transformers", backend=BACKEND, extra=EXTRA)


def find_versions() -> str:
    """Both versions in a few words, from the packages' metadata.

    Raises:
        BackendNotInstalledError: One is not installed.
        BackendBrokenError: transformers is too old.
    """
    found = {}
    for package in ("transformers", "torch"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError as error:
            raise BackendNotInstalledError(
                f"Backend {BACKEND!r} needs the package {package!r}, which is not installed. "
                f'Install it with: python -m pip install "phirt[{EXTRA}]"'
            ) from error
    version = tuple(int(part) for part in re.findall(r"\d+", found["transformers"])[:2])
    if version < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        raise BackendBrokenError(
            f"Backend {BACKEND!r} needs transformers {oldest} or later; installed is "
            f"{found['transformers']}. Update it with: "
            f'python -m pip install "transformers>={oldest}"'
        )
    return ", ".join(f"{package} {version}" for package, version in found.items())


def check_device(torch: Any, device: str) -> Any:
    """The torch device of that name in phirt's words.

    Raises:
        DeviceNotAvailableError: torch does not offer it.
        ValueError: It is no device name.
    """
    wanted = parse_device(device)
    kind, index = _KINDS[wanted.kind], wanted.index
    if kind == "cpu":
        return torch.device("cpu")
    count = _count(torch, kind)
    if (index or 0) >= count:
        found = ", ".join(offered_names(torch))
        raise DeviceNotAvailableError(
            f"Device '{wanted}' is not available to backend {BACKEND!r}: torch "
            f"{torch.__version__} finds {count} devices of kind {kind!r} and offers: {found}. "
            'Install a torch built for that device, or pass device="cpu".'
        )
    return torch.device(kind) if index is None else torch.device(kind, index)


def native_names(torch: Any, device: str) -> tuple[str, ...]:
    """What torch may call the device of that name in phirt's words, where a tensor is on it."""
    wanted = parse_device(device)
    kind = _KINDS[wanted.kind]
    if kind in ("cpu", "mps"):
        return (kind, f"{kind}:0")
    if wanted.index is not None:
        return (f"{kind}:{wanted.index}",)
    return tuple(f"{kind}:{index}" for index in range(_count(torch, kind)))


def parse_device(device: str) -> DeviceName:
    """Read a device name.

    Raises:
        DeviceNotAvailableError: torch has no such kind of device.
        ValueError: It is no device name.
    """
    wanted = DeviceName.parse(device)
    if wanted.kind not in _KINDS or (wanted.kind == "cpu" and wanted.index):
        raise DeviceNotAvailableError(
            f"Device '{wanted}' is not available to backend {BACKEND!r}, which runs on: "
            f"{', '.join(_KINDS)}."
        )
    return wanted


def offered_names(torch: Any) -> list[str]:
    """What phirt calls the devices that torch finds: ``"cuda"`` where it is the only one."""
    names = ["cpu"]
    for kind, torch_kind in _KINDS.items():
        count = _count(torch, torch_kind) if kind != "cpu" else 0
        names += [kind] if count == 1 else [f"{kind}:{index}" for index in range(count)]
    return names


def _count(torch: Any, kind: str) -> int:
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    module = getattr(torch, kind)
    return int(module.device_count()) if module.is_available() else 0
