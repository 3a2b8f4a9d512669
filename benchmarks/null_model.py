"""A model that costs nothing: what is left is phirt's own time per token."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from phirt.backends.base import BaseModel, BaseSession, HostLogits
from phirt.backends.execution import Parallel
from phirt.protocols import Capabilities, Lack, Logits, ModelInfo, Placement

_LACKS = ("verify", "kv", "batch", "topk")


class NullModel(BaseModel):
    """Logits drawn once, with the spread of a real model's, in a buffer that may be written.

    Attributes:
        seconds: Time that the sessions took for themselves (the copy of the logits), to be
            subtracted from what a run took.
    """

    def __init__(self, vocab: int) -> None:
        generator = np.random.default_rng(0)
        # A few likely tokens over a broad floor, as language models have it.
        self.logits = generator.normal(0, 2.5, (8, vocab)).astype(np.float32)
        self.logits[:, generator.integers(0, 40_000, 40)] += 8
        lacks = {name: Lack("never", "nothing is computed") for name in _LACKS}
        super().__init__(
            info=ModelInfo(
                vocab_size=vocab,
                context_length=1 << 20,
                eos_token_ids=frozenset(),
                weights_id="null",
            ),
            capabilities=Capabilities(truncate=True, interrupt=True, lacks=lacks),
            execution=Parallel(),
        )
        self.seconds = 0.0

    def _new_session(self, *, max_length: int, expected_length: int) -> NullSession:
        del expected_length
        return NullSession(self, max_length=max_length)

    def placement(self) -> Placement:
        return Placement(device="cpu", provider="none")

    def _unload(self) -> None:
        pass


class NullSession(BaseSession):
    def __init__(self, model: NullModel, *, max_length: int) -> None:
        super().__init__(model, max_length=max_length)
        self._model = model
        self._buffer = np.empty_like(model.logits[:1])

    def _append(self, token_ids: Sequence[int], *, every_position: bool) -> Logits:
        del every_position
        started = time.perf_counter()
        source = self._model.logits[(self._length + len(token_ids)) % 8]
        np.copyto(self._buffer[0], source)
        self._model.seconds += time.perf_counter() - started
        return HostLogits(self._buffer)

    def _interrupt(self) -> None:
        pass

    def _free(self) -> None:
        pass
