"""Whether a model fits in memory, reckoned before its weights are read."""

from __future__ import annotations

from phirt.dispatch.plan import MemoryNeed
from phirt.dispatch.shape import ModelShape, shape_of, shape_of_config, weights_bytes
from phirt.errors import OutOfMemoryError

__all__ = [
    "ModelShape",
    "check_fit",
    "predict_memory",
    "shape_of",
    "shape_of_config",
    "weights_bytes",
]

_CHUNK = 512  # tokens of a prompt that one call of the model takes
_RUNTIME = 100 << 20


def predict_memory(
    shape: ModelShape,
    *,
    backend: str,
    device_kind: str,
    layout: str,
    precision: str | None,
    weights_bytes: int,
    context: int,
    threads: int | None = None,
    free: int | None,
) -> MemoryNeed:
    """The memory that a load, and a sequence of ``context`` tokens, are predicted to take.

    Args:
        shape: The decoder.
        backend: Name of the backend.
        device_kind: Kind of the device, such as ``"cpu"``.
        layout: Layout of the folder, as in `Artifact`.
        precision: How its weights are stored, where that is known.
        weights_bytes: Size of the weights' files.
        context: Tokens.
        threads: As in `LoadOptions`.
        free: What is free where they will be, or None where nobody tells.
    """
    del backend, device_kind, layout, precision, threads
    rows = 1 if shape.prunes_logits else _CHUNK
    workspace = (
        _RUNTIME
        + 4 * rows * shape.vocab_size
        + 4 * _CHUNK * (4 * shape.hidden_size + 3 * shape.intermediate_size)
    )
    return MemoryNeed(
        weights=weights_bytes,
        kv=4 * shape.kv_values * context,
        workspace=workspace,
        context=context,
        free=free,
    )


def check_fit(
    need: MemoryNeed,
    *,
    shape: ModelShape,
    model: str,
    backend: str,
    device: str,
    precision: str | None,
) -> None:
    """Refuse a load that cannot fit, before its weights are read.

    Args:
        need: What it is predicted to take.
        shape: The decoder.
        model: What the user calls the model.
        backend: Name of the backend.
        device: Device name.
        precision: How the weights are stored, where that is known.

    Raises:
        OutOfMemoryError: It does not fit.
    """
    if need.fits or need.free is None:
        return
    del shape, precision
    raise OutOfMemoryError(
        f"{model!r} with a context of {need.context:,} tokens does not fit on {device!r} with "
        f"backend {backend!r}: it takes {need.total:,} bytes, and {need.free:,} are free."
    )
