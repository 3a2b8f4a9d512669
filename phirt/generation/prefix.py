"""KV caches that outlive their request: the next one goes on from the longest common prefix.

A chat's next turn repeats all turns before it, and many requests share a system prompt or
examples. What a session computed for them is right for as long as the tokens are the same, so
that sessions are kept when their requests end, bounded in bytes, and the one that was used
longest ago goes first.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np

from phirt.errors import PhirtError
from phirt.protocols import KVCache, LoadedModel, Session
from phirt.types import IntArray

__all__ = ["OpenSession", "PrefixCache"]

_logger = logging.getLogger(__name__)

_SHORTEST = 16
"""Fewest tokens that are worth taking a cache for: for less, another prompt would lose its own."""

_RUN_ANEW = 2
"""Tokens of a prompt that are run in any case: its logits are those of its last position, and
runtimes take another kernel for one token than for several."""

_WORTH_A_COPY = 64
"""Where taking a cache would throw away so many tokens of another prompt, it is copied."""

_BUCKET = 256
"""Tokens; sessions allocate their caches in multiples of about as many."""


@runtime_checkable
class Pausable(Protocol):
    """A session that others wait for while it is in use."""

    def pause(self) -> None:
        """No call comes for a while: nobody need wait for one."""


@dataclass(frozen=True, slots=True)
class OpenSession:
    """A session that is open, the model that it is of, and the most tokens that it may hold."""

    session: Session
    model: LoadedModel
    limit: int


@dataclass(frozen=True, slots=True)
class _Kept:
    """A session that waits for a prompt that begins as its tokens do."""

    opened: OpenSession
    token_ids: IntArray

    def common(self, token_ids: IntArray) -> int:
        """Length of the longest common prefix."""
        length = min(self.token_ids.size, token_ids.size)
        differ = np.flatnonzero(self.token_ids[:length] != token_ids[:length])
        return int(differ[0]) if differ.size else length


class PrefixCache:
    """Sessions of ended requests, for requests that begin with the same tokens.

    It may be used from many threads at once. A session is in one request's hands or here,
    never both.

    Args:
        capacity_bytes: Most bytes that the kept caches take together; 0 keeps nothing.
        bytes_per_token: Bytes that a token's keys and values take in all layers.
    """

    def __init__(self, *, capacity_bytes: int, bytes_per_token: int) -> None:
        self._capacity = capacity_bytes
        self._bytes_per_token = bytes_per_token
        self._kept: list[_Kept] = []  # the one that was used longest ago first
        # Reentrant: a garbage collection while it is held may end a stream, which gives here.
        self._lock = threading.RLock()
        self._closed = False
        self._only: LoadedModel | None = None
        self._process = os.getpid()

    @property
    def size_bytes(self) -> int:
        """Bytes that the kept caches take now."""
        with self._lock:
            return sum(self._bytes_of(kept.token_ids.size) for kept in self._kept)

    def refusal(self, length: int) -> str | None:
        """Why a cache of so many tokens would not be kept, or None."""
        if self._closed:
            return "the model is closed"
        if length < _SHORTEST:
            return f"of fewer than {_SHORTEST} tokens nothing is reused"
        size = self._bytes_of(length)
        if size > self._capacity:
            return f"it takes {size:,} bytes, and prefix_cache_bytes is {self._capacity:,}"
        return None

    def take(self, model: LoadedModel, token_ids: IntArray, *, limit: int) -> OpenSession | None:
        """A session of ``model`` that holds a prefix of the tokens, and nothing else.

        At least the last tokens are left to run. Where another request would lose much by
        it, the session is a copy.

        Args:
            model: What the request runs on.
            token_ids: The request's tokens, shape (n,).
            limit: Most tokens that the request's session may come to hold.

        Returns:
            The session, now the caller's, or None where nothing is worth taking.
        """
        if os.getpid() != self._process:
            return None  # of a fork: the sessions are the parent's, and the lock may be held
        with self._lock:
            found = self._longest(model, token_ids, limit)
            if found is None:
                return None
            kept, length = found
            self._kept.remove(kept)
        lost = kept.token_ids.size - length
        if lost >= _WORTH_A_COPY and model.capabilities.kv:
            copy = self._copy(kept, length, limit)
            self._keep(kept)
            return copy
        try:
            if lost:
                kept.opened.session.truncate(length)
        except PhirtError as error:
            _logger.info("A kept session could not be taken back: %s", error)
            _close(kept.opened.session)
            return None
        return kept.opened

    def give(self, opened: OpenSession, token_ids: IntArray) -> None:
        """Keep a session whose request has ended, or close it where it is not worth keeping.

        Args:
            opened: The session; nobody else uses it any more.
            token_ids: The tokens that it holds, shape (n,).
        """
        if os.getpid() != self._process or token_ids.size < _SHORTEST:
            _close(opened.session)
            return
        if isinstance(opened.session, Pausable):
            opened.session.pause()
        self._keep(_Kept(opened, token_ids.copy()))

    def forget(self, *, except_of: LoadedModel | None = None) -> None:
        """Close what is kept, and from now on keep the sessions of one model only.

        Args:
            except_of: That model, whose sessions stay; None forgets all, and keeps any later.
        """
        with self._lock:
            self._only = except_of
            gone = [kept for kept in self._kept if kept.opened.model is not except_of]
            self._kept = [kept for kept in self._kept if kept.opened.model is except_of]
        for kept in gone:
            _close(kept.opened.session)

    def close(self) -> None:
        """Close what is kept, and keep nothing from now on. Calling it again does nothing."""
        self._closed = True
        if os.getpid() == self._process:
            self.forget()

    def _longest(
        self, model: LoadedModel, token_ids: IntArray, limit: int
    ) -> tuple[_Kept, int] | None:
        """What shares most with the tokens, and how much of it can be used."""
        best: tuple[_Kept, int] | None = None
        regime = model.info.regime(limit)
        for kept in self._kept:
            opened = kept.opened
            if opened.model is not model or opened.limit < limit:
                continue
            length = min(kept.common(token_ids), token_ids.size - _RUN_ANEW)
            if length < max(_SHORTEST, opened.session.floor) or (best and length < best[1]):
                continue
            if model.info.regime(opened.limit) != regime or not opened.session.can_extend:
                continue
            if length < kept.token_ids.size and not model.capabilities.truncate:
                continue
            # Of equals the last one, which was used last.
            best = kept, length
        return best

    def _copy(self, kept: _Kept, length: int, limit: int) -> OpenSession | None:
        """A session of its own for the first ``length`` tokens of a kept one."""
        model = kept.opened.model
        try:
            cache = _first(kept.opened.session.export_kv(), length)
            session = model.new_session(max_length=limit, expected_length=length + _BUCKET)
        except PhirtError as error:
            _logger.info("A kept session could not be copied: %s", error)
            return None
        try:
            session.import_kv(cache)
        except (PhirtError, ValueError) as error:
            _logger.info("A kept session could not be copied: %s", error)
            _close(session)
            return None
        return OpenSession(session, model, limit)

    def _keep(self, new: _Kept) -> None:
        gone: list[_Kept] = []
        with self._lock:
            is_other = self._only is not None and new.opened.model is not self._only
            if self._closed or is_other or self._bytes_of(new.token_ids.size) > self._capacity:
                gone.append(new)
            else:
                for kept in self._kept:
                    # The longer of two that say the same serves for both.
                    same = kept.opened.model is new.opened.model
                    if same and kept.common(new.token_ids) == kept.token_ids.size:
                        gone.append(kept)
                self._kept = [kept for kept in self._kept if kept not in gone] + [new]
                while self.size_bytes > self._capacity:
                    gone.append(self._kept.pop(0))
        for kept in gone:
            _close(kept.opened.session)

    def _bytes_of(self, length: int) -> int:
        return -(-length // _BUCKET) * _BUCKET * self._bytes_per_token


def _first(cache: KVCache, length: int) -> KVCache:
    """The first tokens of a cache; ``length`` is not below any layer's start."""
    cut = tuple(
        replace(
            layer,
            key=layer.key[:, : length - layer.start],
            value=layer.value[:, : length - layer.start],
        )
        for layer in cache.layers
    )
    return replace(cache, layers=cut, length=length)


def _close(session: Session) -> None:
    """Let go of a session; one that a broken runtime will not free is no reason to fail."""
    try:
        session.close()
    except Exception as error:
        _logger.info("A kept session did not close: %s", error)
