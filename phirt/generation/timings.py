"""When things happened in one request, and the rates that follow from it."""

from __future__ import annotations

import time
from dataclasses import dataclass

__all__ = ["Stopwatch", "Timings", "Usage"]


@dataclass(frozen=True, slots=True)
class Usage:
    """How many tokens a request took.

    Attributes:
        prompt_tokens: Tokens of the prompt.
        cached_tokens: Tokens of the prompt whose keys and values were already in a cache.
        completion_tokens: Tokens generated, a stop token included.
        drafted_tokens: Tokens that were guessed, and judged by the model.
        accepted_tokens: Those of them that were generated.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """How long a request took, as its caller saw it.

    Attributes:
        load_s: Seconds that loading the model took, once, before this request.
        ttft_s: Time to first token: seconds from the call to the first token, or None
            if there was none.
        prefill_tokens_per_s: Prompt tokens, less cached ones, over the seconds of the prefill.
        decode_tokens_per_s: (n - 1) / (t_last - t_first) over n generated tokens; None
            for fewer than two. A caller that is slow to take tokens from a stream
            lowers it.
    """

    load_s: float
    ttft_s: float | None
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None


class Stopwatch:
    """Records the moments of one request on a monotonic clock."""

    __slots__ = ("_first", "_last", "_prefill_start", "_prefill_stop", "_start")

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._prefill_start: float | None = None
        self._prefill_stop: float | None = None
        self._first: float | None = None
        self._last: float | None = None

    def prefill_started(self) -> None:
        """Mark the start of the prompt's prefill."""
        self._prefill_start = time.perf_counter()

    def prefill_stopped(self) -> None:
        """Mark its end."""
        self._prefill_stop = time.perf_counter()

    def token(self) -> None:
        """Mark that a token is ready."""
        self._last = time.perf_counter()
        if self._first is None:
            self._first = self._last

    def timings(self, *, load_s: float, prefilled_tokens: int, completion_tokens: int) -> Timings:
        """The rates so far."""
        prefill = decode = ttft = None
        if self._prefill_start is not None and self._prefill_stop is not None:
            prefill = _rate(prefilled_tokens, self._prefill_stop - self._prefill_start)
        if self._first is not None and self._last is not None:
            ttft = self._first - self._start
            decode = _rate(completion_tokens - 1, self._last - self._first)
        return Timings(load_s, ttft, prefill, decode)


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if count > 0 and seconds > 0 else None
