"""How large a model's keys and values become: what scales of a cache in 8 bits are made of.

They are found once for an artifact, on a text, and kept in the store.

Keys lie in the cache rotated, so that a channel takes turns with the one that it is rotated
against; what neither exceeds at any position is the length of the two together. That is what
makes ranges that were found on short texts hold for long ones.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from phirt.errors import ModelError, ModelFormatError
from phirt.models.folder import ModelFolder
from phirt.models.kv_file import read_kv, write_kv
from phirt.models.store import Store
from phirt.protocols import KVCache, KVLayer, LoadedModel, ModelInfo
from phirt.text.calibration import calibration_pieces
from phirt.text.tokenizer import Tokenizer
from phirt.types import FloatArray

__all__ = ["find_ranges", "keep_ranges", "kept_ranges"]

_logger = logging.getLogger(__name__)

# Counts changes of how ranges are found.
_VERSION = 1
# Of SmolLM2, 2 pieces give a cache of twice the divergence that 8 give; 32 give the same as 8.
_PIECES, _LENGTH = 8, 160


def kept_ranges(folder: ModelFolder, info: ModelInfo) -> KVCache | None:
    """The ranges that were found earlier, or None where there are none, or they are damaged.

    Args:
        folder: The model's.
        info: What it is.
    """
    path, facts = _path_of(folder), folder.facts
    values = 2 * facts.num_layers * facts.num_kv_heads * facts.head_size
    try:
        cache = read_kv(path, info=info, bytes_per_token=4 * values).cache
    except ModelError as error:
        if path.exists():
            _logger.info("Passed over, and found out again: %s", error)
        return None
    shape = (facts.num_kv_heads, 1, facts.head_size)
    fits = len(cache.layers) == facts.num_layers and all(
        array.shape == shape for layer in cache.layers for array in (layer.key, layer.value)
    )
    return cache if fits else None


def keep_ranges(folder: ModelFolder, ranges: KVCache) -> None:
    """Keep ranges in the store. Where it cannot be written, a line in the log says so."""
    path = _path_of(folder)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_kv(path, ranges, [0])
    except OSError as error:
        _logger.warning("%s cannot be written, and will be found out again: %s", path, error)


def find_ranges(
    model: LoadedModel, folder: ModelFolder, rotary_dims: Sequence[int | None]
) -> KVCache:
    """The largest magnitude of every channel of keys and values, on the calibration text.

    Args:
        model: The model, with its cache in floats.
        folder: What it was loaded from.
        rotary_dims: Of each layer, how many channels of a key are rotated, halves against each
            other; None where that is not known.

    Returns:
        Magnitudes as a cache of one token: each (kv_heads, 1, head_size).

    Raises:
        UnsupportedModelError: Its tokenizer makes too little of the text.
        ModelFormatError: Its tokenizer cannot be read, or keys or values are not finite.
        BackendError: The runtime failed.
        OutOfMemoryError: A cache of 160 tokens cannot be allocated.
    """
    info = model.info
    pieces = calibration_pieces(
        Tokenizer.from_file(folder.tokenizer_path).encode,
        vocab_size=info.vocab_size,
        count=_PIECES,
        longest=min(_LENGTH, info.context_length, info.rope_boundary or _LENGTH),
    )
    _logger.info("Finding out how large keys and values of %s become.", folder.artifact.path)
    found = [_ranges_on(model, piece, rotary_dims) for piece in pieces.tolist()]
    layers = tuple(
        KVLayer(
            start=0,
            key=np.maximum.reduce([layer.key for layer in each]),
            value=np.maximum.reduce([layer.value for layer in each]),
        )
        for each in zip(*found, strict=True)
    )
    if not all(np.isfinite(layer.key).all() and np.isfinite(layer.value).all() for layer in layers):
        raise ModelFormatError(
            f"{folder.artifact.path}: its keys or values are not finite on an ordinary text, so "
            "that no cache of 8 bits can hold them. Build the model again."
        )
    return KVCache(layers=layers, length=1, weights_id=info.weights_id, regime=info.regime(1))


def _ranges_on(
    model: LoadedModel, token_ids: Sequence[int], rotary_dims: Sequence[int | None]
) -> list[KVLayer]:
    session = model.new_session(max_length=len(token_ids), expected_length=len(token_ids))
    try:
        session.prefill(token_ids, needs_logits=False)
        layers = session.export_kv().layers
    finally:
        session.close()
    # Of a graph with other nodes of attention than layers, nothing is known.
    dims = rotary_dims if len(rotary_dims) == len(layers) else [None] * len(layers)
    return [
        KVLayer(start=0, key=_range_of(_bounds(layer.key, dim)), value=_range_of(layer.value))
        for layer, dim in zip(layers, dims, strict=True)
    ]


def _range_of(values: FloatArray) -> FloatArray:
    largest: FloatArray = np.abs(values).max(axis=1, keepdims=True)
    return largest


def _bounds(keys: FloatArray, rotary_dim: int | None) -> FloatArray:
    """What no channel of a key exceeds wherever the key stands, (kv_heads, tokens, head_size)."""
    if rotary_dim is None or rotary_dim > keys.shape[2]:
        # Which channels take turns is not known: any two of the head may.
        bound = np.sqrt(np.float32(2)) * np.abs(keys).max(axis=2, keepdims=True)
        return np.broadcast_to(bound, keys.shape)
    half = rotary_dim // 2
    length = np.hypot(keys[..., :half], keys[..., half:rotary_dim])
    return np.concatenate([length, length, np.abs(keys[..., rotary_dim:])], axis=-1)


def _path_of(folder: ModelFolder) -> Path:
    artifact = folder.artifact
    # What is rounded in other ways has other keys, and identities of weights may be of the source.
    facts = (str(_VERSION), artifact.weights_id, artifact.format, artifact.precision or "")
    name = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:32]
    return Store().root / "kv-ranges" / name
