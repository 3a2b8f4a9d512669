"""What a generation really does: the caller's parameters over the model's own defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

from phirt.errors import ModelFormatError
from phirt.generation.params import SAMPLING_VALIDATORS, GenerationParams
from phirt.types import LogitsProcessor

__all__ = ["GenerationDefaults", "ResolvedParams", "Sampling", "resolve"]

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What a model's generation_config.json says about sampling; None where it is silent.

    Attributes are those of `GenerationParams` by the same names.
    """

    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> GenerationDefaults:
        """Take the keys that phirt knows out of a generation_config.json; others are left.

        Raises:
            ModelFormatError: A known key holds a value of a wrong type or range.
        """
        values = {}
        for name, validate in SAMPLING_VALIDATORS.items():
            value = config.get(name)
            if value is None:
                continue
            try:
                values[name] = validate(name, value)
            except (TypeError, ValueError) as error:
                raise ModelFormatError(
                    f"The model's generation_config is not valid: {error}. "
                    f"Correct the file, or take {name!r} out of it."
                ) from error
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to choose a token at random. The defaults are neutral: the model's distribution.

    Attributes:
        temperature: Above 0.
        top_k: 0 is off.
        top_p: 1 is off.
        min_p: 0 is off.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedParams:
    """Parameters of a generation with nothing left to decide. Defaults are neutral.

    Attributes:
        sampling: How to choose a token at random, or None for greedy.
        max_new_tokens: None until a stop token or the context's end.

    The others are those of `GenerationParams` by the same names.
    """

    sampling: Sampling | None
    max_new_tokens: int | None
    min_new_tokens: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    no_repeat_ngram_size: int
    logit_bias: Mapping[int, float]
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    suppress_tokens: tuple[int, ...]
    ignore_eos: bool
    logprobs: int | None
    logits_processors: tuple[LogitsProcessor, ...]
    prompt_lookup_num_tokens: int | None
    num_beams: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
    n: int


def resolve(params: GenerationParams, defaults: GenerationDefaults | None = None) -> ResolvedParams:
    """Lay the caller's parameters over the model's own.

    Whether to sample is decided by the first of these that says anything:

    1. the caller's do_sample;
    2. the caller's temperature: above 0 samples, 0 is greedy (top_k, top_p and min_p
       then hold trivially, because each keeps the most probable token);
    3. the caller's top_k, top_p or min_p, where it restricts anything: samples, for it
       would otherwise be silently ignored;
    4. the model's do_sample, true unless the model's temperature is 0; absent is greedy.

    When the request samples, what the caller left unset comes from the model's
    temperature, top_k, top_p and min_p only if the model's own do_sample is true (with
    do_sample false such values are a class's defaults written out, not advice), else it
    is neutral. The model's repetition_penalty holds either way. What a generation_config
    says about beams is not taken: it would end every stream of that model.

    Raises:
        ValueError: Beam search is asked for and the request samples, or several sequences
            without beams and it is greedy.
    """
    defaults = defaults if defaults is not None else GenerationDefaults()
    sampling = _sampling(params, defaults)
    _check_several(params, samples=sampling is not None)
    return ResolvedParams(
        sampling=sampling,
        max_new_tokens=params.max_new_tokens,
        min_new_tokens=params.min_new_tokens or 0,
        repetition_penalty=_first(params.repetition_penalty, defaults.repetition_penalty, 1.0),
        presence_penalty=params.presence_penalty or 0.0,
        frequency_penalty=params.frequency_penalty or 0.0,
        no_repeat_ngram_size=params.no_repeat_ngram_size or 0,
        logit_bias=params.logit_bias,
        stop=(params.stop,) if isinstance(params.stop, str) else tuple(params.stop),
        stop_token_ids=tuple(params.stop_token_ids),
        suppress_tokens=tuple(params.suppress_tokens),
        ignore_eos=bool(params.ignore_eos),
        logprobs=params.logprobs,
        logits_processors=tuple(params.logits_processors),
        prompt_lookup_num_tokens=params.prompt_lookup_num_tokens,
        num_beams=params.num_beams or 1,
        length_penalty=_first(params.length_penalty, 1.0),
        early_stopping=_first(params.early_stopping, False),
        n=params.n or 1,
    )


def _sampling(params: GenerationParams, defaults: GenerationDefaults) -> Sampling | None:
    model_samples = defaults.do_sample is True and defaults.temperature != 0
    if not _samples(params, model_samples=model_samples):
        return None
    advice = defaults if model_samples else GenerationDefaults()
    neutral = Sampling()
    return Sampling(
        **{
            item.name: _first(
                getattr(params, item.name), getattr(advice, item.name), getattr(neutral, item.name)
            )
            for item in fields(Sampling)
        }
    )


def _check_several(params: GenerationParams, *, samples: bool) -> None:
    beams, count = params.num_beams or 1, params.n or 1
    if beams > 1 and samples:
        neutral = {"temperature": 0, "top_k": 0, "top_p": 1, "min_p": 0}
        given = {name: getattr(params, name) for name in neutral}
        asked = [f"{k}={v}" for k, v in given.items() if v is not None and v != neutral[k]]
        why = f"{', '.join(asked)} samples" if asked else "the model's generation_config samples"
        raise ValueError(
            f"num_beams={beams} is beam search, which does not sample, and {why}. "
            f"{'Leave one of them out' if asked else 'Add do_sample=False'}"
        )
    if beams == 1 and count > 1 and not samples:
        raise ValueError(
            f"n={count} without sampling would be {count} times the same greedy sequence: give a "
            "temperature above 0, or num_beams for the best of a beam search"
        )


def _samples(params: GenerationParams, *, model_samples: bool) -> bool:
    if params.do_sample is not None:
        return params.do_sample
    if params.temperature is not None:
        return params.temperature > 0
    restricts = params.top_k or params.min_p or (params.top_p is not None and params.top_p < 1)
    return bool(restricts) or model_samples


def _first(*values: _T | None) -> _T:
    """The first that is set."""
    return next(value for value in values if value is not None)
