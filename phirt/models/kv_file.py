"""KV caches on disk: one safetensors file each, with the tokens that it is of.

The tensors, in this order: ``token_ids``, I64, (length,); then of each layer from 0 on
``layers.<i>.key`` and ``layers.<i>.value``, F32, (kv_heads, positions, head_size), whose last
position is the cache's last token. The metadata: ``format`` is ``phirt-kv``, ``format_version``
is ``1``, ``length`` the number of tokens, ``weights_id`` that of the model, ``regime``
``short``, ``long`` or nothing, ``crc32`` of all bytes after the header in 8 hexadecimal digits.

A file may come from anybody: all of its header is checked before anything is allocated. The
checksum is against a disk's faults, and no proof of who wrote it.
"""

from __future__ import annotations

import os
import re
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import NoReturn, cast

import numpy as np
from numpy.typing import NDArray

from phirt.errors import ContextLengthError, ModelFormatError, UnsupportedModelError
from phirt.models.safetensors import Header, encode_header, open_tensors, read_header
from phirt.protocols import KVCache, KVLayer, ModelInfo, RopeRegime
from phirt.types import FloatArray, IntArray

__all__ = ["StoredCache", "read_kv", "write_kv"]

_FORMAT = "phirt-kv"
_VERSION = 1
_TOKENS = "token_ids"
_REGIMES = ("", "short", "long")


@dataclass(frozen=True, slots=True)
class StoredCache:
    """What a file holds.

    Attributes:
        cache: The cache.
        token_ids: The tokens that it is of, shape (cache.length,).
    """

    cache: KVCache
    token_ids: IntArray


def write_kv(path: Path, cache: KVCache, token_ids: Sequence[int]) -> None:
    """Write a cache to a file, which is there whole or not at all.

    Whoever can read the file can read the prompt: on Linux and macOS that is its owner alone.

    Args:
        path: The file; what is there is replaced.
        cache: The cache of at least one token.
        token_ids: The tokens that it is of.

    Raises:
        ValueError: It holds no tokens, or not as many as given.
        OSError: The file cannot be written.
    """
    if not 0 < cache.length == len(token_ids):
        raise ValueError(f"A cache of {cache.length} tokens was given {len(token_ids)} tokens.")
    named = list(_tensors(cache, token_ids))
    crc = 0
    for _, array in named:
        crc = zlib.crc32(array.data, crc)
    metadata = {
        "format": _FORMAT,
        "format_version": str(_VERSION),
        "length": str(cache.length),
        "weights_id": cache.weights_id,
        "regime": cache.regime or "",
        "crc32": f"{crc:08x}",
    }
    kinds = {np.dtype("<i8"): "I64", np.dtype("<f4"): "F32"}
    header = encode_header(
        metadata, [(name, kinds[array.dtype], array.shape) for name, array in named]
    )
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    beside = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(header)
            for _, array in named:
                file.write(array.data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise


def read_kv(path: Path, *, info: ModelInfo, bytes_per_token: int) -> StoredCache:
    """Read a cache for a model.

    Args:
        path: The file.
        info: What the model is; the cache must be of its weights.
        bytes_per_token: Most bytes that keys and values of a token may have, in float32.

    Raises:
        ModelNotFoundError: There is no such file.
        ModelFormatError: It is damaged, or no cache of phirt's.
        UnsupportedModelError: It is of other weights, or of a later version of the format.
        ContextLengthError: It holds more tokens than the model's context.
    """
    with open_tensors(path) as file:
        header = read_header(file, path)
        described = _check_metadata(path, header.metadata, info)
        layers = _check_tensors(path, header, described.length, bytes_per_token)
        arrays = _read(file, path, header, described.crc)
    token_ids = cast("IntArray", arrays[_TOKENS])
    if token_ids.min() < 0 or token_ids.max() >= info.vocab_size:
        _fail(path, f"its token ids are not all from 0 to {info.vocab_size - 1:,}")
    cache = KVCache(
        layers=tuple(_layer(path, arrays, index, described.length) for index in range(layers)),
        length=described.length,
        weights_id=info.weights_id,
        regime=described.regime,
    )
    return StoredCache(cache, token_ids)


@dataclass(frozen=True, slots=True)
class _Described:
    length: int
    regime: RopeRegime | None
    crc: int


def _tensors(
    cache: KVCache, token_ids: Sequence[int]
) -> Iterator[tuple[str, NDArray[np.int64] | FloatArray]]:
    yield _TOKENS, np.array(token_ids, "<i8")
    for index, layer in enumerate(cache.layers):
        yield _key(index), np.ascontiguousarray(layer.key, "<f4")
        yield _value(index), np.ascontiguousarray(layer.value, "<f4")


def _key(layer: int) -> str:
    return f"layers.{layer}.key"


def _value(layer: int) -> str:
    return f"layers.{layer}.value"


def _check_metadata(path: Path, metadata: Mapping[str, str], info: ModelInfo) -> _Described:
    if metadata.get("format") != _FORMAT:
        _fail(path, "its metadata does not name the format phirt-kv")
    version = metadata.get("format_version", "")[:20]
    if version != str(_VERSION):
        raise UnsupportedModelError(
            f"{path} is of version {version!r} of the format phirt-kv; this phirt reads "
            f"{_VERSION}. Save the cache again."
        )
    fields = {"length": r"[1-9][0-9]{0,9}", "crc32": r"[0-9a-f]{8}"}
    for name, form in fields.items():
        if re.fullmatch(form, metadata.get(name, ""), re.ASCII) is None:
            _fail(path, f"its field {name} is {metadata.get(name, '')[:20]!r}")
    if metadata.get("regime") not in _REGIMES:
        _fail(path, f"its field regime is {metadata.get('regime', '')[:20]!r}")
    if metadata.get("weights_id") != info.weights_id:
        raise UnsupportedModelError(
            f"{path} is a cache of the weights {metadata.get('weights_id', '')[:80]!r}; this model "
            f"has {info.weights_id!r}. Save the cache again with this model."
        )
    length = int(metadata["length"])
    if length > info.context_length:
        raise ContextLengthError(
            f"{path} holds a cache of {length} tokens; the model's context is "
            f"{info.context_length}.",
            required=length,
            available=info.context_length,
        )
    regime = cast("RopeRegime | None", metadata["regime"] or None)
    if not _is_regime_of(regime, length, info.rope_boundary):
        _fail(path, f"its {length} tokens have the rotary regime {regime!r}")
    return _Described(length, regime, int(metadata["crc32"], 16))


def _is_regime_of(regime: RopeRegime | None, length: int, boundary: int | None) -> bool:
    """Whether a session of the regime may hold so many tokens."""
    if boundary is None or regime is None:
        return (boundary, regime) == (None, None)
    return length >= boundary if regime == "long" else length <= boundary


def _check_tensors(path: Path, header: Header, length: int, bytes_per_token: int) -> int:
    """Check that they are those of a cache; how many layers it has."""
    tensors = header.tensors
    count, odd = divmod(len(tensors) - 1, 2)
    names = [_TOKENS, *(name(index) for index in range(count) for name in (_key, _value))]
    if odd or count < 1 or list(tensors) != names:
        _fail(path, "its tensors are not token_ids, and keys and values of layers from 0 on")
    for name, entry in tensors.items():
        wanted = "I64" if name == _TOKENS else "F32"
        if entry.dtype != wanted:
            _fail(path, f"the tensor {name!r} is {entry.dtype}, not {wanted}")
    if tensors[_TOKENS].shape != (length,):
        _fail(path, f"token_ids has the shape {tensors[_TOKENS].shape}, not ({length},)")
    for index in range(count):
        key, value = tensors[_key(index)].shape, tensors[_value(index)].shape
        if key[:2] != value[:2] or not all(
            len(shape) == 3 and min(shape) > 0 and shape[1] <= length for shape in (key, value)
        ):
            _fail(path, f"layer {index} has a key of {key} and a value of {value}")
    most = length * bytes_per_token
    held = sum(entry.nbytes for name, entry in tensors.items() if name != _TOKENS)
    if held > most:
        _fail(path, f"it has {held:,} bytes of keys and values, more than the {most:,} of a cache")
    return count


def _read(
    file: BufferedReader, path: Path, header: Header, wanted_crc: int
) -> dict[str, NDArray[np.generic]]:
    """All tensors, copied from the file: one that is mapped and shrinks kills the process."""
    arrays: dict[str, NDArray[np.generic]] = {}
    crc = 0
    for name, entry in header.tensors.items():
        array = np.empty(entry.shape, "<i8" if name == _TOKENS else "<f4")
        file.seek(entry.offset)
        if file.readinto(array.data.cast("B")) != entry.nbytes:
            _fail(path, "it has become shorter while it was read")
        crc = zlib.crc32(array.data, crc)
        arrays[name] = array
    if crc != wanted_crc:
        _fail(path, f"its bytes have the CRC-32 {crc:08x}, and its header says {wanted_crc:08x}")
    return arrays


def _layer(path: Path, arrays: dict[str, NDArray[np.generic]], index: int, length: int) -> KVLayer:
    key, value = arrays[_key(index)], arrays[_value(index)]
    if not (np.isfinite(key).all() and np.isfinite(value).all()):
        _fail(path, f"layer {index} holds NaN or infinity")
    return KVLayer(
        start=length - key.shape[1],
        key=key.astype(np.float32, copy=False),
        value=value.astype(np.float32, copy=False),
    )


def _fail(path: Path, problem: str) -> NoReturn:
    raise ModelFormatError(f"{path} is no KV cache that can be used: {problem}. Save it again.")
