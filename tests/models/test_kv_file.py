"""Caches on disk: what was written comes back, and nothing else is believed."""

from __future__ import annotations

import os
import stat
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from phirt.errors import (
    ContextLengthError,
    ModelFormatError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from phirt.models.kv_file import read_kv, write_kv
from phirt.models.safetensors import encode_header
from phirt.protocols import KVCache, KVLayer, ModelInfo

INFO = ModelInfo(vocab_size=50, context_length=64, eos_token_ids=frozenset(), weights_id="sha256:w")
LENGTH, HEADS, SIZE, LAYERS = 6, 2, 4, 3
BYTES = 2 * LAYERS * HEADS * SIZE * 4
IDS = [3, 1, 4, 1, 5, 9]


def layer(seed, *, positions=LENGTH, value_size=SIZE):
    draw = np.random.default_rng(seed).standard_normal
    return KVLayer(
        LENGTH - positions,
        draw((HEADS, positions, SIZE)).astype(np.float32),
        draw((HEADS, positions, value_size)).astype(np.float32),
    )


def cache(**changes):
    layers = tuple(layer(index) for index in range(LAYERS))
    return replace(KVCache(layers, LENGTH, INFO.weights_id), **changes)


def read(path, *, info=INFO, bytes_per_token=BYTES):
    return read_kv(path, info=info, bytes_per_token=bytes_per_token)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "prefix.kv"


@pytest.fixture
def written(path):
    write_kv(path, cache(), IDS)
    return path


def assert_same(found, expected):
    assert (found.length, found.weights_id, found.regime) == (
        expected.length,
        expected.weights_id,
        expected.regime,
    )
    for ours, theirs in zip(found.layers, expected.layers, strict=True):
        assert ours.start == theirs.start
        for name in ("key", "value"):
            values = getattr(ours, name)
            assert values.dtype == np.float32
            assert values.flags.writeable
            np.testing.assert_array_equal(values, getattr(theirs, name))


class TestWhatIsWritten:
    def test_comes_back(self, written):
        stored = read(written)
        assert_same(stored.cache, cache())
        assert stored.token_ids.tolist() == IDS

    def test_with_layers_of_their_own_lengths_and_widths(self, path):
        mixed = cache(layers=(layer(0), layer(1, positions=2), layer(2, value_size=2)))
        write_kv(path, mixed, IDS)
        assert_same(read(path).cache, mixed)

    @pytest.mark.parametrize(("regime", "other"), [("short", 5), ("long", 7)])
    def test_with_its_rotary_regime(self, path, regime, other):
        write_kv(path, cache(regime=regime), IDS)
        assert read(path, info=replace(INFO, rope_boundary=6)).cache.regime == regime
        for boundary in (None, other):
            with pytest.raises(ModelFormatError, match="rotary regime"):
                read(path, info=replace(INFO, rope_boundary=boundary))
        write_kv(path, cache(), IDS)
        with pytest.raises(ModelFormatError, match="rotary regime"):
            read(path, info=replace(INFO, rope_boundary=6))

    def test_is_read_by_the_official_library(self, written):
        pytest.importorskip("safetensors")
        from safetensors.numpy import load_file

        tensors = load_file(written)
        np.testing.assert_array_equal(tensors["layers.2.value"], cache().layers[2].value)
        assert tensors["token_ids"].tolist() == IDS

    def test_of_views_that_lie_in_another_order(self, path):
        turned = [np.asfortranarray(each.key) for each in cache().layers]
        write_kv(path, cache(layers=tuple(KVLayer(0, each, each) for each in turned)), IDS)
        np.testing.assert_array_equal(read(path).cache.layers[1].value, turned[1])

    def test_replaces_what_was_there(self, written):
        other = cache(layers=tuple(layer(index + 7) for index in range(LAYERS)))
        write_kv(written, other, IDS)
        assert_same(read(written).cache, other)
        assert list(written.parent.iterdir()) == [written]

    @pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such modes")
    def test_is_its_owners_alone(self, written):
        assert stat.S_IMODE(written.stat().st_mode) == 0o600

    @pytest.mark.parametrize(("where", "call"), [(os, "fsync"), (Path, "replace")])
    def test_is_there_whole_or_not_at_all(self, written, monkeypatch, where, call):
        def fail(*_):
            raise OSError("no space left")

        before = written.read_bytes()
        monkeypatch.setattr(where, call, fail)
        with pytest.raises(OSError, match="no space"):
            write_kv(written, cache(layers=(layer(9),)), IDS)
        assert written.read_bytes() == before
        assert list(written.parent.iterdir()) == [written]

    @pytest.mark.parametrize(("changes", "ids"), [({}, IDS[1:]), ({"length": 0}, [])])
    def test_tokens_that_do_not_fit(self, path, changes, ids):
        with pytest.raises(ValueError, match="tokens"):
            write_kv(path, cache(**changes), ids)
        assert not path.exists()

    def test_a_folder_that_is_not_there(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            write_kv(tmp_path / "nowhere" / "prefix.kv", cache(), IDS)


class TestWhatIsRefused:
    def test_no_file(self, path):
        with pytest.raises(ModelNotFoundError, match=r"prefix\.kv"):
            read(path)
        path.mkdir()
        with pytest.raises(ModelFormatError, match="regular"):
            read(path)

    def test_a_file_that_ends_anywhere(self, written):
        content = written.read_bytes()
        for end in range(len(content)):
            written.write_bytes(content[:end])
            with pytest.raises(ModelFormatError):
                read(written)

    def test_a_file_that_goes_on(self, written):
        with written.open("ab") as file:
            file.write(b"\0")
        with pytest.raises(ModelFormatError, match="bytes"):
            read(written)

    def test_any_byte_that_is_another(self, written):
        content = written.read_bytes()
        for position in range(len(content)):
            changed = bytearray(content)
            changed[position] ^= 1
            written.write_bytes(changed)
            try:
                stored = read(written)
            except (ModelFormatError, UnsupportedModelError, ContextLengthError):
                continue
            assert_same(stored.cache, cache())  # a space of the padding, say
            assert stored.token_ids.tolist() == IDS

    def test_other_weights(self, written):
        with pytest.raises(UnsupportedModelError, match="sha256:other"):
            read(written, info=replace(INFO, weights_id="sha256:other"))

    def test_more_tokens_than_the_context(self, written):
        with pytest.raises(ContextLengthError) as caught:
            read(written, info=replace(INFO, context_length=5))
        assert (caught.value.required, caught.value.available) == (6, 5)

    def test_tokens_beyond_the_vocabulary(self, written):
        with pytest.raises(ModelFormatError, match="token ids"):
            read(written, info=replace(INFO, vocab_size=9))

    def test_negative_tokens(self, path):
        write_kv(path, cache(), [-1, *IDS[1:]])
        with pytest.raises(ModelFormatError, match="token ids"):
            read(path)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_what_is_no_number(self, path, value):
        broken = cache()
        broken.layers[1].value[0, 0, 0] = value
        write_kv(path, broken, IDS)
        with pytest.raises(ModelFormatError, match="layer 1 holds NaN or infinity"):
            read(path)

    def test_more_bytes_than_the_model_has(self, written):
        with pytest.raises(ModelFormatError, match="bytes of keys and values"):
            read(written, bytes_per_token=BYTES - 1)


METADATA = {
    "format": "phirt-kv",
    "format_version": "1",
    "length": "6",
    "weights_id": INFO.weights_id,
    "regime": "",
    "crc32": "00000000",
}
KEY = (HEADS, LENGTH, SIZE)
TENSORS = [("token_ids", "I64", (6,)), ("layers.0.key", "F32", KEY), ("layers.0.value", "F32", KEY)]


class TestHeaders:
    """Refused by what the header says; the data behind it is a hole in the file."""

    def make(self, path, metadata=METADATA, tensors=TENSORS):
        header = encode_header(metadata, tensors)
        widths = {"I64": 8, "F32": 4, "F16": 2}
        size = sum(widths[dtype] * int(np.prod(shape)) for _, dtype, shape in tensors)
        with path.open("wb") as file:
            file.write(header)
            file.truncate(len(header) + size)
        return path

    def test_the_one_that_the_others_are_made_of(self, path):
        self.make(path)
        with pytest.raises(ModelFormatError, match="CRC-32"):  # which comes last
            read(path)

    @pytest.mark.parametrize("name", METADATA)
    @pytest.mark.parametrize("value", [None, "", "0", "x" * 1000, "\uff11", "-6", "6.0", "1e9"])
    def test_metadata(self, path, name, value):
        metadata = METADATA | {name: value}
        if value is None:
            del metadata[name]
        self.make(path, metadata)
        with pytest.raises((ModelFormatError, UnsupportedModelError)) as caught:
            read(path)
        assert len(str(caught.value)) < 400

    def test_a_later_version(self, path):
        self.make(path, METADATA | {"format_version": "2"})
        with pytest.raises(UnsupportedModelError, match="version '2'"):
            read(path)

    @pytest.mark.parametrize(
        "tensors",
        [
            [],
            TENSORS[:1],
            TENSORS[:2],
            TENSORS[1:],
            [TENSORS[0], TENSORS[2], TENSORS[1]],
            [*TENSORS, ("layers.2.key", "F32", KEY), ("layers.2.value", "F32", KEY)],
            [*TENSORS, ("x", "F32", (1,)), ("y", "F32", (1,))],
            [("token_ids", "F32", (6,)), *TENSORS[1:]],
            [("token_ids", "I64", (5,)), *TENSORS[1:]],
            [("token_ids", "I64", (6, 1)), *TENSORS[1:]],
            [*TENSORS[:2], ("layers.0.value", "F16", KEY)],
            [*TENSORS[:2], ("layers.0.value", "F32", (HEADS, LENGTH))],
            [*TENSORS[:2], ("layers.0.value", "F32", (1, LENGTH, SIZE))],
            [*TENSORS[:2], ("layers.0.value", "F32", (HEADS, LENGTH - 1, SIZE))],
            [*TENSORS[:2], ("layers.0.value", "F32", (HEADS, LENGTH, 0))],
            [
                TENSORS[0],
                ("layers.0.key", "F32", (HEADS, LENGTH + 1, SIZE)),
                ("layers.0.value", "F32", (HEADS, LENGTH + 1, SIZE)),
            ],
            [
                TENSORS[0],
                ("layers.0.key", "F32", (HEADS, LENGTH, 1 << 24)),
                ("layers.0.value", "F32", (HEADS, LENGTH, 1 << 24)),
            ],
        ],
        ids=str,
    )
    def test_tensors(self, path, tensors, monkeypatch):
        self.make(path, tensors=tensors)

        def refuse(*_):
            raise AssertionError("allocated")

        monkeypatch.setattr(np, "empty", refuse)
        with pytest.raises(ModelFormatError):
            read(path)
