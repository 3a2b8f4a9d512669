"""Generation as text: a decode loop, a detokenizer and stop strings, one token at a time."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Self

from phirt.generation.failover import Failover
from phirt.generation.loop import DecodeLoop, TokenStep
from phirt.generation.params import GenerationParams
from phirt.generation.timings import Timings, Usage
from phirt.text.detokenizer import StreamingDetokenizer
from phirt.text.stop_strings import StopStrings
from phirt.text.tokenizer import Tokenizer
from phirt.types import FinishReason

__all__ = ["Generation", "Token", "TokenLogprobs", "TokenStream", "token_logprobs"]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one generated position, of the model's own distribution.

    Processors, temperature and cut-offs do not enter: they are log-softmax of the logits
    as the model computed them.

    Attributes:
        token_id: The token that was chosen.
        logprob: Its natural log-probability.
        top: The most likely ids with theirs, most likely first; as many as
            ``GenerationParams.logprobs`` asked for.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token of a stream.

    Attributes:
        id: The token id.
        text: The text that became final with this token. It may be empty, while a
            character or a possible stop string is incomplete, and may hold text of
            earlier tokens. The texts of a stream that ran to its end add up to
            `Generation.text`.
        logprobs: Set if ``GenerationParams.logprobs`` asked for it.
    """

    id: int
    text: str
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """The result of one request.

    Attributes:
        text: The generated text, without prompt, special tokens or stop string.
        token_ids: Every generated token, a final stop token included.
        finish_reason: Why it ended.
        usage: Token counts.
        timings: Times and rates.
        seed: Seed of the random numbers; with equal parameters it repeats the result.
        stop: The stop string or stop token id that ended it, or None.
        logprobs: One entry per token, None where they were not asked for at the time; None
            if they never were.
        failovers: The changes of backend or device on the way, in order; see
            ``phirt.load(failover=True)``.
        score: Of a beam search: the sum of the processed log-probabilities of its tokens, over
            their number to the power of ``length_penalty``; None without beams.
        alternatives: The other sequences of a request with ``n`` above 1: of a beam search the
            next best ones, best first; else the other samples, in their order.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    seed: int
    stop: str | int | None = None
    logprobs: list[TokenLogprobs | None] | None = None
    failovers: tuple[Failover, ...] = ()
    score: float | None = None
    alternatives: tuple[Generation, ...] = ()


class TokenStream:
    """An iterator over the tokens of one request, generated as they are asked for.

    It is a context manager, and closing it, dropping it or running it to its end frees
    its KV cache. `close` may be called from any thread; the step that runs then is the
    last. `params` may be replaced between two tokens.
    """

    def __init__(self, loop: DecodeLoop, tokenizer: Tokenizer, *, load_s: float) -> None:
        self._loop = loop
        self._load_s = load_s
        self._detokenizer = StreamingDetokenizer(tokenizer)
        self._stops = StopStrings(loop.stop_strings)
        self._held = ""  # text that new stop strings have yet to see
        self._text: list[str] = []
        self._logprobs: list[TokenLogprobs | None] = []
        self._stop: str | int | None = None
        self._stopped_by_text = False
        self._flushed = False
        # Held while a step runs; close() from another thread waits for it. Reentrant,
        # because a processor or a signal handler may call close() inside a step.
        self._lock = threading.RLock()
        self._stepping = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Token:
        with self._lock:
            if self._stepping:
                raise RuntimeError("A stream cannot be iterated from inside its own step.")
            self._stepping = True
            try:
                return self._next()
            except StopIteration:
                raise
            except BaseException:
                # Whatever it is (Ctrl-C, between two lines of ours), a token may be lost.
                self._loop.finish("error")
                raise
            finally:
                self._stepping = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        # A stream that is dropped must not keep its cache until a garbage collection.
        # Nobody else can be stepping, since nobody else has it; __init__ may have failed.
        loop = getattr(self, "_loop", None)
        if loop is not None:
            loop.finish("cancelled")

    @property
    def params(self) -> GenerationParams:
        """What the next token is generated with."""
        return self._loop.params

    @params.setter
    def params(self, params: GenerationParams) -> None:
        with self._lock:
            old = self._loop.stop_strings
            self._loop.params = params
            if self._loop.stop_strings != old:
                # What was held back is judged again, by the new rules.
                self._held += self._stops.held
                self._stops = StopStrings(self._loop.stop_strings)

    @property
    def result(self) -> Generation:
        """What was produced, also by a stream that was closed or ended in an error.

        Its text then includes what was still held back when the stream ended.

        Raises:
            RuntimeError: The stream has not ended: iterate it to its end or close it.
        """
        reason = self._loop.finish_reason
        if reason is None:
            raise RuntimeError(
                "The stream has not ended. Iterate it to its end, or close() it, and then ask "
                "for its result."
            )
        with self._lock:
            self._flush()
        asked = any(entry is not None for entry in self._logprobs)
        return Generation(
            text="".join(self._text),
            token_ids=self._loop.generated_ids,
            finish_reason=reason,
            usage=self._loop.usage,
            timings=self._loop.timings(load_s=self._load_s),
            seed=self._loop.seed,
            stop=self._stop,
            logprobs=list(self._logprobs) if asked else None,
            failovers=self._loop.failovers,
        )

    def close(self) -> None:
        """End the generation and free its cache. Callable from any thread, any number of times.

        A step that runs in another thread ends first, interrupted where the runtime
        can; that thread's iteration then stops.
        """
        self._loop.cancel()
        with self._lock:
            # Inside a step of this very thread the session is in use: the step frees it.
            if not self._stepping:
                self._loop.finish("cancelled")

    def _next(self) -> Token:
        step = self._loop.step()
        if step is None:
            raise StopIteration
        logprobs = token_logprobs(step)
        self._logprobs.append(logprobs)
        if self._loop.finish_reason == "stop":
            # A stop token ends the text; it is no part of it, even where it spells something.
            self._stop = step.token_id
            text = self._flush()
        else:
            text = self._push(self._detokenizer.add(step.token_id))
            if self._loop.finish_reason is not None:
                text += self._flush()
        return Token(step.token_id, text, logprobs)

    def _push(self, text: str) -> str:
        """Run text through the stop strings, and return what is final of it."""
        final, matched = self._stops.add(self._held + text)
        self._held = ""
        return self._settle(final, matched)

    def _flush(self) -> str:
        """The text that was held back, now that no token follows; once."""
        if self._flushed or self._stopped_by_text:
            return ""
        self._flushed = True
        final = self._push(self._detokenizer.flush())
        if not self._stopped_by_text:
            # A stop string may have been complete already, waiting on a longer one.
            final += self._settle(self._stops.flush(), self._stops.matched)
        return final

    def _settle(self, final: str, matched: str | None) -> str:
        if matched is not None:
            self._stop = matched
            self._stopped_by_text = True
            self._loop.finish("stop_string")
        self._text.append(final)
        return final


def token_logprobs(step: TokenStep) -> TokenLogprobs | None:
    """The log-probabilities of a step, where they were asked for."""
    if step.logprob is None:
        return None
    return TokenLogprobs(step.token_id, step.logprob, step.top_logprobs or ())
