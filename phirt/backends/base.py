"""What adapters share, so that each of them holds only what its runtime needs.

`BaseModel` and `BaseSession` keep the promises of the protocols that do not depend on the
runtime (states, lengths, threads, process and interruption checks), and leave an adapter
the steps themselves.
"""

from __future__ import annotations

import abc
import threading
import weakref
from collections.abc import Sequence
from typing import Literal, TypeAlias

from phirt.backends.at_exit import is_exiting
from phirt.backends.execution import Execution
from phirt.backends.process import ProcessGuard
from phirt.errors import (
    BackendRuntimeError,
    ContextLengthError,
    SessionClosedError,
)
from phirt.generation.host_logits import HostLogits
from phirt.protocols import (
    Capabilities,
    KVCache,
    KVLayer,
    KVPool,
    Logits,
    ModelInfo,
    Placement,
    Session,
)

__all__ = ["BaseModel", "BaseSession", "HostLogits", "Positions"]

Positions: TypeAlias = Literal["none", "last", "every"]
"""Of which tokens of a call the logits are asked for."""


class BaseModel(abc.ABC):
    """The part of `phirt.protocols.LoadedModel` that is the same on every runtime.

    An adapter loads its weights in ``__init__`` and implements ``_new_session``,
    ``placement`` and ``_unload``, and ``_new_pool`` where it declares "batch".

    Args:
        info: What the loop must know about the weights.
        capabilities: What the sessions can do.
        execution: How calls run; the weights were loaded through it.
        native: The runtime's object that owns its threads, see `ProcessGuard`.
    """

    def __init__(
        self,
        *,
        info: ModelInfo,
        capabilities: Capabilities,
        execution: Execution,
        native: object = None,
    ) -> None:
        self.info = info
        self.capabilities = capabilities
        self.execution = execution
        self.guard = ProcessGuard(native)
        # Reentrant: a garbage collection while it is held may close a session of this model.
        self._lock = threading.RLock()
        self._open_sessions: weakref.WeakSet[BaseSession] = weakref.WeakSet()
        self._closed = False
        self._unloaded = False

    @property
    def concurrency(self) -> Literal["parallel", "serial", "owner"]:
        """How sessions may run at once."""
        return self.execution.concurrency

    def new_session(self, *, max_length: int, expected_length: int) -> Session:
        """Start a sequence with room for ``expected_length`` tokens."""
        self._check_open()

        def open_session() -> BaseSession:
            self._check_open()  # again: another thread may have closed the model meanwhile
            return self._new_session(max_length=max_length, expected_length=expected_length)

        return self.execution.run(open_session)

    def new_pool(self, *, slots: int, capacity: int, expected_length: int) -> KVPool:
        """Make a pool of ``slots`` rows."""
        self._check_open()

        def open_pool() -> KVPool:
            self._check_open()  # as above
            return self._new_pool(slots=slots, capacity=capacity, expected_length=expected_length)

        return self.execution.run(open_pool)

    @abc.abstractmethod
    def placement(self) -> Placement:
        """Where the graph really runs, as the runtime tells."""

    def close(self) -> None:
        """Free the weights once the last session has ended. Calling it again does nothing."""
        self._closed = True
        # In a forked child, a lock may be held by a thread that is not there.
        if self.guard.is_of_this_process:
            self._unload_if_done()

    def session_opened(self, session: BaseSession) -> None:
        """A session begins to need the weights; from now on they stay."""
        with self._lock:
            if self._closed:
                raise SessionClosedError("The model is closed; load it again.")
            self._open_sessions.add(session)

    def session_closed(self, session: BaseSession) -> None:
        """A session needs the weights no longer."""
        with self._lock:
            self._open_sessions.discard(session)
        if self._closed:
            self._unload_if_done()

    def _unload_if_done(self) -> None:
        with self._lock:
            # In this order: looking at the sessions may collect garbage, and end up here.
            if self._open_sessions or self._unloaded:
                return
            self._unloaded = True
        if not is_exiting():
            self.execution.run(self._unload)
        self.execution.close()

    def _check_open(self) -> None:
        if self._closed:
            raise SessionClosedError("The model is closed; load it again.")
        self.guard.check()

    @abc.abstractmethod
    def _new_session(self, *, max_length: int, expected_length: int) -> BaseSession:
        """Start a sequence; raise only phirt's errors."""

    def _new_pool(self, *, slots: int, capacity: int, expected_length: int) -> KVPool:
        raise NotImplementedError("declared without the capability 'batch'")

    @abc.abstractmethod
    def _unload(self) -> None:
        """Let go of the weights."""


class BaseSession(abc.ABC):
    """The part of `phirt.protocols.Session` that is the same on every runtime.

    An adapter implements ``_append`` and ``_free``, and whichever of ``_truncate``,
    ``_interrupt``, ``_export_kv`` and ``_import_kv`` its capabilities declare. All but
    ``_interrupt`` run as the model's `Execution` says. Lengths are kept here: ``_append``
    sees ``self._length`` as it was before the call.

    Args:
        model: The model that it is of.
        max_length: The most tokens that it may hold; fixes the rotary regime.
    """

    def __init__(self, model: BaseModel, *, max_length: int) -> None:
        self._base_model = model
        self._info = model.info
        self._execution = model.execution
        self._max_length = max_length
        self._regime = model.info.regime(max_length)
        self._length = 0
        self._state: Literal["open", "failed", "interrupted", "closed"] = "open"
        # An interruption from another thread must not meet a session that is being closed.
        self._state_lock = threading.RLock()
        model.session_opened(self)

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._length

    @property
    def floor(self) -> int:
        """The smallest length that `truncate` can reach now."""
        return self._regime_floor()

    @property
    def can_extend(self) -> bool:
        """Whether `prefill` may be called on a cache that is not empty."""
        return True

    def prefill(self, token_ids: Sequence[int], *, needs_logits: bool = True) -> Logits:
        """Append one or more tokens and return the logits of the last, shape (1, vocab)."""
        return self._run(token_ids, which="last" if needs_logits else "none")

    def decode(self, token_id: int) -> Logits:
        """Append one token and return its logits, shape (1, vocab)."""
        return self._run((token_id,), which="last")

    def verify(self, token_ids: Sequence[int]) -> Logits:
        """Append n tokens and return the logits of each, shape (n, vocab)."""
        return self._run(token_ids, which="every")

    def truncate(self, length: int) -> None:
        """Forget every token from ``length`` on."""
        self._check_open()
        if not self.floor <= length <= self._length:
            raise ValueError(
                f"Cannot truncate to {length} tokens: the session holds {self._length} "
                f"and can go back to {self.floor}."
            )
        try:
            self._execution.run(self._truncate, length)
        except BaseException:
            self._state = "failed"
            raise
        self._length = length

    def export_kv(self) -> KVCache:
        """A copy of the cache, on the host."""
        self._check_open()
        layers = self._execution.run(self._export_kv) if self._length else ()
        return KVCache(tuple(layers), self._length, self._info.weights_id, self._regime)

    def import_kv(self, cache: KVCache) -> None:
        """Take over a cache; the session must be empty."""
        self._check_open()
        self._check_cache(cache)
        if cache.length == 0:
            return
        try:
            self._execution.run(self._import_kv, cache)
        except ValueError:
            raise  # of another shape: found before anything was written
        except BaseException:
            self._state = "failed"
            raise
        self._length = cache.length

    def interrupt(self) -> None:
        """End the call that is running, if any. Callable from any thread."""
        if not self._base_model.guard.is_of_this_process:
            return
        with self._state_lock:
            if self._state == "open":
                self._state = "interrupted"
                self._interrupt()

    def close(self) -> None:
        """Free the cache. Calling it again does nothing."""
        model = self._base_model
        if not model.guard.is_of_this_process:
            # Nothing of the parent's may be touched, and its locks may be held for ever.
            self._state = "closed"
            return
        with self._state_lock:
            if self._state == "closed":
                return
            self._state = "closed"
        try:
            if not is_exiting():
                self._execution.run(self._free)
        finally:
            model.session_closed(self)

    def _run(self, token_ids: Sequence[int], *, which: Positions) -> Logits:
        self._check_open()
        count = len(token_ids)
        if count == 0:
            raise ValueError("A session was given no tokens; give it at least one.")
        if self._length + count > self._max_length:
            raise ContextLengthError(
                f"The session holds {self._length} tokens and was given {count} more; "
                f"it was made for {self._max_length}.",
                required=self._length + count,
                available=self._max_length,
            )
        if self._length == 0 and count < self._info.first_call(self._max_length):
            raise ValueError(
                f"A session made for more than {self._info.rope_boundary} tokens uses the long "
                f"rotary factors, so its first call must append more than that, not {count}."
            )
        vocab = self._info.vocab_size
        if not all(0 <= token < vocab for token in token_ids):
            raise ValueError(f"Token ids must be from 0 to {vocab - 1:,}.")
        try:
            logits = self._execution.run(self._append_tokens, token_ids, which)
        except BaseException as error:
            # The cache may be half written: only close() makes sense from here on.
            if self._state == "interrupted" and isinstance(error, BackendRuntimeError):
                raise SessionClosedError("The session was interrupted.") from error
            self._state = "failed"
            raise
        self._length += count
        return logits

    def _check_open(self) -> None:
        if self._state != "open":
            raise SessionClosedError(f"The session is {self._state}; start a new one.")
        self._base_model.guard.check()

    def _check_cache(self, cache: KVCache) -> None:
        if self._length:
            raise ValueError(
                f"A cache can be taken over by an empty session only; this one holds "
                f"{self._length} tokens."
            )
        if (cache.weights_id, cache.regime) != (self._info.weights_id, self._regime):
            raise ValueError(
                f"The cache is of the weights {cache.weights_id!r} with rotary regime "
                f"{cache.regime!r}; this session needs {self._info.weights_id!r} and "
                f"{self._regime!r}. Prefill the tokens instead."
            )
        if cache.length > self._max_length:
            raise ContextLengthError(
                f"The cache holds {cache.length} tokens; the session was made for "
                f"{self._max_length}.",
                required=cache.length,
                available=self._max_length,
            )

    def _regime_floor(self) -> int:
        """Below this the runtime would go on with the short rotary factors."""
        return (self._info.rope_boundary or 0) if self._regime == "long" and self._length else 0

    def _append_tokens(self, token_ids: Sequence[int], which: Positions) -> Logits:
        if which == "none":
            return self._append_only(token_ids)
        return self._append(token_ids, every_position=which == "every")

    @abc.abstractmethod
    def _append(self, token_ids: Sequence[int], *, every_position: bool) -> Logits:
        """Run the tokens on the cache; raise only phirt's errors."""

    def _append_only(self, token_ids: Sequence[int]) -> Logits:
        """Run tokens whose logits nobody reads; to be replaced where that saves something."""
        return self._append(token_ids, every_position=False)

    @abc.abstractmethod
    def _free(self) -> None:
        """Let go of the cache."""

    def _truncate(self, length: int) -> None:
        raise NotImplementedError("declared without the capability 'truncate'")

    def _export_kv(self) -> Sequence[KVLayer]:
        raise NotImplementedError("declared without the capability 'kv'")

    def _import_kv(self, cache: KVCache) -> None:
        """Write the cache; raise `ValueError` for a wrong shape before writing anything."""
        raise NotImplementedError("declared without the capability 'kv'")

    def _interrupt(self) -> None:
        raise NotImplementedError("declared without the capability 'interrupt'")
