"""One sequence of onnxruntime-genai: a generator that appends tokens and gives logits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phirt.backends.base import BaseModel, BaseSession, HostLogits
from phirt.backends.native_errors import first_line
from phirt.errors import BackendRuntimeError, OutOfMemoryError
from phirt.protocols import Logits
from phirt.types import FloatArray

__all__ = ["BUCKET", "CHUNK", "GenaiSession", "Generators", "translate"]

BUCKET = 256
"""Tokens; the KV cache is allocated in multiples of it."""

CHUNK = 256
"""Tokens of one call on the CPU; 128 to 1,500 take the same processor time there."""

_OUT_OF_MEMORY = re.compile(
    r"bad.?alloc|(failed to|could not) allocate|(not enough|out of) memory|8007000E", re.IGNORECASE
)


def translate(error: Exception, doing: str) -> BackendRuntimeError | OutOfMemoryError:
    """Say in phirt's words what the runtime raised; the caller chains the original.

    Args:
        error: What it raised.
        doing: What was being done, to follow "while".
    """
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
        return OutOfMemoryError(
            f"Out of memory while {doing}: {first_line(error)}. Ask for fewer tokens, "
            "or load the model in a smaller precision."
        )
    return BackendRuntimeError(f"onnxruntime-genai failed while {doing}: {first_line(error)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Generators:
    """Makes the generators of one model, and knows how they may be used.

    Attributes:
        og: The module.
        model: The ``og.Model``.
        logits_name: Name of the graph's output.
        append_once: Tokens can be appended to an empty cache only.
        tokens_per_run: Most tokens of one call, or None. genai's binding holds the interpreter's
            lock during a call; other threads, and an interruption, get their turn between two.
        last_token: The token behind which genai chooses no other.
        least_capacity: Positions that the cache must have room for at least.
    """

    og: Any
    model: Any
    logits_name: str
    append_once: bool
    tokens_per_run: int | None
    last_token: int
    least_capacity: int

    def new(self, max_length: int) -> Any:
        """A generator with a KV cache for ``max_length`` tokens, and every choice neutral."""
        parameters = self.og.GeneratorParams(self.model)
        parameters.set_search_options(
            max_length=max(max_length, self.least_capacity),
            min_length=0,
            batch_size=1,
            num_beams=1,
            do_sample=False,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
        )
        return self.og.Generator(self.model, parameters)


class GenaiSession(BaseSession):
    """A generator, replaced by a larger one where the sequence outgrows it.

    genai allocates the KV cache when a generator is made, and cannot grow it. So a longer
    sequence takes a new generator of twice the size and one prefill of all its tokens.
    """

    def __init__(
        self, model: BaseModel, generators: Generators, *, max_length: int, expected_length: int
    ) -> None:
        super().__init__(model, max_length=max_length)
        self._generators = generators
        self._append_once = generators.append_once
        self._generator: Any = None
        self._capacity = 0
        self._interrupted = False
        self._only = np.zeros((1, model.info.vocab_size if self._append_once else 0), np.float32)
        try:
            self._allocate(min(expected_length, max_length))
        except BaseException:
            self.close()
            raise

    @property
    def can_extend(self) -> bool:
        """Whether `prefill` may be called on a cache that is not empty."""
        return not self._append_once or self._length == 0

    def _append(self, token_ids: Sequence[int], *, every_position: bool) -> Logits:
        lack = self._base_model.capabilities.lacks.get("verify")
        if every_position and lack is not None and lack.kind == "never":
            raise NotImplementedError("declared without the capability 'verify'")
        tokens = np.array(token_ids, np.int32)
        total = self._length + len(tokens)
        wanted = len(tokens) if every_position else 1
        try:
            if self._can_choose(tokens):
                return HostLogits(self._choose(int(tokens[0])))
            if total > self._capacity or not self.can_extend:
                tokens = np.concatenate([self._held(), tokens])
                self._allocate(total)
            return HostLogits(self._feed(tokens, wanted, every_position=every_position))
        except Exception as error:
            raise translate(error, f"running {len(tokens)} tokens") from error

    def _feed(self, tokens: NDArray[np.int32], wanted: int, *, every_position: bool) -> FloatArray:
        """Append tokens, and give the logits of the last ``wanted`` of them."""
        rows: list[FloatArray] = []
        for chunk in self._chunks(tokens):
            self._generator.append_tokens(chunk)
            self._check_interrupted()
            if every_position:
                rows.append(self._generator.get_output(self._generators.logits_name)[0])
        if every_position:
            return np.concatenate(rows, dtype=np.float32)[-wanted:]
        return self._last()

    def _chunks(self, tokens: NDArray[np.int32]) -> list[NDArray[np.int32]]:
        """The tokens of each call to genai."""
        limit = self._generators.tokens_per_run
        if limit is None or self._append_once:
            return [tokens]
        empty = self._generator.token_count() == 0
        # LongRoPE: a shorter first call would take the short rotary factors.
        longest = (self._info.rope_boundary or 0) + 1 if empty and self._regime == "long" else 0
        first = max(limit, longest)
        return [tokens[:first], *(tokens[i : i + limit] for i in range(first, len(tokens), limit))]

    def _can_choose(self, tokens: NDArray[np.int32]) -> bool:
        """Whether genai can be made to choose the token, instead of being given it."""
        return (
            self._append_once
            and 0 < self._length < self._capacity
            and len(tokens) == 1
            and int(tokens[0]) != self._generators.last_token  # genai would not go on behind it
        )

    def _choose(self, token: int) -> FloatArray:
        """Append a token by leaving genai no other choice."""
        self._only[0, token] = 1
        self._generator.set_logits(self._only)
        self._only[0, token] = 0
        self._generator.generate_next_token()
        logits = self._last()
        self._check_interrupted()
        return logits

    def _check_interrupted(self) -> None:
        if self._interrupted:
            raise InterruptedError("the session was interrupted during a call of genai")

    def _last(self) -> FloatArray:
        logits: FloatArray = self._generator.get_logits()[0]
        return logits

    def _held(self) -> NDArray[np.int32]:
        """The tokens in the cache."""
        tokens: NDArray[np.int32] = self._generator.get_sequence(0)[: self._length]
        return tokens

    def _allocate(self, length: int) -> None:
        """Replace the generator by an empty one with room for ``length`` tokens."""
        wanted = max(length, 2 * self._capacity)
        capacity = min(-(-wanted // BUCKET) * BUCKET, self._max_length)
        self._generator = None  # Both caches together may not fit.
        try:
            self._generator = self._generators.new(capacity)
        except Exception as error:
            raise translate(error, f"allocating a KV cache for {capacity} tokens") from error
        self._capacity = capacity

    def _truncate(self, length: int) -> None:
        try:
            if not self._append_once or length == 0:
                self._generator.rewind_to(length)
            elif length < self._length:
                # genai wants the logits of the last token before it chooses the next one, and
                # computes them for a token that it still finds behind the rewound length.
                self._generator.rewind_to(length - 1)
                self._generator.get_logits()
        except Exception as error:
            raise translate(error, f"going back to {length} tokens") from error

    def _interrupt(self) -> None:
        # genai's own "terminate_session" would come as late: it waits for the same lock.
        self._interrupted = True

    def _free(self) -> None:
        self._generator = None
        del self._generators  # which holds the weights
