"""The tokens of one request on their way through the model: sessions, prefill and decode.

A request outlives its sessions. A new one is opened where the cache of the last cannot be
carried on: past the length that it was made for, past LongRoPE's boundary, or because the
model failed and another takes over. Everything so far is then the prompt of the new one.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import numpy as np

from phirt.errors import (
    ContextLengthError,
    NonFiniteLogitsError,
    PhirtError,
    SessionClosedError,
    UnsupportedParameterError,
)
from phirt.generation.failover import Failover, Recover
from phirt.generation.history import TokenHistory
from phirt.generation.prefix import OpenSession, PrefixCache
from phirt.generation.speculation import Speculation
from phirt.generation.timings import Stopwatch
from phirt.protocols import LoadedModel, Logits
from phirt.types import FloatArray

__all__ = ["PREFILL_CHUNK", "SMALLEST_CHUNK", "Forward", "split_prompt"]

PREFILL_CHUNK = 512
"""Most tokens of a prompt that one call of the model takes.

It bounds the workspace of attention and the time until an interruption is seen.
"""

SMALLEST_CHUNK = 3
"""Any prompt splits into parts of at most this many without leaving a part of one."""

_logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class Forward:
    """Gives the logits of a request's next position, again and again.

    It is driven by one thread at a time; only `cancel` may be called from another.

    Args:
        model: The loaded model.
        history: The request's tokens; what is appended to it is run by the next call.
        watch: Told when the prompt's prefill starts and stops.
        prefill_chunk: Most prompt tokens per call of the model, at least `SMALLEST_CHUNK`.
        recover: Asked for another model where this one fails; None to let it fail.
        prefixes: Where sessions are taken from and given back to; None to make and close them.
    """

    def __init__(
        self,
        model: LoadedModel,
        history: TokenHistory,
        watch: Stopwatch,
        *,
        prefill_chunk: int,
        recover: Recover | None = None,
        prefixes: PrefixCache | None = None,
    ) -> None:
        self._model = model
        self._history = history
        self._watch = watch
        self._prefill_chunk = prefill_chunk
        self._recover = recover
        self._prefixes = prefixes
        self._speculation: Speculation | None = None
        self._drafted = self._accepted = 0
        self._vocab_size = model.info.vocab_size
        # One attribute, so that cancel() never sees the session of one model with another.
        self._open: OpenSession | None = None
        self._cached_tokens = 0
        self._cancelled = threading.Event()
        # Held for moments, so that an interruption meets a call, and no session between two.
        self._call_lock = threading.Lock()
        self._in_call = False
        self._is_usable = True
        self._failovers: list[Failover] = []

    @property
    def context_length(self) -> int:
        """Most tokens that the model which runs the request now may hold."""
        return self._model.info.context_length

    @property
    def vocab_size(self) -> int:
        """Number of logits: that of the model which the request began on."""
        return self._vocab_size

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt whose keys and values another request had computed."""
        return self._cached_tokens

    @property
    def drafted_tokens(self) -> int:
        """Tokens that were guessed, and judged by the model."""
        return self._drafted + (self._speculation.drafted_tokens if self._speculation else 0)

    @property
    def accepted_tokens(self) -> int:
        """Those of them that were chosen."""
        return self._accepted + (self._speculation.accepted_tokens if self._speculation else 0)

    @property
    def failovers(self) -> tuple[Failover, ...]:
        """The changes of model so far."""
        return tuple(self._failovers)

    def is_cancelled(self) -> bool:
        """Whether `cancel` was called, perhaps a moment ago and in another thread."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """End the call that is running, where the runtime can. Callable from any thread."""
        self._cancelled.set()
        with self._call_lock:
            opened = self._open
            if self._in_call and opened is not None and opened.model.capabilities.interrupt:
                self._is_usable = False
                opened.session.interrupt()

    def check_speculation(self) -> None:
        """Check that the model can judge guesses.

        Raises:
            UnsupportedParameterError: It cannot.
        """
        reason = _why_no_guesses(self._model)
        if reason is not None:
            raise UnsupportedParameterError(
                f"Guessed tokens cannot be judged by this model: {reason}. Leave out "
                "prompt_lookup_num_tokens and assistant_model, or load it with another backend."
            )

    def speculate(self, speculation: Speculation | None) -> None:
        """Guess what comes next from now on, or guess no more."""
        self._drop_guess()
        self._drafted, self._accepted = self.drafted_tokens, self.accepted_tokens
        self._speculation = speculation

    def close(self) -> None:
        """Free the session, or leave it to later requests. Calling it again does nothing."""
        try:
            self._drop_guess()
        except PhirtError as error:
            _logger.info("A session could not be rolled back: %s", error)
            self._is_usable = False
        opened, self._open = self._open, None
        if opened is None:
            return
        if self._prefixes is None or not self._is_usable:
            opened.session.close()
            return
        self._prefixes.give(opened, self._history.token_ids[: opened.session.length])

    def logits(self, *, max_new_tokens: int | None) -> FloatArray:
        """Logits of the position after the history, shape (vocab,), the caller's to write to.

        Args:
            max_new_tokens: Most tokens that the request may generate in all, or None.

        Raises:
            SessionClosedError: The request was cancelled, or the model closed.
            NonFiniteLogitsError: The model computed NaN or infinity, and nothing takes over.
                Without ``recover`` it is left to whoever chooses a token.
            Exception: Whatever the backend raised, where nothing takes over.
        """
        if self._recover is None:
            return self._next(max_new_tokens)
        failures: list[Exception] = []
        try:
            while True:
                try:
                    return _finite(self._next(max_new_tokens))
                except Exception as error:
                    failures.append(error)
                    if not self._take_over(self._recover, failures, max_new_tokens):
                        if self.is_cancelled():
                            raise
                        # What came first is what is wrong; the rest is in its notes.
                        raise failures[0]  # noqa: B904 - its own cause stands
        finally:
            failures.clear()  # Their tracebacks refer to this frame.

    def _drop_guess(self) -> None:
        """Take what was guessed and not chosen out of the session."""
        opened, speculation = self._open, self._speculation
        if opened is None or speculation is None:
            return
        held = opened.session.length
        valid = speculation.drop(self._history, held)
        if valid < held and self._is_usable:
            opened.session.truncate(valid)

    def _next(self, max_new_tokens: int | None) -> FloatArray:
        opened = self._open
        length = len(self._history)
        if self._speculation is not None and opened is not None:
            ahead = self._speculation.pending(self._history)
            if ahead is not None:
                return ahead[: self._vocab_size]
            self._drop_guess()
        if opened is None or length > opened.limit:
            self.close()
            logits = self._prefill(length, max_new_tokens)
        elif self._speculation is None:
            logits = self._call(opened.session.decode, self._history.last_id)
        else:
            return self._speculate(self._speculation, opened, max_new_tokens)
        row: FloatArray = logits.numpy()[-1]
        # Another backend's copy may be padded to a larger vocabulary.
        return row[: self._vocab_size]

    def _speculate(
        self, speculation: Speculation, opened: OpenSession, max_new_tokens: int | None
    ) -> FloatArray:
        """Run the last token, and a guess of those after it where one is worth it."""
        history, length = self._history, len(self._history)
        started = time.perf_counter()
        draft = None
        if _why_no_guesses(opened.model) is None:
            room = opened.limit - length
            if max_new_tokens is not None:
                # The token after the guess is one of them.
                room = min(room, max_new_tokens - history.output_length - 1)
            draft = speculation.draft(history, room=room)
        if draft is None:
            row: FloatArray = self._call(opened.session.decode, history.last_id).numpy()[-1]
            speculation.decoded(time.perf_counter() - started)
            return row[: self._vocab_size]
        logits = self._call(opened.session.verify, [history.last_id, *draft.token_ids])
        rows = logits.numpy()
        seconds = time.perf_counter() - started
        speculation.verified(draft, rows, start=length, seconds=seconds)
        return rows[0, : self._vocab_size]

    def _prefill(self, length: int, max_new_tokens: int | None) -> Logits:
        info, prompt_length = self._model.info, self._history.prompt_length
        limit = info.context_length if max_new_tokens is None else prompt_length + max_new_tokens
        boundary = info.rope_boundary
        if boundary is not None and length <= boundary < limit:
            # The short rotary factors until there; the next token is another session's.
            limit = boundary
        opened = self._take_prefix(limit, length)
        start = 0 if opened is None else opened.session.length
        if opened is None:
            room = limit if max_new_tokens is not None else min(limit, length + PREFILL_CHUNK)
            longest = limit if self._prefixes is None else self._longest(limit)
            session = self._model.new_session(max_length=longest, expected_length=room)
            opened = OpenSession(session, self._model, longest)
        self._open, self._is_usable = opened, True
        first = length == prompt_length
        if first:
            self._cached_tokens = start
            self._watch.prefill_started()
        ids = self._history.token_ids[start:].tolist()
        logits: Logits | None = None
        chunk = self._prefill_chunk if opened.session.can_extend else length
        first_call = 1 if start else info.first_call(opened.limit)
        for size in split_prompt(length - start, chunk, first=first_call):
            is_last = size == len(ids)
            prefill = partial(opened.session.prefill, needs_logits=is_last)
            logits = self._call(prefill, ids[:size])
            del ids[:size]
        if first:
            self._watch.prefill_stopped()
        assert logits is not None  # noqa: S101 - a prompt has at least one chunk
        return logits

    def _take_prefix(self, limit: int, length: int) -> OpenSession | None:
        """A session that holds a prefix of the history, if one was kept."""
        if self._prefixes is None:
            return None
        ids = self._history.token_ids[:length]
        return self._prefixes.take(self._model, ids, limit=self._longest(limit))

    def _longest(self, limit: int) -> int:
        """Most tokens that a session may hold in the rotary regime of one for ``limit`` tokens.

        A session takes memory as it is used. One that may become longer than its request
        needs it serves the next one, too.
        """
        info = self._model.info
        boundary = info.rope_boundary
        return boundary if boundary is not None and limit <= boundary else info.context_length

    def _call(self, method: Callable[[_T], Logits], argument: _T) -> Logits:
        """Run a session's method, so that `cancel` can end it.

        Raises:
            SessionClosedError: The request was cancelled before.
        """
        with self._call_lock:
            if self.is_cancelled():
                raise SessionClosedError("The generation was cancelled.")
            self._in_call = True
        completed = False
        try:
            logits = method(argument)
            completed = True
        finally:
            with self._call_lock:
                self._in_call = False
                self._is_usable = self._is_usable and completed
        return logits

    def _take_over(
        self, recover: Recover, failures: list[Exception], max_new_tokens: int | None
    ) -> bool:
        """Go on with another model, if there is one; else note on the first failure why not."""
        original, error = failures[0], failures[-1]
        self._is_usable = False
        # Nothing of the cache is taken along. A session that failed answers nothing but close()
        # (`phirt.protocols.Session`), and what a broken device would give for its keys and
        # values is not to be believed: the tokens are, and one prefill makes the cache again.
        try:
            self.close()
        except Exception as second:
            _logger.info("Closing what had failed raised %s: %s", type(second).__name__, second)
        if self.is_cancelled() or isinstance(error, ContextLengthError):
            return False
        tokens = self._history.output_length
        takeover = recover(self._model, error, tokens=tokens)
        if error is not original:
            last = self._failovers[-1]
            place = f"{last.next_backend} on {last.next_device}"
            original.add_note(f"Then {place} failed: {type(error).__name__}: {error}")
            for note in getattr(error, "__notes__", ()):
                original.add_note(note)
        if takeover is None:
            return False
        self._failovers.append(takeover.failover)
        lack = self._lack(takeover.model, max_new_tokens)
        if lack is not None:
            original.add_note(
                f"{takeover.failover.next_backend} on {takeover.failover.next_device} took over, "
                f"and cannot go on with this request: {lack}."
            )
            return False
        self._model = takeover.model
        return True

    def _lack(self, model: LoadedModel, max_new_tokens: int | None) -> str | None:
        """What a model lacks for the rest of the request, or None."""
        info, history = model.info, self._history
        if info.vocab_size < self._vocab_size:
            return f"its vocabulary has {info.vocab_size} tokens, not {self._vocab_size}"
        # Without a limit of its own, a request still needs room for one token.
        required = len(history) + 1
        if max_new_tokens is not None:
            required = history.prompt_length + max_new_tokens
        if info.context_length < required:
            return f"its context is {info.context_length} tokens, and {required} are asked for"
        return None


def _why_no_guesses(model: LoadedModel) -> str | None:
    """Why guesses cannot be judged by a model, or None where they can."""
    for name in ("verify", "truncate"):
        lack = model.capabilities.lacks.get(name)
        if lack is not None:
            return lack.reason
    if model.info.window is not None:
        return "its sliding window cannot go back once it has rolled on"
    return None


def _finite(logits: FloatArray) -> FloatArray:
    """Refuse what only a broken model computes; -inf beside finite logits forbids a token."""
    largest = logits[logits.argmax()]  # NaN and +inf win every comparison.
    if not np.isfinite(largest):
        raise NonFiniteLogitsError(
            f"The backend computed logits of which the largest is {largest}. Check the model's "
            "weights and precision, and the device's driver."
        )
    return logits


def split_prompt(length: int, chunk: int, *, first: int = 1) -> list[int]:
    """Sizes of the calls in which a prompt of ``length`` tokens is prefilled.

    The sizes are as equal as they can be. None of them is 1 unless the prompt is one
    token: runtimes take other kernels for one row, and a chunk of one would give other
    logits than the same token inside a longer chunk.

    Args:
        length: Tokens of the prompt, at least ``first``.
        chunk: Most tokens per call, at least `SMALLEST_CHUNK`.
        first: Fewest tokens of the first call, which may be more than ``chunk``.
    """
    count = -(-length // chunk)
    base, longer = divmod(length, count)
    sizes = [base + (index < longer) for index in range(count)]
    if sizes[0] >= first:
        return sizes
    rest = length - first
    return [length] if rest < 2 else [first, *split_prompt(rest, chunk)]
