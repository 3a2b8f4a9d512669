"""Continuous batching: requests that run at once share the steps of one model.

Every request drives its own session, from its own thread. `SharedModel` hands out sessions whose
calls meet in `phirt.generation.turns`: one step for all sequences that wait for their next
token, as rows of one KV pool, then one part of a newcomer's prompt, then a step again.
Sequences join and leave between two steps. A request that runs alone runs on a session of its
own, as without sharing; it moves into the pool when a second one comes.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from functools import partial
from typing import Literal

from phirt.errors import BackendRuntimeError, SessionClosedError
from phirt.generation.host_logits import HostLogits
from phirt.generation.pool_rows import PoolRows
from phirt.generation.prompt_parts import PromptParts
from phirt.generation.turns import Step, Turns
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

__all__ = ["MOST_ROWS", "SharedModel", "SharedSession", "can_share"]

MOST_ROWS = 32
"""Most sequences of one step."""


def can_share(model: LoadedModel) -> bool:
    """Whether requests of a model can share its steps: rows in pools, and caches that move."""
    return model.capabilities.batch and model.capabilities.kv


class SharedModel:
    """A loaded model whose sessions share their steps; a `phirt.protocols.LoadedModel` itself.

    Args:
        model: The model; `can_share` it.
    """

    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        self.rows = PoolRows(model, most=MOST_ROWS)
        self.turns: Turns[SharedSession] = Turns(self._run_step, most=MOST_ROWS)
        self.is_closed = False
        self.parts = PromptParts()

    @property
    def info(self) -> ModelInfo:
        """What the loop must know about the weights."""
        return self.model.info

    @property
    def capabilities(self) -> Capabilities:
        """What its sessions can do."""
        return self.model.capabilities

    @property
    def concurrency(self) -> Literal["parallel", "serial", "owner"]:
        """How sessions may run at once."""
        return self.model.concurrency

    def new_session(self, *, max_length: int, expected_length: int) -> SharedSession:
        """Start a sequence."""
        session = self.model.new_session(max_length=max_length, expected_length=expected_length)
        return SharedSession(self, session, max_length=max_length)

    def new_pool(self, *, slots: int, capacity: int, expected_length: int) -> KVPool:
        """A pool of its own, whose steps nobody shares."""
        return self.model.new_pool(slots=slots, capacity=capacity, expected_length=expected_length)

    def placement(self) -> Placement:
        """Where the graph really runs."""
        return self.model.placement()

    def close(self) -> None:
        """Free the weights once the last session has ended. Calling it again does nothing."""
        self.model.close()
        self.is_closed = True
        self.rows.close_if_empty()

    def part_of(self, remaining: int) -> tuple[int, bool]:
        """How many tokens of a prompt run at once, that the sequences beside it keep moving.

        Args:
            remaining: Tokens that are left of it.

        Returns:
            The tokens, and whether there are such sequences.
        """
        if not self.turns.others_step:
            return remaining, False
        return self.parts.size(remaining, step_s=self.turns.step_s), True

    def _run_step(self, steps: Sequence[Step[SharedSession]]) -> None:
        if len(steps) == 1:
            self._run_alone(steps[0])
            return
        together = self.rows.gather([step.member for step in steps])
        batch = [step for step in steps if step.member in together]
        if len(batch) > 1:
            rows = [step.member.inner for step in batch]
            tokens = [step.token_id for step in batch]
            try:
                values = self.rows.decode(rows, tokens).numpy()
            except Exception as error:
                batch[0].fail(error)
                for step in batch[1:]:
                    step.fail(_copy_of(error))
            else:
                for step, row in zip(batch, values, strict=True):
                    step.row = row
        for step in steps if len(batch) <= 1 else [each for each in steps if each not in batch]:
            self._run_alone(step)

    @staticmethod
    def _run_alone(step: Step[SharedSession]) -> None:
        try:
            step.row = step.member.inner.decode(step.token_id).numpy()[-1]
        except Exception as error:
            step.fail(error)


class SharedSession:
    """A session whose calls take turns with those of the others.

    Attributes:
        inner: The session that holds its cache now: one of its own, or a row of the pool.
        max_length: The most tokens that it may hold.
    """

    def __init__(self, shared: SharedModel, inner: Session, *, max_length: int) -> None:
        self.inner = inner
        self.max_length = max_length
        self._shared = shared
        self._state: Literal["open", "interrupted", "closed"] = "open"

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self.inner.length

    @property
    def floor(self) -> int:
        """The smallest length that `truncate` can reach now."""
        return self.inner.floor

    @property
    def can_extend(self) -> bool:
        """Whether `prefill` may be called on a cache that is not empty."""
        return self.inner.can_extend

    def prefill(self, token_ids: Sequence[int], *, needs_logits: bool = True) -> Logits:
        """Append one or more tokens, in parts while others are generating."""
        self._check_open()
        rest = list(token_ids)
        # The first call of a session in the long rotary regime cannot be run in parts.
        first = self._shared.info.first_call(self.max_length) if self.inner.length == 0 else 1
        while True:
            wanted, is_part = self._shared.part_of(len(rest))
            size = min(max(wanted, first), len(rest))
            part, rest, first = rest[:size], rest[size:], 1
            call = partial(
                self._prefill, part, needs_logits=needs_logits and not rest, is_part=is_part
            )
            logits = self._shared.turns.alone(self, call)
            if not rest:
                return logits

    def decode(self, token_id: int) -> Logits:
        """Append one token, in a step with others where there are any."""
        self._check_open()
        row = self._shared.turns.step(self, token_id)
        self._check_open()
        return HostLogits(row[None])

    def verify(self, token_ids: Sequence[int]) -> Logits:
        """Append tokens and return the logits of every one of them."""
        self._check_open()
        return self._shared.turns.alone(self, lambda: self.inner.verify(token_ids))

    def truncate(self, length: int) -> None:
        """Forget every token from ``length`` on."""
        self._check_open()
        self._shared.turns.alone(self, lambda: self.inner.truncate(length))

    def export_kv(self) -> KVCache:
        """A copy of the cache, on the host."""
        self._check_open()
        return self._shared.turns.alone(self, self._export)

    def import_kv(self, cache: KVCache) -> None:
        """Take over a cache; the session must be empty."""
        self._check_open()
        self._shared.turns.alone(self, lambda: self.inner.import_kv(cache))

    def interrupt(self) -> None:
        """End the call that is running, from any thread; a shared step ends by itself."""
        if self._state == "open":
            self._state = "interrupted"
            self._shared.turns.interrupt(self, self._interrupt)

    def pause(self) -> None:
        """No call comes for a while: steps need not wait for one."""
        self._shared.turns.pause(self)

    def close(self) -> None:
        """Free the cache. Calling it again does nothing."""
        if self._state != "closed":
            self._state = "closed"
            self._shared.turns.leave(self, self._close)

    def _export(self) -> KVCache:
        # Which session holds the cache is known only when its turn comes.
        return self.inner.export_kv()

    def _interrupt(self) -> None:
        if self._shared.capabilities.interrupt:
            self.inner.interrupt()

    def _close(self) -> None:
        self._shared.rows.forget(self)
        self.inner.close()
        if self._shared.is_closed:
            self._shared.rows.close_if_empty()

    def _prefill(self, token_ids: Sequence[int], *, needs_logits: bool, is_part: bool) -> Logits:
        started = time.perf_counter()
        logits = self.inner.prefill(token_ids, needs_logits=needs_logits)
        if is_part:
            self._shared.parts.took(len(token_ids), time.perf_counter() - started)
        return logits

    def _check_open(self) -> None:
        if self._state != "open":
            raise SessionClosedError(f"The session is {self._state}; start a new one.")


def _copy_of(error: Exception) -> Exception:
    """An error for another thread to raise: one that is raised twice has one traceback for both."""
    try:
        other = copy.copy(error)
    except Exception:  # its class wants other arguments than it keeps
        other = BackendRuntimeError(str(error))
    other.__cause__ = error
    return other
