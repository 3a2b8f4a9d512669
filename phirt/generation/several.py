"""Several sequences from one prompt: the best of a beam search, or independent samples.

They share the processors, the samplers and the stop rules of the decode loop
(`phirt.generation.loop`), and run through the model together (`phirt.generation.rows`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

import numpy as np

from phirt.errors import NonFiniteLogitsError
from phirt.generation.beams import Beam, BeamSearch, Continuations, Hypothesis
from phirt.generation.forward import PREFILL_CHUNK
from phirt.generation.history import TokenHistory
from phirt.generation.loop import TokenStep, check_fits, with_logprobs
from phirt.generation.params import GenerationParams
from phirt.generation.params_resolved import GenerationDefaults, resolve
from phirt.generation.processors import build_processors
from phirt.generation.rows import Rows
from phirt.generation.sampling import choose_token
from phirt.generation.sampling_logprobs import logsumexp
from phirt.generation.sampling_random import RandomStream, sample_seed
from phirt.generation.sampling_subsets import top_ids
from phirt.generation.timings import Stopwatch
from phirt.protocols import LoadedModel
from phirt.types import FinishReason, FloatArray

__all__ = ["Completion", "SeveralSequences", "StopRule"]


class StopRule(Protocol):
    """Ends a sequence for a reason that is not in its ids, such as a stop string."""

    def add(self, token_id: int) -> bool:
        """Take in one token, and say whether the sequence ends with it."""

    def copy(self) -> Self:
        """The same, to be continued otherwise."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One of the sequences.

    Attributes:
        steps: Its tokens.
        finish_reason: Why it ended.
        seed: Seed of its random numbers.
        watch: When things happened: to a sample itself, or to the search as a whole.
        score: Score of a beam search's hypothesis, or None.
    """

    steps: list[TokenStep]
    finish_reason: FinishReason
    seed: int
    watch: Stopwatch
    score: float | None = None


@dataclass(slots=True)
class _Sample:
    """One of several samples, as far as it has come."""

    history: TokenHistory
    random: RandomStream
    rule: StopRule
    watch: Stopwatch = field(default_factory=Stopwatch)
    steps: list[TokenStep] = field(default_factory=list)
    reason: FinishReason | None = None


class SeveralSequences:
    """One request for several sequences.

    It is driven by one thread; only `cancel` may be called from another.

    Args:
        model: The loaded model.
        prompt_ids: At least one token id.
        params: What the caller asked for.
        defaults: What the model's own configuration says about sampling.
        eos_token_ids: Ids that end a sequence, besides those that the loaded model names;
            those beyond the vocabulary are left out.
        prefill_chunk: Most prompt tokens per call of the model.

    Raises:
        ValueError: The prompt is empty, an id is outside the vocabulary, or the parameters
            contradict each other.
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
    ) -> None:
        self._watch = Stopwatch()
        info = model.info
        if len(prompt_ids) == 0:
            raise ValueError("The prompt is empty; it needs at least one token.")
        self._history = TokenHistory(prompt_ids, vocab_size=info.vocab_size)
        params.check_vocabulary(info.vocab_size)
        self._resolved = resolve(params, defaults)
        self._room = info.context_length - len(prompt_ids)
        limit = self._resolved.max_new_tokens
        check_fits(len(prompt_ids), limit or 1, info.context_length)
        if limit is not None:
            self._room = min(self._room, limit)
        eos = info.eos_token_ids.union(i for i in eos_token_ids if i in range(info.vocab_size))
        if self._resolved.ignore_eos:
            eos = frozenset()
        self._stop_ids = eos.union(self._resolved.stop_token_ids)
        self._processors = build_processors(self._resolved, stop_token_ids=self._stop_ids)
        self._seed = RandomStream(params.seed).seed
        self._rows = Rows(
            model,
            count=max(self._resolved.num_beams, self._resolved.n),
            max_new_tokens=limit,
            prefill_chunk=prefill_chunk,
        )

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The strings that end a text, for the layer that sees text."""
        return self._resolved.stop

    def cancel(self) -> None:
        """Let `run` raise before it calls the model again. Callable from any thread."""
        self._rows.cancel()

    def run(self, rule: StopRule) -> list[Completion]:
        """Generate all of them. Every row is free when it returns or raises.

        Args:
            rule: As it is before the first token; each sequence gets a copy.

        Returns:
            The sequences: of a beam search the best first, and fewer than ``n`` where there are
            no more; samples in their order.

        Raises:
            SessionClosedError: The request was cancelled, or the model closed.
            NonFiniteLogitsError: No token can be chosen from the logits.
            Exception: Whatever the backend or a user's processor raised.
        """
        with self._rows:
            if self._resolved.num_beams > 1:
                return self._search(rule)
            return self._sample(rule)

    def _search(self, rule: StopRule) -> list[Completion]:
        """Beam search."""
        resolved, watch = self._resolved, self._watch
        search = BeamSearch(
            num_beams=resolved.num_beams,
            max_new_tokens=self._room,
            stop_tokens=len(self._stop_ids),
            length_penalty=resolved.length_penalty,
            early_stopping=resolved.early_stopping,
        )
        steps: dict[Beam, TokenStep] = {}
        histories, rules = [self._history], [rule]
        watch.prefill_started()
        logits = self._rows.prefill(self._history)
        watch.prefill_stopped()
        while True:
            keeps_raw = resolved.logprobs is not None and self._processors
            raw = logits.copy() if keeps_raw else logits
            candidates = search.candidates(
                [
                    self._continuations(history, row, search.ranked)
                    for history, row in zip(histories, logits, strict=True)
                ]
            )
            if not candidates and not search.hypotheses:
                raise NonFiniteLogitsError(
                    "Every continuation of every beam is forbidden: together, the logits "
                    "processors (or the model) leave no token to choose. Check them."
                )
            grown = {beam: rules[beam.row].copy() for beam in candidates}
            ended = [self._ends(beam, grown[beam]) for beam in candidates]
            search.advance(candidates, ended)
            watch.token()
            if resolved.logprobs is not None:
                kept = {*search.running, *(found.beam for found in search.hypotheses)}
                for beam in kept.intersection(candidates):
                    steps[beam] = with_logprobs(beam.token_id, raw[beam.row], resolved.logprobs)
            if search.is_done:
                break
            histories = [_grown(histories[beam.row], beam.token_id) for beam in search.running]
            rules = [grown[beam] for beam in search.running]
            logits = self._rows.step([beam.row for beam in search.running], histories)
        best = search.hypotheses[: resolved.n]
        return [self._completion(hypothesis, steps) for hypothesis in best]

    def _continuations(self, history: TokenHistory, row: FloatArray, count: int) -> Continuations:
        """The best continuations of a beam, from its logits, which are overwritten."""
        normalizer = logsumexp(row)
        if not self._processors:
            ids = top_ids(row, count)
            return ids, row[ids].astype(np.float64) - normalizer
        # As in transformers, processors of a beam search see log-probabilities.
        row -= np.float32(normalizer)
        for process in self._processors:
            process(history, row)
        largest = row[row.argmax()]  # NaN and +inf win every comparison
        if np.isnan(largest) or largest == np.inf:
            raise NonFiniteLogitsError(
                f"After the logits processors, the largest log-probability is {largest}. Check "
                "them."
            )
        ids = top_ids(row, count)
        return ids, row[ids].astype(np.float64)

    def _ends(self, beam: Beam, rule: StopRule) -> bool:
        """Whether a candidate comes to a stop with its last token."""
        if beam.token_id in self._stop_ids:
            return True
        return rule.add(beam.token_id) or beam.length == self._room

    def _completion(self, hypothesis: Hypothesis, steps: dict[Beam, TokenStep]) -> Completion:
        path = hypothesis.beam.path
        return Completion(
            steps=[steps.get(beam) or TokenStep(beam.token_id) for beam in path],
            finish_reason=self._reason(path[-1].token_id, len(path)) or "stop_string",
            seed=self._seed,
            watch=self._watch,
            score=hypothesis.score,
        )

    def _sample(self, rule: StopRule) -> list[Completion]:
        """Samples, each as if it were alone."""
        samples = [
            _Sample(
                self._history.copy(), RandomStream(sample_seed(self._seed, number)), rule.copy()
            )
            for number in range(self._resolved.n)
        ]
        for sample in samples:
            sample.watch.prefill_started()
        logits = self._rows.prefill(self._history)
        for sample in samples:
            sample.watch.prefill_stopped()
        live, rows = samples, [0] * len(samples)
        logits = logits.repeat(len(samples), axis=0)
        while True:
            for sample, row in zip(live, logits, strict=True):
                self._choose(sample, row)
            going = [number for number, sample in enumerate(live) if sample.reason is None]
            if not going:
                break
            rows, live = [rows[number] for number in going], [live[number] for number in going]
            logits = self._rows.step(rows, [sample.history for sample in live])
            rows = list(range(len(live)))
        return [
            Completion(sample.steps, sample.reason, sample.random.seed, sample.watch)
            for sample in samples
            if sample.reason is not None
        ]

    def _choose(self, sample: _Sample, row: FloatArray) -> None:
        """Choose a sample's next token from its logits, which are overwritten."""
        history, resolved = sample.history, self._resolved
        raw = row.copy() if resolved.logprobs is not None and self._processors else row
        for process in self._processors:
            process(history, row)
        number = sample.random.uniform(history.output_length)
        token = choose_token(row, resolved.sampling, number)
        history.append(token)
        wanted = resolved.logprobs
        step = TokenStep(token) if wanted is None else with_logprobs(token, raw, wanted)
        sample.steps.append(step)
        sample.watch.token()
        sample.reason = self._reason(token, history.output_length)
        if sample.reason != "stop" and sample.rule.add(token):
            sample.reason = "stop_string"

    def _reason(self, token_id: int, length: int) -> FinishReason | None:
        """Why a sequence of ``length`` new tokens ends with this one, if its ids say so."""
        if token_id in self._stop_ids:
            return "stop"
        if length < self._room:
            return None
        return "length" if length == self._resolved.max_new_tokens else "context"


def _grown(history: TokenHistory, token_id: int) -> TokenHistory:
    grown = history.copy()
    grown.append(token_id)
    return grown
