"""Backends that are wrong in one way each, under the suite. Run by test_conformance.py.

Each is the reference with a fault that a real adapter could have. `CAUGHT_BY` names, for each
class of tests, the test that is there for its fault.
"""

from __future__ import annotations

import pickle
import runpy
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from phirt.backends.base import HostLogits, Positions
from phirt.backends.reference.adapter import (
    ReferenceBackend,
    ReferenceModel,
    ReferencePool,
    ReferenceSession,
)
from phirt.protocols import (
    Accept,
    Capabilities,
    KVCache,
    KVLayer,
    Lack,
    LoadOptions,
    Logits,
    Session,
)
from phirt.testing import BackendConformance
from phirt.types import Artifact

CAUGHT_BY = {
    "TestDriftsInDecode": "test_decode_after_prefill[llama]",
    "TestRoundsToHalf": "test_prefill[llama-60]",
    "TestLosesChunks": "test_chunked_prefill[llama-chunks0]",
    "TestLeavesOutMoreThanLogits": "test_chunks_without_logits[llama-chunks0]",
    "TestTruncatesTooFar": "test_truncate[llama-4]",
    "TestTruncatesNothing": "test_truncate_to_the_floor[llama]",
    "TestSwapsRows": "test_some_rows_in_any_order[llama-long]",
    "TestReordersOneByOne": "test_reorder[llama-short]",
    "TestSharesOneCache": "test_two_sessions_in_turn[llama]",
    "TestSharesTokensOfThreads": "test_sessions_on_several_threads[llama]",
    "TestIgnoresInterrupts": "test_interrupt[llama]",
    "TestKeepsClosedSessions": "test_nothing_keeps_what_was_closed",
    "TestExportsViews": "test_an_exported_cache_is_a_copy[llama]",
    "TestExportsOtherKeys": "test_exported_cache[llama-40]",
    "TestTakesAnyCache": "test_a_cache_that_does_not_fit[llama-weights]",
    "TestUsesShortFactorsOnly": "test_a_long_session_from_the_boundary[phi3]",
    "TestBeginsLongSessionsShort": "test_a_long_session_that_begins_short[phi3-20]",
    "TestLacksWhatWorks": "test_declared_lacks[llama]",
    "TestAnswersWhatItLacks": "test_declared_lacks[llama]",
    "TestLoadsWhatItRejects": "test_rejected_models",
    "TestSaysAnotherContext": "test_model_info[llama]",
    "TestAcceptsAnyDevice": "test_accepts[llama]",
    "TestRunsPlantedCode": "test_planted_code[auto_map]",
    "TestOpensPickles": "test_pickles_beside_the_weights",
    "TestHidesNaN": "test_weights_that_are_not_finite",
}


class Model(ReferenceModel):
    """The reference, with other sessions and pools."""

    session: type[ReferenceSession]
    pool: type[ReferencePool]

    def _new_session(self, *, max_length: int, expected_length: int) -> ReferenceSession:
        return self.session(self, max_length=max_length, expected_length=expected_length)

    def _new_pool(self, *, slots: int, capacity: int, expected_length: int) -> ReferencePool:
        return self.pool(self, slots=slots, capacity=capacity, expected_length=expected_length)


class Backend(ReferenceBackend):
    """The reference, with another model."""

    session: ClassVar[type[ReferenceSession]] = ReferenceSession
    pool: ClassVar[type[ReferencePool]] = ReferencePool

    def load(self, artifact: Artifact, device: str, options: LoadOptions) -> ReferenceModel:
        model = super().load(artifact, device, options)
        model.__class__ = Model
        assert isinstance(model, Model)
        model.session, model.pool = self.session, self.pool
        return model


class Suite(BackendConformance):
    architectures = ("llama", "phi3")


def with_session(session: type[ReferenceSession]) -> type[Backend]:
    return type("Broken", (Backend,), {"session": session})


def with_pool(pool: type[ReferencePool]) -> type[Backend]:
    return type("Broken", (Backend,), {"pool": pool})


class TestSound(Suite):
    """The control: without a fault all of these tests pass."""

    backend = Backend


class TestDriftsInDecode(Suite):
    class Broken(ReferenceSession):
        def decode(self, token_id: int) -> Logits:
            values = super().decode(token_id).numpy()
            values[:, 7] += 0.01
            return HostLogits(values)

    backend = with_session(Broken)


class TestRoundsToHalf(Suite):
    class Broken(ReferenceSession):
        def prefill(self, token_ids: Sequence[int], *, needs_logits: bool = True) -> Logits:
            values = super().prefill(token_ids, needs_logits=needs_logits).numpy()
            return HostLogits(values.astype(np.float16).astype(np.float32))

    backend = with_session(Broken)


class TestLosesChunks(Suite):
    class Broken(ReferenceSession):
        def prefill(self, token_ids: Sequence[int], *, needs_logits: bool = True) -> Logits:
            if self.length:  # The second part overwrites the end of the first.
                self.truncate(self.length - 1)
            return super().prefill(token_ids, needs_logits=needs_logits)

    backend = with_session(Broken)


class TestLeavesOutMoreThanLogits(Suite):
    class Broken(ReferenceSession):
        def _append_only(self, token_ids: Sequence[int]) -> Logits:
            logits = super()._append_only(token_ids)
            assert self._cache is not None
            for layer in range(2):
                self._cache.append(layer, self.length, *np.zeros((2, 2, 1, 16), np.float32))
            return logits

    backend = with_session(Broken)


class TestTruncatesTooFar(Suite):
    class Broken(ReferenceSession):
        def _truncate(self, length: int) -> None:
            assert self._cache is not None
            for layer in range(2):
                self._cache.append(layer, length - 1, *np.zeros((2, 2, 1, 16), np.float32))

    backend = with_session(Broken)


class TestTruncatesNothing(Suite):
    class Broken(ReferenceSession):
        def truncate(self, length: int) -> None:
            del length

    backend = with_session(Broken)


class TestSwapsRows(Suite):
    class Broken(ReferencePool):
        def decode(self, sessions: Sequence[Session], token_ids: Sequence[int]) -> Logits:
            return HostLogits(super().decode(sessions, token_ids).numpy()[::-1])

    backend = with_pool(Broken)


class TestReordersOneByOne(Suite):
    class Broken(ReferencePool):
        def reorder(self, sessions: Sequence[Session], sources: Sequence[Session]) -> None:
            for session, source in zip(sessions, sources, strict=True):
                super().reorder([session], [source])

    backend = with_pool(Broken)


class TestSharesOneCache(Suite):
    class Broken(ReferenceSession):
        shared: ClassVar[dict[int, Any]] = {}

        def reserve(self, length: int) -> None:
            super().reserve(max(length, 256))
            self._cache = self.shared.setdefault(id(self._base_model), self._cache)

    backend = with_session(Broken)


class TestSharesTokensOfThreads(Suite):
    class Broken(ReferenceSession):
        tokens: ClassVar[list[int]] = []

        def _append(self, token_ids: Sequence[int], *, every_position: bool) -> Logits:
            if len(token_ids) > 1:
                return super()._append(token_ids, every_position=every_position)
            self.tokens[:] = token_ids
            time.sleep(0.001)  # So that the other threads come by.
            return super()._append(list(self.tokens), every_position=every_position)

    backend = with_session(Broken)


class TestIgnoresInterrupts(Suite):
    class Broken(ReferenceSession):
        def interrupt(self) -> None:
            pass

    backend = with_session(Broken)


class TestKeepsClosedSessions(Suite):
    class Broken(ReferenceSession):
        kept: ClassVar[list[Any]] = []

        def _free(self) -> None:
            self.kept.append(self)

    backend = with_session(Broken)


class TestExportsViews(Suite):
    class Broken(ReferenceSession):
        def _export_kv(self) -> Sequence[KVLayer]:
            assert self._cache is not None
            pairs = zip(self._cache._keys, self._cache._values, strict=True)
            return [KVLayer(0, k[:, : self.length], v[:, : self.length]) for k, v in pairs]

    backend = with_session(Broken)


class TestExportsOtherKeys(Suite):
    class Broken(ReferenceSession):
        def _export_kv(self) -> Sequence[KVLayer]:
            return [replace(layer, key=layer.key[..., ::-1]) for layer in super()._export_kv()]

    backend = with_session(Broken)


class TestTakesAnyCache(Suite):
    class Broken(ReferenceSession):
        def import_kv(self, cache: KVCache) -> None:
            known = replace(cache, weights_id=self._info.weights_id, regime=self._regime)
            super().import_kv(known)

    backend = with_session(Broken)


class TestUsesShortFactorsOnly(Suite):
    class Broken(ReferenceSession):
        def reserve(self, length: int) -> None:
            regime, self._regime = self._regime, None
            super().reserve(length)
            self._regime = regime

    backend = with_session(Broken)


class TestBeginsLongSessionsShort(Suite):
    class Broken(ReferenceSession):
        def _run(self, token_ids: Sequence[int], *, which: Positions) -> Logits:
            self._info = replace(self._info, rope_boundary=None)
            return super()._run(token_ids, which=which)

    backend = with_session(Broken)


class LackingBackend(Backend):
    lack: ClassVar = Lack("never", "it is the fault of this test")

    def load(self, artifact: Artifact, device: str, options: LoadOptions) -> ReferenceModel:
        model = super().load(artifact, device, options)
        rest = dict.fromkeys(("truncate", "interrupt", "kv", "batch", "topk"), True)
        model.capabilities = Capabilities(**rest, lacks={"verify": self.lack})
        return model


class TestLacksWhatWorks(Suite):
    backend = LackingBackend


class LastPositionOnly(ReferenceSession):
    def verify(self, token_ids: Sequence[int]) -> Logits:
        return self.prefill(token_ids)


class TestAnswersWhatItLacks(Suite):
    backend = type("Broken", (LackingBackend,), {"session": LastPositionOnly})


class TestIsWrongInThisVersion(Suite):
    """No fault: the lack says that the runtime is wrong, and the suite waits until it is not."""

    backend = type(
        "Broken",
        (LackingBackend,),
        {"session": LastPositionOnly, "lack": Lack("this version", "it is wrong, and known to be")},
    )


class TestLoadsWhatItRejects(Suite):
    backend = Backend
    rejected: ClassVar = {"qwen3": Lack("not yet", "it is the fault of this test")}


class TestSaysAnotherContext(Suite):
    class Broken(Backend):
        def load(self, artifact: Artifact, device: str, options: LoadOptions) -> ReferenceModel:
            model = super().load(artifact, device, options)
            model.info = replace(model.info, context_length=128)
            return model

    backend = Broken


class TestAcceptsAnyDevice(Suite):
    class Broken(Backend):
        def accepts(self, artifact: Artifact, device: str) -> Accept:
            return Accept()

    backend = Broken


class TestRunsPlantedCode(Suite):
    class Broken(Backend):
        def load(self, artifact: Artifact, device: str, options: LoadOptions) -> ReferenceModel:
            for path in artifact.path.glob("planted.py"):
                runpy.run_path(str(path))
            return super().load(artifact, device, options)

    backend = Broken


class TestOpensPickles(Suite):
    class Broken(Backend):
        def load(self, artifact: Artifact, device: str, options: LoadOptions) -> ReferenceModel:
            for path in artifact.path.glob("*.pkl"):
                pickle.loads(path.read_bytes())  # noqa: S301 - it is the fault
            return super().load(artifact, device, options)

    backend = Broken


class TestHidesNaN(Suite):
    class Broken(ReferenceSession):
        def _append(self, token_ids: Sequence[int], *, every_position: bool) -> Logits:
            values = super()._append(token_ids, every_position=every_position).numpy()
            return HostLogits(np.nan_to_num(values))

    backend = with_session(Broken)
