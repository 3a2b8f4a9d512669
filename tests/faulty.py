"""A loaded model that fails at a chosen call, over one that does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from phirt.backends.base import HostLogits
from phirt.errors import BackendRuntimeError
from phirt.protocols import (
    Capabilities,
    KVCache,
    KVPool,
    LoadedModel,
    Logits,
    ModelInfo,
    Placement,
    Session,
)

Fault = Exception | Literal["nan"]


class FaultyModel:
    """A `phirt.protocols.LoadedModel` that is ``model`` but for one call, and all after it.

    Args:
        model: What it runs.
        at: The prefill or decode (counted over all sessions, from 1) that fails first; 0 lets
            no session open.
        fault: What the call raises; ``"nan"`` lets it return NaN logits.
    """

    def __init__(self, model: LoadedModel, at: int | None, fault: Fault | None = None) -> None:
        self.model = model
        self.at = at
        self.fault: Fault = fault or BackendRuntimeError("the device was lost")
        self.calls = 0
        self.sessions: list[FaultySession] = []
        self.closed = False

    @property
    def info(self) -> ModelInfo:
        return self.model.info

    @property
    def capabilities(self) -> Capabilities:
        return self.model.capabilities

    @property
    def concurrency(self) -> Literal["parallel", "serial", "owner"]:
        return self.model.concurrency

    def new_session(self, *, max_length: int, expected_length: int) -> Session:
        if self.at == 0 and isinstance(self.fault, Exception):
            raise self.fault
        inner = self.model.new_session(max_length=max_length, expected_length=expected_length)
        session = FaultySession(self, inner)
        self.sessions.append(session)
        return session

    def new_pool(self, *, slots: int, capacity: int, expected_length: int) -> KVPool:
        return self.model.new_pool(slots=slots, capacity=capacity, expected_length=expected_length)

    def placement(self) -> Placement:
        return self.model.placement()

    def close(self) -> None:
        self.closed = True
        self.model.close()

    def answer(self, logits: Logits) -> Logits:
        """What a call gives: the fault, once its number has come."""
        self.calls += 1
        if self.at is None or self.calls < self.at:
            return logits
        if isinstance(self.fault, Exception):
            raise self.fault
        return HostLogits(np.full_like(logits.numpy(), np.nan))


class FaultySession:
    """A session of a `FaultyModel`."""

    def __init__(self, model: FaultyModel, session: Session) -> None:
        self.model = model
        self.session = session
        self.closed = False

    @property
    def length(self) -> int:
        return self.session.length

    @property
    def floor(self) -> int:
        return self.session.floor

    @property
    def can_extend(self) -> bool:
        return self.session.can_extend

    def prefill(self, token_ids: Sequence[int], *, needs_logits: bool = True) -> Logits:
        return self.model.answer(self.session.prefill(token_ids, needs_logits=needs_logits))

    def decode(self, token_id: int) -> Logits:
        return self.model.answer(self.session.decode(token_id))

    def verify(self, token_ids: Sequence[int]) -> Logits:
        return self.model.answer(self.session.verify(token_ids))

    def truncate(self, length: int) -> None:
        self.session.truncate(length)

    def export_kv(self) -> KVCache:
        return self.session.export_kv()

    def import_kv(self, cache: KVCache) -> None:
        self.session.import_kv(cache)

    def interrupt(self) -> None:
        self.session.interrupt()

    def close(self) -> None:
        self.closed = True
        self.session.close()
