"""A model without a runtime: its logits are a function of the ids in the session."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from phirt.backends.base import BaseModel, BaseSession, HostLogits
from phirt.backends.execution import Execution, Parallel
from phirt.errors import BackendRuntimeError
from phirt.protocols import Capabilities, Lack, Logits, ModelInfo, Placement
from phirt.types import FloatArray

Rule = Callable[[list[int]], FloatArray]


def one_hot(vocab: int, token: int, *, peak: float = 10.0) -> FloatArray:
    """Logits that make one token certain under greedy."""
    logits = np.zeros(vocab, np.float32)
    logits[token] = peak
    return logits


def counting(vocab: int) -> Rule:
    """Each token is followed by the next id: 3, 4, 5, …, modulo the vocabulary."""
    return lambda ids: one_hot(vocab, (ids[-1] + 1) % vocab)


def scripted(vocab: int, prompt_length: int, script: Sequence[int]) -> Rule:
    """Generates the script, whatever the prompt, and then token 0."""

    def rule(ids: list[int]) -> FloatArray:
        position = len(ids) - prompt_length
        return one_hot(vocab, script[position] if position < len(script) else 0)

    return rule


class FakeModel(BaseModel):
    """A `phirt.protocols.LoadedModel` that counts what is done to it.

    Args:
        rule: Logits of the position after the given ids.
        delay: Seconds that every call takes.
        stall: Calls block until they are interrupted.
        fail_at: The call (counted over all sessions, from 1) that raises.
    """

    def __init__(
        self,
        rule: Rule | None = None,
        *,
        vocab: int = 8,
        context_length: int = 64,
        eos: Sequence[int] = (),
        can_extend: bool = True,
        rope_boundary: int | None = None,
        delay: float = 0.0,
        stall: bool = False,
        fail_at: int | None = None,
        verify: bool = True,
        execution: Execution | None = None,
    ) -> None:
        self.rule = rule or counting(vocab)
        self.device = "cpu"
        missing = ["kv", "batch", "topk"] + ([] if verify else ["verify"])
        super().__init__(
            info=ModelInfo(
                vocab_size=vocab,
                context_length=context_length,
                eos_token_ids=frozenset(eos),
                weights_id="fake",
                rope_boundary=rope_boundary,
            ),
            capabilities=Capabilities(
                truncate=True,
                verify=verify,
                interrupt=True,
                lacks={name: Lack("never", "a fake needs none") for name in missing},
            ),
            execution=execution or Parallel(),
        )
        self.can_extend = can_extend
        self.delay = delay
        self.stall = stall
        self.fail_at = fail_at
        self.calls: list[tuple[str, int]] = []
        self.sessions_opened = 0
        self.sessions_open = 0
        self.requests: list[tuple[int, int]] = []
        self.closed = False
        self.unloaded = False

    def _new_session(self, *, max_length: int, expected_length: int) -> FakeSession:
        self.sessions_opened += 1
        self.sessions_open += 1
        self.requests.append((max_length, expected_length))
        return FakeSession(self, max_length=max_length)

    def placement(self) -> Placement:
        return Placement(device=self.device, provider="fake")

    def close(self) -> None:
        self.closed = True
        super().close()

    def _unload(self) -> None:
        self.unloaded = True


class FakeSession(BaseSession):
    def __init__(self, model: FakeModel, *, max_length: int) -> None:
        super().__init__(model, max_length=max_length)
        self.model = model
        self.ids: list[int] = []
        self.stop_stalling = threading.Event()

    @property
    def can_extend(self) -> bool:
        return self.model.can_extend

    def _append(self, token_ids: Sequence[int], *, every_position: bool) -> Logits:
        model = self.model
        model.calls.append(("verify" if every_position else "run", len(token_ids)))
        if model.delay:
            time.sleep(model.delay)
        if model.stall and self.stop_stalling.wait(timeout=60):
            raise BackendRuntimeError("the call was ended")
        if model.fail_at == len(model.calls):
            raise BackendRuntimeError("the fake failed, as it was told to")
        rows = []
        for token in token_ids:
            self.ids.append(token)
            rows.append(model.rule(self.ids))
        return HostLogits(np.stack(rows if every_position else rows[-1:]))

    def _truncate(self, length: int) -> None:
        del self.ids[length:]

    def _interrupt(self) -> None:
        self.stop_stalling.set()

    def _free(self) -> None:
        self.model.sessions_open -= 1
