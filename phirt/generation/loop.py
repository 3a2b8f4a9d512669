"""The decode loop: the one loop that every model on every backend runs through.

It knows token ids and logits, and a session as `phirt.protocols` describes it. One
`DecodeLoop` is one request: each `step` runs the model once, lets the processors have
the logits, and chooses a token. Text, stop strings and streaming are built on top.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from phirt.errors import ContextLengthError, SessionClosedError
from phirt.generation.failover import Failover, Recover
from phirt.generation.forward import PREFILL_CHUNK, SMALLEST_CHUNK, Forward
from phirt.generation.history import TokenHistory
from phirt.generation.params import GenerationParams
from phirt.generation.params_resolved import GenerationDefaults, resolve
from phirt.generation.prefix import PrefixCache
from phirt.generation.processors import build_processors
from phirt.generation.prompt_lookup import PromptLookup
from phirt.generation.sampling import choose_token
from phirt.generation.sampling_logprobs import log_softmax_at, logsumexp, top_logprobs
from phirt.generation.sampling_random import RandomStream
from phirt.generation.speculation import DRAFT_TOKENS, Drafter, Speculation, StepCosts
from phirt.generation.timings import Stopwatch, Timings, Usage
from phirt.protocols import LoadedModel
from phirt.types import FinishReason, FloatArray

__all__ = ["DecodeLoop", "TokenStep", "check_fits", "with_logprobs"]


@dataclass(frozen=True, slots=True)
class TokenStep:
    """One generated token.

    Attributes:
        token_id: The token.
        logprob: Its log-probability under the model's own logits, before any processor;
            None unless asked for.
        top_logprobs: The most likely tokens and their log-probabilities, most likely
            first; None unless asked for.
    """

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] | None = None


class DecodeLoop:
    """One request: prompt ids in, one token at a time out.

    A loop is driven by one thread at a time; only `cancel` may be called from another.

    Args:
        model: The loaded model.
        prompt_ids: At least one token id.
        params: What the caller asked for; may be replaced between two steps.
        defaults: What the model's own configuration says about sampling.
        eos_token_ids: Ids that end a generation, besides those that the loaded model
            names; those beyond the vocabulary are left out.
        prefill_chunk: Most prompt tokens per call of the model.
        recover: Asked for another model to go on with where this one fails; None to raise
            what it failed of.
        prefixes: KV caches of earlier requests, to go on from what this one begins with; None
            to compute all of it.
        drafter: Guesses what comes next; None for the prompt itself, where
            ``prompt_lookup_num_tokens`` asks for guesses. The loop closes it.
        step_costs: What calls of the model were seen to cost; requests of one model share it.

    Raises:
        ValueError: The prompt is empty, an id is outside the vocabulary, or
            ``prefill_chunk`` is below 3.
        UnsupportedParameterError: Guesses are asked for, and the model cannot judge them.
        ContextLengthError: Prompt and ``max_new_tokens`` do not fit in the context.
    """

    def __init__(
        self,
        model: LoadedModel,
        prompt_ids: Sequence[int],
        params: GenerationParams,
        *,
        defaults: GenerationDefaults,
        eos_token_ids: Iterable[int] = (),
        prefill_chunk: int = PREFILL_CHUNK,
        recover: Recover | None = None,
        prefixes: PrefixCache | None = None,
        drafter: Drafter | None = None,
        step_costs: StepCosts | None = None,
    ) -> None:
        self._watch = Stopwatch()
        if prefill_chunk < SMALLEST_CHUNK:
            raise ValueError(f"prefill_chunk={prefill_chunk} must be at least {SMALLEST_CHUNK}")
        self._defaults = defaults
        vocab = range(model.info.vocab_size)
        self._eos_ids = model.info.eos_token_ids.union(i for i in eos_token_ids if i in vocab)
        if len(prompt_ids) == 0:
            raise ValueError("The prompt is empty; it needs at least one token.")
        self._history = TokenHistory(prompt_ids, vocab_size=model.info.vocab_size)
        self._drafter = drafter
        self._lookup = PromptLookup()
        self._step_costs = step_costs or StepCosts()
        self._forward = Forward(
            model,
            self._history,
            self._watch,
            prefill_chunk=prefill_chunk,
            recover=recover,
            prefixes=prefixes,
        )
        self._reason: FinishReason | None = None
        self._use(params)
        self._speculate()
        self._random = RandomStream(params.seed)

    @property
    def params(self) -> GenerationParams:
        """What the next step generates with."""
        return self._params

    @params.setter
    def params(self, params: GenerationParams) -> None:
        old_seed, old_guess = self._params.seed, self._params.prompt_lookup_num_tokens
        self._use(params)
        if params.prompt_lookup_num_tokens != old_guess:
            self._speculate()
        if params.seed != old_seed:
            self._random = RandomStream(params.seed)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The strings that end the text, for the layer that sees text."""
        return self._resolved.stop

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the generation ended, or None while it goes on."""
        return self._reason

    @property
    def seed(self) -> int:
        """The seed of this request's random numbers, given or drawn."""
        return self._random.seed

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return self._history.prompt_length

    @property
    def generated_ids(self) -> list[int]:
        """The tokens generated so far."""
        ids: list[int] = self._history.output_ids.tolist()
        return ids

    @property
    def failovers(self) -> tuple[Failover, ...]:
        """The changes of backend or device so far, in order."""
        return self._forward.failovers

    @property
    def usage(self) -> Usage:
        """Token counts so far."""
        return Usage(
            prompt_tokens=self.prompt_length,
            cached_tokens=self._forward.cached_tokens,
            completion_tokens=self._history.output_length,
            drafted_tokens=self._forward.drafted_tokens,
            accepted_tokens=self._forward.accepted_tokens,
        )

    def timings(self, *, load_s: float) -> Timings:
        """Times and rates so far."""
        usage = self.usage
        return self._watch.timings(
            load_s=load_s,
            prefilled_tokens=usage.prompt_tokens - usage.cached_tokens,
            completion_tokens=usage.completion_tokens,
        )

    def step(self) -> TokenStep | None:
        """Generate one token, or return None once the generation has ended.

        Raises:
            NonFiniteLogitsError: No token can be chosen from the logits.
            Exception: Whatever the backend or a user's processor raised. The session is
                freed first, and `finish_reason` is ``"error"``.
        """
        if self._reason is not None:
            return None
        if self._forward.is_cancelled():
            self.finish("cancelled")
            return None
        limit = self._resolved.max_new_tokens
        if limit is not None and self._history.output_length >= limit:
            # Only after the caller lowered the limit between two tokens.
            self.finish("length")
            return None
        try:
            step = self._choose(self._forward.logits(max_new_tokens=limit))
        except SessionClosedError:
            if not self._forward.is_cancelled():
                self.finish("error")
                raise
            self.finish("cancelled")
            return None
        except BaseException:
            self.finish("error")
            raise
        self._watch.token()
        self._end_if_done(step.token_id)
        return step

    def __iter__(self) -> Iterator[TokenStep]:
        while (step := self.step()) is not None:
            yield step

    def cancel(self) -> None:
        """End the generation at the next opportunity. Callable from any thread."""
        self._forward.cancel()

    def finish(self, reason: FinishReason) -> None:
        """End the generation for a reason that the loop cannot see, and free the session.

        The first reason stands, but for a stop string, which is seen only after the loop
        has ended on the same token.
        """
        on_a_token = self._reason in ("stop", "length", "context")
        if self._reason is None or (reason == "stop_string" and on_a_token):
            self._reason = reason
        self._forward.close()
        if self._drafter is not None:
            self._drafter.close()

    def _use(self, params: GenerationParams) -> None:
        if not isinstance(params, GenerationParams):
            raise TypeError(f"params must be a GenerationParams, not {type(params).__name__}")
        params.check_single()
        params.check_vocabulary(self._forward.vocab_size)
        resolved = resolve(params, self._defaults)
        # Without a limit of its own, a request still needs room for one token.
        context = self._forward.context_length
        check_fits(self.prompt_length, resolved.max_new_tokens or 1, context)
        eos = frozenset() if resolved.ignore_eos else self._eos_ids
        self._stop_ids = eos.union(resolved.stop_token_ids)
        self._processors = build_processors(resolved, stop_token_ids=self._stop_ids)
        if resolved.prompt_lookup_num_tokens is not None or self._drafter is not None:
            self._forward.check_speculation()
        self._params, self._resolved = params, resolved

    def _speculate(self) -> None:
        """Guess what comes next as the parameters say."""
        most = self._resolved.prompt_lookup_num_tokens
        drafter = self._drafter
        if drafter is None and most is not None:
            drafter = self._lookup
        if drafter is None:
            self._forward.speculate(None)
            return
        self._forward.speculate(Speculation(drafter, self._step_costs, most=most or DRAFT_TOKENS))

    def _choose(self, row: FloatArray) -> TokenStep:
        history, sampling, wanted = self._history, self._resolved.sampling, self._resolved.logprobs
        # The processors work in place, and log-probabilities are the model's own.
        raw = row.copy() if wanted is not None and self._processors else row
        for process in self._processors:
            process(history, row)
        # Position by position, so that a greedy stretch or changed params shift nothing.
        number = 0.0 if sampling is None else self._random.uniform(history.output_length)
        token_id = choose_token(row, sampling, number)
        history.append(token_id)
        return TokenStep(token_id) if wanted is None else with_logprobs(token_id, raw, wanted)

    def _end_if_done(self, token_id: int) -> None:
        history = self._history
        if token_id in self._stop_ids:
            self.finish("stop")
        elif self._forward.is_cancelled():
            self.finish("cancelled")
        elif history.output_length == self._resolved.max_new_tokens:
            self.finish("length")
        elif len(history) >= self._forward.context_length:
            self.finish("context")


def with_logprobs(token_id: int, logits: FloatArray, count: int) -> TokenStep:
    """A token with its log-probability and the ``count`` best, from logits (vocab,)."""
    normalizer = logsumexp(logits)
    logprob = float(log_softmax_at(logits, [token_id], normalizer=normalizer)[0])
    ids, values = top_logprobs(logits, count, normalizer=normalizer)
    return TokenStep(token_id, logprob, tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def check_fits(prompt: int, new_tokens: int, context: int) -> None:
    """Check that prompt and new tokens fit in the model's context.

    Raises:
        ContextLengthError: They do not.
    """
    required = prompt + new_tokens
    if required > context:
        raise ContextLengthError(
            f"The prompt has {prompt} tokens and {new_tokens} more are asked for, "
            f"{required} in all; the model's context is {context}. Shorten the prompt, or lower "
            "max_new_tokens (None generates to the end of the context).",
            required=required,
            available=context,
        )
