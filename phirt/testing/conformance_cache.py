"""Caches leave a session and enter another, of the same backend or of any other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from phirt.errors import ContextLengthError
from phirt.protocols import KVCache, KVLayer, LoadedModel
from phirt.testing.subject import Subject, random_ids

__all__ = ["CacheConformance"]

_LENGTH = 48
_SHORT, _LONG = 20, 40  # tokens, on either side of LongRoPE's boundary of 32


class CacheConformance:
    """The capability ``kv``."""

    @pytest.fixture
    def kv_subject(self, subject: Subject) -> Subject:
        """A subject that can export and import caches."""
        if not subject.model.capabilities.kv:
            pytest.skip(f"declared lack: {subject.model.capabilities.lacks['kv'].reason}")
        return subject

    @pytest.mark.parametrize("length", [_SHORT, _LONG])
    def test_exported_cache(self, kv_subject: Subject, length: int) -> None:
        """Keys after rotary and values, as the reference has them."""
        subject, ids = kv_subject, random_ids(length)
        with subject.session(length) as session:
            session.prefill(ids)
            cache = session.export_kv()
        expected = subject.oracle.cache(ids)
        subject.check(cache.length == length, f"the cache's length is {cache.length}, not {length}")
        subject.check(cache.regime == expected.regime, f"its regime is {cache.regime!r}")
        subject.check(cache.weights_id == subject.model.info.weights_id, "its weights_id")
        subject.check(len(cache.layers) == len(expected.layers), f"{len(cache.layers)} layers")
        for index, (layer, other) in enumerate(zip(cache.layers, expected.layers, strict=True)):
            for name in ("key", "value"):
                _assert_same(subject, f"{name} of layer {index}", layer, other, name)

    @pytest.mark.parametrize("length", [_SHORT, _LONG])
    def test_import_of_its_own(self, kv_subject: Subject, length: int) -> None:
        """A cache goes on in another session, after its own is closed."""
        _move(kv_subject, kv_subject.model, kv_subject.model, length)

    @pytest.mark.parametrize("length", [_SHORT, _LONG])
    def test_cache_to_another_backend(
        self, kv_subject: Subject, kv_partner: LoadedModel, length: int
    ) -> None:
        """Prefilled here, decoded there."""
        _move(kv_subject, kv_subject.model, kv_partner, length)

    @pytest.mark.parametrize("length", [_SHORT, _LONG])
    def test_cache_from_another_backend(
        self, kv_subject: Subject, kv_partner: LoadedModel, length: int
    ) -> None:
        """Prefilled there, decoded here."""
        _move(kv_subject, kv_partner, kv_subject.model, length)

    def test_an_exported_cache_is_a_copy(self, kv_subject: Subject) -> None:
        """What the session does later does not change it."""
        subject, ids = kv_subject, random_ids(_LONG + 1)
        with subject.session(_LONG + 1) as session:
            session.prefill(ids[:-1])
            cache = session.export_kv()
            before = [layer.key.copy() for layer in cache.layers]
            session.decode(ids[-1])
            if subject.model.capabilities.truncate:
                session.truncate(max(session.floor, _LONG - 4))
                session.decode(ids[0])
            same = all(
                np.array_equal(old, layer.key)
                for old, layer in zip(before, cache.layers, strict=True)
            )
        subject.check(same, "an exported cache changed while its session went on")

    def test_an_imported_cache_is_a_copy(self, kv_subject: Subject) -> None:
        """Writing to the cache afterwards changes nothing in the session."""
        subject, ids = kv_subject, random_ids(_LONG + 1)
        cache = subject.oracle.cache(ids[:-1])
        cache = replace(cache, weights_id=subject.model.info.weights_id)
        with subject.session(_LENGTH) as session:
            session.import_kv(cache)
            for layer in cache.layers:
                layer.key[:] = 0
                layer.value[:] = 0
            expected = subject.oracle.logits(ids)[-1:]
            subject.assert_logits(session.decode(ids[-1]), expected, "decode after an import")

    @pytest.mark.parametrize(
        "change",
        [
            pytest.param(lambda cache: replace(cache, weights_id="others"), id="weights"),
            pytest.param(
                lambda cache: replace(cache, regime=None if cache.regime else "long"), id="regime"
            ),
            pytest.param(lambda cache: replace(cache, layers=cache.layers[:-1]), id="layers"),
            pytest.param(lambda cache: replace(cache, length=cache.length - 1), id="length"),
            pytest.param(lambda cache: _reshaped(cache, heads=1), id="heads"),
            pytest.param(lambda cache: _reshaped(cache, width=8), id="head_size"),
        ],
    )
    def test_a_cache_that_does_not_fit(
        self, kv_subject: Subject, change: Callable[[KVCache], KVCache]
    ) -> None:
        """Of other weights, of another regime, of another shape: refused, nothing written."""
        subject, ids = kv_subject, random_ids(_LENGTH)
        with subject.session(_LENGTH) as session:
            session.prefill(ids[:_LONG])
            cache = session.export_kv()
        with subject.session(_LENGTH) as session:
            with pytest.raises(ValueError, match=r"\w"):
                session.import_kv(change(cache))
            logits = session.prefill(ids)
            expected = subject.oracle.logits(ids)[-1:]
            subject.assert_logits(logits, expected, "prefill after a refused import")

    def test_a_cache_into_a_session_that_is_not_empty(self, kv_subject: Subject) -> None:
        """Refused: it would overwrite what is there."""
        ids = random_ids(_LONG)
        with kv_subject.session(_LENGTH) as session:
            session.prefill(ids)
            cache = session.export_kv()
            with pytest.raises(ValueError, match="empty"):
                session.import_kv(cache)

    def test_a_cache_that_is_too_long(self, kv_subject: Subject) -> None:
        """Longer than the session may become."""
        with kv_subject.session(_LENGTH) as session:
            session.prefill(random_ids(_LENGTH))
            cache = session.export_kv()
        with kv_subject.session(_LONG) as session, pytest.raises(ContextLengthError):
            session.import_kv(cache)


def _move(subject: Subject, source: LoadedModel, target: LoadedModel, length: int) -> None:
    """Prefill on one model, decode 6 tokens on the other; the oracle's answers are expected."""
    ids = random_ids(length + 6, seed=length)
    expected = subject.oracle.logits(ids)
    if source.info.weights_id != target.info.weights_id:
        pytest.fail(
            f"{subject.name}: the artifacts of the two backends have different weights_ids, "
            f"{source.info.weights_id!r} and {target.info.weights_id!r}"
        )
    with subject.session(length + 6, model=source) as session:
        session.prefill(ids[:length])
        cache = session.export_kv()
    with subject.session(length + 6, model=target) as session:
        session.import_kv(cache)
        subject.check(session.length == length, f"import_kv left {session.length} tokens")
        for index in range(length, len(ids)):
            what = f"decode of token {index + 1} on a cache of {length}"
            subject.assert_logits(session.decode(ids[index]), expected[index : index + 1], what)


def _assert_same(subject: Subject, what: str, layer: KVLayer, other: KVLayer, name: str) -> None:
    values, expected = getattr(layer, name), getattr(other, name)[:, layer.start :]
    subject.check(values.dtype == np.float32, f"{what} is {values.dtype}, not float32")
    subject.check(
        values.shape == expected.shape, f"{what} has shape {values.shape}, not {expected.shape}"
    )
    worst = float(np.abs(values - expected).max())
    subject.check(worst <= subject.tolerance, f"{what} differs from the reference by {worst:.3g}")


def _reshaped(cache: KVCache, *, heads: int | None = None, width: int | None = None) -> KVCache:
    """The cache with fewer heads, or narrower ones, in every layer."""
    layers = tuple(
        KVLayer(layer.start, layer.key[:heads, :, :width], layer.value[:heads, :, :width])
        for layer in cache.layers
    )
    return replace(cache, layers=layers)
