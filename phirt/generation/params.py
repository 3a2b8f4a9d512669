"""What a caller may ask of a generation, checked before any backend is called."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Literal

from phirt.generation import params_checks as check
from phirt.types import LogitsProcessor

__all__ = ["SAMPLING_VALIDATORS", "GenerationParams"]


_MOST_SEQUENCES = 1024
"""Each has a KV cache; far below this the memory of the machines that this is for ends."""


def _no_bias() -> Mapping[int, float]:
    return MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationParams:
    """Parameters of one generation, by Hugging Face's names and with its meanings.

    A field that is None (or empty, for collections) is *unset*: the model's own
    generation_config decides, and where it says nothing, the neutral value. Collections
    are copied and made immutable. `resolve` says when a request samples and when it is
    greedy.

    Attributes:
        max_new_tokens: Most tokens to generate, at least 1. Unset: until a stop token or
            the end of the model's context.
        min_new_tokens: Stop tokens are forbidden until this many tokens were generated.
        temperature: Divides the logits, at least 0. Above 0 samples; 0 is greedy.
        top_k: Samples from the k most probable tokens and their ties; 0 is off.
        top_p: Samples from the smallest set of most probable tokens whose probability
            reaches top_p, in (0, 1]; 1 is off.
        min_p: Samples from tokens at least min_p times as probable as the most probable
            one, in [0, 1]; 0 is off.
        repetition_penalty: Divides the positive and multiplies the negative logits of
            every token in prompt and output (Keskar et al. 2019, arXiv:1909.05858); above
            0; 1 is off.
        presence_penalty: Subtracted from the logit of every token generated so far, in
            [-2, 2] (OpenAI's formula; the prompt does not count).
        frequency_penalty: The same, times how often the token was generated.
        no_repeat_ngram_size: No n-gram of this size appears twice in prompt and output;
            0 is off.
        logit_bias: Added to the logits of these token ids.
        stop: A string or several that end the output; none of it is returned.
        stop_token_ids: Token ids that end the output, besides the model's own.
        suppress_tokens: Token ids that are never generated.
        ignore_eos: Goes on after the model's own stop tokens.
        do_sample: True samples, False is greedy. Unset: see `resolve`.
        seed: Of the random stream, in [0, 2**64). Unset: a fresh one.
        logprobs: Log-probabilities to report per token: 0 for the chosen token's alone,
            k for the k most probable besides. Unset: none.
        logits_processors: Functions ``f(token_ids, logits) -> logits``, called in order
            after the built-in processors and before the temperature. Beam search gives them
            log-probabilities for logits.
        prompt_lookup_num_tokens: Most tokens that are guessed at once from what followed the
            same tokens before, in prompt or output; the guesses change the speed and not the
            choices. Unset: no guesses, but for those of a draft model.
        num_beams: Sequences that beam search keeps at each step, at most 1,024; 1 is off.
        length_penalty: Beam search divides a finished sequence's log-probability by its
            generated tokens to this power: above 0 prefers long ones, below 0 short ones.
            Unset: 1.
        early_stopping: When beam search ends, once ``num_beams`` sequences are finished: True
            at once; False when none that goes on scores better at its present length;
            ``"never"`` when none can at any length. Unset: False.
        n: Sequences to return (Hugging Face's ``num_return_sequences``): the best beams, at
            most ``num_beams``; without beams so many samples, at most 1,024. Unset: 1.

    Raises:
        TypeError: A value of the wrong type.
        ValueError: A value out of range, or two that contradict each other.
    """

    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    # A read-only mapping has no hash; equality still compares it.
    logit_bias: Mapping[int, float] = field(default_factory=_no_bias, hash=False)
    stop: str | Collection[str] = ()
    stop_token_ids: Collection[int] = ()
    suppress_tokens: Collection[int] = ()
    ignore_eos: bool | None = None
    do_sample: bool | None = None
    seed: int | None = None
    logprobs: int | None = None
    logits_processors: Collection[LogitsProcessor] = ()
    prompt_lookup_num_tokens: int | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    n: int | None = None

    def __post_init__(self) -> None:
        for name, validate in _VALIDATORS.items():
            value = getattr(self, name)
            if value is None:
                value = _EMPTY.get(name)
            if value is not None:
                # Frozen is for the users; normalising is part of the construction.
                object.__setattr__(self, name, validate(name, value))
        _check_consistent(self)

    def __reduce__(self) -> tuple[object, ...]:
        # A read-only mapping can neither be pickled nor deep-copied.
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        values["logit_bias"] = dict(self.logit_bias)
        return (_rebuild, (values,))

    def merge(self, **overrides: object) -> GenerationParams:
        """A copy with these fields replaced; None unsets a field.

        Raises:
            TypeError: No such parameter (the nearest name is suggested), or a wrong type.
            ValueError: A value out of range, or one that contradicts another.
        """
        names = [item.name for item in fields(self)]
        for name in overrides:
            if name not in names:
                nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
                hint = (
                    f"Did you mean {nearest[0]!r}?" if nearest else f"There are {', '.join(names)}."
                )
                raise TypeError(f"There is no generation parameter {name!r}. {hint}")
        changes: dict[str, Any] = overrides  # checked by the constructor
        return replace(self, **changes)

    @property
    def is_several(self) -> bool:
        """Whether more than one sequence is made: beams, or several samples."""
        return (self.num_beams or 1) > 1 or (self.n or 1) > 1

    def check_single(self) -> None:
        """Check that one sequence is asked for, whose tokens are known one by one.

        Raises:
            ValueError: ``num_beams`` or ``n`` is above 1.
        """
        if (self.num_beams or 1) > 1:
            raise ValueError(
                f"num_beams={self.num_beams} cannot be streamed: which tokens beam search chooses "
                "is known at its end only. Use Model.generate, or leave num_beams out"
            )
        if (self.n or 1) > 1:
            raise ValueError(
                f"n={self.n} cannot be streamed: a stream is one sequence. Use Model.generate, or "
                "one stream for each, with seeds of their own"
            )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Check the token ids in these parameters against a model's vocabulary.

        Raises:
            ValueError: An id in logit_bias, stop_token_ids or suppress_tokens is
                ``vocab_size`` or more.
        """
        for name in ("logit_bias", "stop_token_ids", "suppress_tokens"):
            beyond = [token for token in getattr(self, name) if token >= vocab_size]
            if beyond:
                raise ValueError(
                    f"{name} holds token id {beyond[0]}, but the model's vocabulary has "
                    f"{vocab_size} tokens: ids go from 0 to {vocab_size - 1}"
                )


def _rebuild(values: dict[str, Any]) -> GenerationParams:
    return GenerationParams(**values)


def _count(low: int, limit: int = check.INT_LIMIT) -> Callable[[str, object], int]:
    return lambda name, value: check.integer(name, value, low=low, limit=limit)


def _number(allowed: str, accepts: Callable[[float], bool]) -> Callable[[str, object], float]:
    return lambda name, value: check.real(name, value, allowed=allowed, accepts=accepts)


_PENALTY = _number("from -2 to 2", lambda x: -2 <= x <= 2)

SAMPLING_VALIDATORS: Mapping[str, Callable[[str, object], Any]] = MappingProxyType(
    {
        "do_sample": check.boolean,
        "temperature": _number("0 (greedy) or above, and finite", lambda x: x >= 0),
        "top_k": _count(0),
        "top_p": _number("above 0 and at most 1", lambda x: 0 < x <= 1),
        "min_p": _number("from 0 to 1", lambda x: 0 <= x <= 1),
        "repetition_penalty": _number("above 0 and finite", lambda x: x > 0),
    }
)
"""The parameters that a model's generation_config may set too, each with its check."""

_EMPTY: Mapping[str, object] = MappingProxyType(
    {
        "logit_bias": {},
        "stop": (),
        "stop_token_ids": (),
        "suppress_tokens": (),
        "logits_processors": (),
    }
)
"""The collections, which are never None."""

_VALIDATORS: Mapping[str, Callable[[str, object], Any]] = MappingProxyType(
    {
        **SAMPLING_VALIDATORS,
        "logit_bias": check.bias_mapping,
        "stop": check.strings,
        "stop_token_ids": check.token_ids,
        "suppress_tokens": check.token_ids,
        "logits_processors": check.processors,
        "max_new_tokens": _count(1),
        "min_new_tokens": _count(0),
        "presence_penalty": _PENALTY,
        "frequency_penalty": _PENALTY,
        "no_repeat_ngram_size": _count(0),
        "ignore_eos": check.boolean,
        "seed": _count(0, 2**64),
        "logprobs": _count(0),
        "prompt_lookup_num_tokens": _count(1, 65),
        "num_beams": _count(1, _MOST_SEQUENCES + 1),
        "length_penalty": _number("finite", lambda _: True),
        "early_stopping": check.early_stopping,
        "n": _count(1, _MOST_SEQUENCES + 1),
    }
)


def _check_consistent(params: GenerationParams) -> None:
    """Refuse parameters of which one would have to be ignored."""
    least, most = params.min_new_tokens, params.max_new_tokens
    if least is not None and most is not None and least > most:
        raise ValueError(f"min_new_tokens is {least}, more than max_new_tokens, which is {most}")
    beams = params.num_beams or 1
    if params.is_several and params.prompt_lookup_num_tokens is not None:
        raise ValueError(
            f"prompt_lookup_num_tokens={params.prompt_lookup_num_tokens} guesses the tokens of "
            "one sequence, and num_beams or n asks for several: leave one of them out"
        )
    if beams > 1 and (params.n or 1) > beams:
        raise ValueError(
            f"n={params.n} is more than num_beams={beams}: beam search has as many sequences as "
            "beams to return. Raise num_beams, or lower n"
        )
    if beams > 1 and params.do_sample is True:
        raise ValueError(
            f"do_sample=True with num_beams={beams}: phirt's beam search does not sample. Leave "
            "one of them out; n gives several samples without beams"
        )
    if beams == 1:
        for name, neutral in (("length_penalty", 1), ("early_stopping", False)):
            value = getattr(params, name)
            if value is not None and value != neutral:
                raise ValueError(
                    f"{name}={value!r} is for beam search and would have no effect: give "
                    f"num_beams above 1, or leave it out"
                )
    if params.do_sample is True and params.temperature == 0:
        raise ValueError(
            "do_sample=True contradicts temperature=0, which is greedy: "
            "leave one of them out, or give a temperature above 0"
        )
    if params.do_sample is False:
        # Neutral values ask for nothing, so there is nothing to ignore.
        neutral_values = {"temperature": (0, 1), "top_k": (0,), "top_p": (1,), "min_p": (0,)}
        for name, values in neutral_values.items():
            value = getattr(params, name)
            if value is not None and value not in values:
                raise ValueError(
                    f"do_sample=False is greedy, so {name}={value} would have no effect: "
                    f"leave one of them out"
                )
