"""Whether a backend keeps a KV cache in the precision that a load asks for."""

from __future__ import annotations

from phirt.devices.names import DeviceName
from phirt.errors import UnsupportedModelError
from phirt.protocols import KV_PRECISIONS, Backend, LoadOptions

__all__ = ["check_kv_precision"]


def check_kv_precision(backend: Backend, device: str, options: LoadOptions) -> None:
    """Refuse a precision that a backend has for no model on a device.

    Raises:
        ValueError: It is none.
        UnsupportedModelError: The backend does not have it there.
    """
    wanted, kind = options.kv_precision, DeviceName.parse(device).kind
    offered = [each for each, kinds in backend.kv_precisions.items() if kind in kinds]
    if wanted is None or wanted in offered:
        return
    if wanted not in KV_PRECISIONS:
        raise ValueError(f"kv_precision={wanted!r} is not one of {', '.join(KV_PRECISIONS)}")
    raise UnsupportedModelError(
        f"Backend {backend.name!r} keeps no KV cache in {wanted} on device {device!r}: it has "
        f"{' and '.join(offered) or 'no choice of it'} there. Load without kv_precision, or with "
        "another backend."
    )
