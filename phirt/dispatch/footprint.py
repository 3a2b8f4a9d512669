"""How each runtime holds a model in memory: what was measured of it, once.

Each figure is of SmolLM2-135M on Linux, x86-64, with the versions that docs/memory.md names,
and was read off a difference: of two precisions, two lengths, or before and after a load. What
they are multiplied by (bytes of files, of a cache, of a table) is the model's own, and a decoder
of another shape, whose LM head is not its embedding, came out within 14 %.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["TOKENIZER", "TOKENIZER_PARSED", "Footprint", "footprint_of"]

TOKENIZER = 400
"""Bytes that a tokenizer keeps for each token of its vocabulary."""

TOKENIZER_PARSED = 870
"""The same while its file is being parsed, if merges are pairs; as strings they take half."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """How a runtime holds a model in the host's memory.

    Attributes:
        runtime: Its libraries, and what they allocate beside any model, in bytes.
        kept: By precision, bytes of weights that are resident once it has run, for each byte
            of their files. Where a precision is not named, the figure under ``""`` holds.
        loading: The same while it loads; where a precision is not named, as ``kept``.
        tables: By precision, embeddings that are kept beside that, where the LM head is the
            embedding; negative where the embedding is read row by row from the mapped file.
        foreign_tables: The same for a graph that phirt did not write.
        untied_tables: The same, in every precision, where the LM head is another matrix.
        packs_head: Whether the LM head is there twice while it is being packed.
        chunk: Most tokens of a prompt that it runs at once.
        cache_copies: Bytes for each byte of a cache that more than one chunk has made.
        quantized_kv: Bytes of a cache of 8 bits for each key or value, with what scales them.
        activations: Bytes of workspace for each byte of a chunk's activations.
        logits_copies: Copies of a chunk's logits, where they are computed at every position:
            of a prompt of one chunk, and of more.
        smaller: The precisions that make it need less, best first.
    """

    runtime: int
    kept: Mapping[str, float]
    loading: Mapping[str, float] = field(default_factory=dict)
    tables: Mapping[str, int] = field(default_factory=dict)
    foreign_tables: Mapping[str, int] = field(default_factory=dict)
    untied_tables: int = -1
    packs_head: bool = False
    chunk: int = 512
    cache_copies: int = 1
    quantized_kv: float = 1.0
    activations: float
    logits_copies: tuple[int, int] = (0, 0)
    smaller: tuple[str, ...] = ()


# MLAS packs block-quantized matrices and lets go of what they were mapped from: to the 8 (4) bits
# and the scale of a block of 64 (32) it adds the block's sum, in float32. It packs none of those
# whose activations stay float ("exact"). An LM head that is the embedding is packed, and the
# embedding not kept, unless a graph reaches it by another name, as Model Builder's do.
_PACKED = {"": 1.03, "int8": 1.06, "int4": 1.2, "exact": 1.0}
_ORT_TABLES = {"exact": -1}
_FOREIGN_TABLES = {"fp32": 1, "int8": 1, "int4": 1}
_QUANTIZED = ("exact", "int8", "int4")

_ORT = Footprint(
    runtime=42_000_000,
    kept=_PACKED,
    tables=_ORT_TABLES,
    foreign_tables=_FOREIGN_TABLES,
    packs_head=True,
    activations=2.9,
    logits_copies=(2, 3),
    smaller=_QUANTIZED,
)
# The same runtime, driven by genai: a chunk is `phirt.backends.onnxruntime_genai.session.CHUNK`.
_GENAI = Footprint(
    runtime=64_000_000,
    kept=_PACKED,
    tables=_ORT_TABLES,
    foreign_tables=_FOREIGN_TABLES,
    packs_head=True,
    chunk=256,
    activations=2.0,
    logits_copies=(1, 1),
    smaller=_QUANTIZED,
)
# The compiled model is mapped from phirt's cache on disk, and packed once more at the first run.
# While it is read, the graph that it is of is mapped too: of float weights every byte is
# touched, to recognise them. A cache that grows is copied into a larger one.
_OPENVINO = Footprint(
    runtime=108_000_000,
    kept={"": 2.0},
    loading={"fp32": 2.7, "fp16": 2.7},
    tables={"fp32": 1},
    untied_tables=-2,
    cache_copies=2,
    activations=2.8,
    smaller=_QUANTIZED,
)
# Both compute in float32 on a CPU, whatever the files hold, and convert while they read.
_TORCH = Footprint(
    runtime=325_000_000,
    kept={"fp32": 1.0, "fp16": 2.0, "bf16": 2.0, "": 1.0},
    loading={"fp16": 3.0, "bf16": 3.0},
    activations=1.4,
)
_MLX = Footprint(
    runtime=17_000_000,
    kept={"fp32": 1.0, "fp16": 2.0, "bf16": 2.0, "": 1.0},
    loading={"fp32": 2.0, "fp16": 3.0, "bf16": 3.0, "": 2.0},
    untied_tables=0,
    quantized_kv=1.25,  # scale and offset of 32 values, in float32
    activations=2.7,
)
# Of a backend that was not measured, from above.
_UNKNOWN = Footprint(runtime=150_000_000, kept={"": 1.2}, untied_tables=0, activations=2.8)

_FOOTPRINTS = {
    "onnxruntime": _ORT,
    "onnxruntime-genai": _GENAI,
    "openvino": _OPENVINO,
    "transformers": _TORCH,
    "mlx": _MLX,
}


def footprint_of(backend: str) -> Footprint:
    """How that backend's runtime holds a model."""
    return _FOOTPRINTS.get(backend, _UNKNOWN)
