"""The tokens of one request, prompt and output, and what penalties need to know of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from phirt.types import IntArray

__all__ = ["TokenHistory"]


class TokenHistory:
    """Append-only record of a request's token ids.

    Appending costs a write. The unique ids and counts are brought up to date when they
    are asked for, from the tokens appended since: once O(prompt), then O(1) per token,
    and nothing for a request without penalties.

    Args:
        prompt_ids: Token ids of the prompt, shape (n,).
        vocab_size: Every id must be below it.

    Raises:
        TypeError: The ids are not integers.
        ValueError: An id is out of range.
    """

    __slots__ = ("_buffer", "_length", "_output", "_prompt_length", "_vocab_size", "_whole")

    def __init__(self, prompt_ids: Sequence[int] | IntArray, *, vocab_size: int) -> None:
        prompt = np.asarray(prompt_ids)
        if prompt.size == 0:
            prompt = np.empty(0, np.int64)
        if prompt.dtype.kind in "Of" and all(isinstance(token, int) for token in prompt_ids):
            # Some are beyond 64 bits, for which numpy takes another kind of number.
            raise _out_of_range(max(prompt_ids, key=abs), vocab_size)
        if prompt.dtype.kind not in "iu" or prompt.ndim != 1:
            raise TypeError(
                f"Prompt token ids must be a flat sequence of integers, "
                f"not {prompt.dtype} of shape {prompt.shape}"
            )
        outside = np.flatnonzero((prompt < 0) | (prompt >= vocab_size))
        if outside.size:
            raise _out_of_range(int(prompt[outside[0]]), vocab_size)
        self._prompt_length = self._length = prompt.size
        self._vocab_size = vocab_size
        self._buffer: IntArray = np.empty(prompt.size + 256, np.int64)
        self._buffer[: prompt.size] = prompt
        self._whole = _Index(0)
        self._output = _Index(prompt.size)

    def __len__(self) -> int:
        return self._length

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return self._prompt_length

    @property
    def output_length(self) -> int:
        """Tokens generated so far."""
        return self._length - self._prompt_length

    @property
    def last_id(self) -> int:
        """The last token."""
        return int(self._buffer[self._length - 1])

    @property
    def token_ids(self) -> IntArray:
        """Prompt and output, shape (n,): a read-only view that later appends leave alone."""
        view = self._buffer[: self._length]
        view.flags.writeable = False
        return view

    @property
    def output_ids(self) -> IntArray:
        """The output alone, shape (output_length,): a read-only view likewise."""
        return self.token_ids[self._prompt_length :]

    def append(self, token_id: int) -> None:
        """Add a generated token.

        Raises:
            ValueError: The id is out of range.
        """
        if not 0 <= token_id < self._vocab_size:
            raise _out_of_range(token_id, self._vocab_size)
        if self._length == self._buffer.size:
            # Doubling keeps appends O(1) on average. Views of the old buffer stay valid.
            grown: IntArray = np.empty(2 * self._buffer.size, np.int64)
            grown[: self._length] = self._buffer
            self._buffer = grown
        self._buffer[self._length] = token_id
        self._length += 1

    def copy(self) -> TokenHistory:
        """The same tokens, to be continued otherwise."""
        other: TokenHistory = object.__new__(TokenHistory)
        other._prompt_length, other._length = self._prompt_length, self._length
        other._vocab_size = self._vocab_size
        other._buffer = self._buffer.copy()
        other._whole, other._output = self._whole.copy(), self._output.copy()
        return other

    def unique_ids(self) -> IntArray:
        """Every id in prompt or output once, shape (u,), in no particular order."""
        self._whole.update(self._buffer[: self._length])
        return self._whole.ids

    def output_counts(self) -> tuple[IntArray, IntArray]:
        """Every id in the output once, and how often it was generated: two arrays (u,)."""
        self._output.update(self._buffer[: self._length])
        return self._output.ids, self._output.counts


class _Index:
    """Unique ids and counts of a growing array from position ``start`` on."""

    __slots__ = ("_counts", "_done", "_ids", "_slots")

    def __init__(self, start: int) -> None:
        self._done = start
        self._slots: dict[int, int] = {}
        self._ids: IntArray = np.empty(0, np.int64)
        self._counts: IntArray = np.empty(0, np.int64)

    @property
    def ids(self) -> IntArray:
        return self._ids[: len(self._slots)]

    @property
    def counts(self) -> IntArray:
        return self._counts[: len(self._slots)]

    def copy(self) -> _Index:
        other = _Index(self._done)
        other._slots = self._slots.copy()
        other._ids, other._counts = self._ids.copy(), self._counts.copy()
        return other

    def update(self, tokens: IntArray) -> None:
        """Take in ``tokens[self._done:]``."""
        if not self._slots and self._done < tokens.size:
            # The first time it may be a whole prompt.
            ids, counts = np.unique(tokens[self._done :], return_counts=True)
            self._slots = {token: slot for slot, token in enumerate(ids.tolist())}
            self._ids, self._counts = ids, counts
        else:
            for token in tokens[self._done :].tolist():
                self._add(token)
        self._done = tokens.size

    def _add(self, token: int) -> None:
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == self._ids.size:
            spare: IntArray = np.zeros(slot + 64, np.int64)
            self._ids = np.concatenate([self._ids, spare])
            self._counts = np.concatenate([self._counts, spare])
        self._ids[slot] = token
        self._counts[slot] += 1


def _out_of_range(token_id: int, vocab_size: int) -> ValueError:
    return ValueError(
        f"Token id {token_id} is out of range: the model's vocabulary has {vocab_size} tokens, "
        f"so ids go from 0 to {vocab_size - 1}"
    )
