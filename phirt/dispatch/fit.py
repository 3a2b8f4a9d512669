"""Whether a model fits in memory, reckoned before its weights are read.

The formula, and how far it is from what was measured, is in docs/memory.md.
"""

from __future__ import annotations

from phirt.devices.names import DeviceName
from phirt.dispatch.footprint import TOKENIZER, TOKENIZER_PARSED, Footprint, footprint_of
from phirt.dispatch.plan import MemoryNeed, PlanCandidate
from phirt.dispatch.shape import ModelShape, bits_of, shape_of, shape_of_config, weights_bytes
from phirt.errors import OutOfMemoryError
from phirt.models.variants import megabytes
from phirt.protocols import KV_PRECISIONS

__all__ = [
    "ModelShape",
    "check_fit",
    "check_pair_fit",
    "predict_memory",
    "shape_of",
    "shape_of_config",
    "weights_bytes",
]

# Kinds of devices that compute in the host's memory.
_ON_HOST = ("cpu", "metal", "openvino-auto", "openvino-cpu")
# What a driver takes of a device's memory for a process that computes there: assumed, since no
# device with memory of its own was at hand.
_DEVICE_CONTEXT = 500_000_000
_HALF = ("fp16", "bf16")
_ROUND = 64  # tokens to which a context that would fit is rounded
_THREAD = 1 << 18  # of each thread, measured with onnxruntime from 2 to 16


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
    kv_precision: str = "auto",
    free: int | None,
) -> MemoryNeed:
    """The most memory that a load, and one sequence of ``context`` tokens, will take.

    On the host it is what the process's resident memory grows by, at its highest, from
    ``import phirt`` on. On a device with memory of its own it is what is taken there, and what
    the host has beside it is `MemoryNeed.host`; that part is not measured.

    Args:
        shape: The decoder.
        backend: Name of the backend.
        device_kind: Kind of the device, such as ``"cpu"``.
        layout: Layout of the folder, as in `Artifact`.
        precision: How its weights are stored, where that is known.
        weights_bytes: Size of the weights' files.
        context: Tokens.
        threads: As in `LoadOptions`.
        kv_precision: As in `PlanRequest`.
        free: What is free where they will be, or None where nobody tells.
    """
    held = footprint_of(backend)
    precision = precision or shape.likely_precision(weights_bytes)
    on_host = device_kind in _ON_HOST
    table = _table_bytes(shape, weights_bytes)
    tables = _tables(held, shape, layout, precision) * table
    factor = held.kept.get(precision, held.kept[""])
    kept = max(0, round(weights_bytes * factor) + tables)
    own = 2 if precision in _HALF and not on_host else 4
    element = KV_PRECISIONS.get(kv_precision, own)
    overhead = held.quantized_kv if kv_precision == "int8" else 1.0
    kv = round(element * overhead * shape.kv_values * context)
    work = _workspace(held, shape, context) + (_copies(held, context) - 1) * kv
    tokenizer = TOKENIZER * shape.vocab_size
    if not on_host:
        return MemoryNeed(
            weights=weights_bytes,
            kv=kv,
            workspace=work + _DEVICE_CONTEXT,
            context=context,
            free=free,
            # The files are read through it, and let go of.
            host=held.runtime + tokenizer + weights_bytes,
        )
    runtime = held.runtime + (threads or 0) * _THREAD
    running = kept + kv + work + tokenizer
    parsing = kept + TOKENIZER_PARSED * shape.vocab_size
    packing = kept + (table if held.packs_head else 0)
    reading = round(weights_bytes * held.loading.get(precision, 0))
    total = runtime + max(running, parsing, packing, reading)
    return MemoryNeed(weights=kept, kv=kv, workspace=total - kept - kv, context=context, free=free)


def _tables(held: Footprint, shape: ModelShape, layout: str, precision: str) -> int:
    """Embeddings that are kept beside the factor."""
    if not shape.tied:
        return held.untied_tables
    if layout in ("safetensors", "mlx"):
        return 0
    return (held.tables if shape.prunes_logits else held.foreign_tables).get(precision, 0)


def _table_bytes(shape: ModelShape, size: int) -> int:
    """Size of an embedding, or LM head, in the files."""
    # phirt rounds none to fewer than 8 bits; Model Builder does.
    least = 8 if shape.prunes_logits else 4
    bits = min(32, max(least, 8 * size / shape.num_weights))
    return min(round(shape.vocab_size * shape.hidden_size * bits / 8), size)


def _chunk(held: Footprint, context: int) -> tuple[int, int]:
    """Tokens that run at once, and how often, where the context is a prompt."""
    count = -(-context // held.chunk)
    return -(-context // count), count


def _copies(held: Footprint, context: int) -> int:
    return held.cache_copies if _chunk(held, context)[1] > 1 else 1


def _workspace(held: Footprint, shape: ModelShape, context: int) -> int:
    """What a chunk of a prompt is computed in."""
    tokens, count = _chunk(held, context)
    # In float32: gate, up and their product; and the stream, its norm, queries and attention.
    activations = 4 * tokens * (3 * shape.intermediate_size + 4 * shape.hidden_size)
    copies = held.logits_copies[count > 1]
    logits = 0 if shape.prunes_logits else 4 * copies * tokens * shape.vocab_size
    return round(held.activations * activations) + logits


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
        OutOfMemoryError: It does not fit; the message says what would.
    """
    if need.fits or need.free is None:
        return
    stored = f" in {precision}" if precision else ""
    advice = _advice(need, shape, backend, precision)
    raise OutOfMemoryError(
        f"{model!r}{stored} with a context of {need.context:,} tokens, on device {device!r} with "
        f"backend {backend!r}, needs {megabytes(need.total)}: {megabytes(need.weights)} of "
        f"weights, {megabytes(need.kv)} of KV cache and {megabytes(need.workspace)} of "
        f"workspace. {megabytes(need.free)} are free. {advice}"
    )


def check_pair_fit(prefill: PlanCandidate, decode: PlanCandidate, *, model: str) -> None:
    """Refuse two runtimes that cannot hold a model beside each other.

    Each has a copy of the weights, and while a KV cache is handed over there are two of it.
    Where nobody knows what one of them needs, each is held against what is free as it is loaded.

    Args:
        prefill: The one, which fits alone.
        decode: The other, likewise.
        model: What the user calls the model.

    Raises:
        OutOfMemoryError: They do not fit; the message has the numbers.
    """
    places: dict[str, list[tuple[PlanCandidate, MemoryNeed]]] = {}
    for part in (prefill, decode):
        if part.memory is None:
            return
        kind = DeviceName.parse(part.device).kind
        place = "the host" if kind in _ON_HOST else f"device {part.device!r}"
        places.setdefault(place, []).append((part, part.memory))
    for place, held in places.items():
        frees = [need.free for _, need in held if need.free is not None]
        total = sum(need.total for _, need in held)
        if not frees or total <= min(frees):
            continue
        each = " and ".join(
            f"{megabytes(need.total)} for {part.described} ({megabytes(need.weights)} of weights, "
            f"{megabytes(need.kv)} of KV cache and {megabytes(need.workspace)} of workspace)"
            for part, need in held
        )
        raise OutOfMemoryError(
            f"{model!r} with a context of {held[0][1].context:,} tokens, on two runtimes, needs "
            f"{megabytes(total)} of the memory of {place}: {each}. {megabytes(min(frees))} are "
            f'free. Pass backend="{decode.backend}" alone, a smaller context, or a precision with '
            "smaller weights."
        )


def _advice(need: MemoryNeed, shape: ModelShape, backend: str, precision: str | None) -> str:
    """What would fit."""
    ways = []
    context = _largest_context(need)
    if context:
        ways.append(f"a context of {context:,} tokens (context={context})")
    smaller = _fitting_precision(need, shape, backend, precision)
    if smaller:
        ways.append(f'precision="{smaller}", where the model can be converted to it')
    if ways:
        return f"What would fit: {', or '.join(ways)}."
    return "Free memory, or choose a smaller model."


def _largest_context(need: MemoryNeed) -> int:
    """Tokens that the cache would have room for; 0 where there is none for a usable number."""
    per_token = need.kv / need.context
    room = int(((need.free or 0) - need.weights - need.workspace) / per_token) if per_token else 0
    rounded = room // _ROUND * _ROUND
    return rounded if 0 < rounded < need.context else 0


def _fitting_precision(
    need: MemoryNeed, shape: ModelShape, backend: str, precision: str | None
) -> str | None:
    """The best of the backend's smaller precisions that fits."""
    bits = bits_of(precision or shape.likely_precision(need.weights)) or 32
    for name in footprint_of(backend).smaller:
        share = (bits_of(name) or 32) / bits
        if share < 1 and need.total - need.weights * (1 - share) <= (need.free or 0):
            return name
    return None
