"""Several generations of one prompt as text: the best of a beam search, or samples."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

from phirt.generation.several import Completion, SeveralSequences
from phirt.generation.timings import Usage
from phirt.stream import Generation, token_logprobs
from phirt.text.detokenizer import StreamingDetokenizer
from phirt.text.stop_strings import StopStrings
from phirt.text.tokenizer import Tokenizer

__all__ = ["generate_several"]


def generate_several(
    request: SeveralSequences, tokenizer: Tokenizer, *, prompt_length: int, load_s: float
) -> Generation:
    """Run a request for several sequences.

    Args:
        request: The request, not yet run.
        tokenizer: The model's.
        prompt_length: Tokens of the prompt.
        load_s: Seconds that loading the model took.

    Returns:
        The best, or the first sample; the others are its ``alternatives``.
    """
    stops = request.stop_strings
    completions = request.run(_Text(tokenizer, stops))
    first, *others = (
        _generation(completion, tokenizer, stops, prompt_length=prompt_length, load_s=load_s)
        for completion in completions
    )
    return replace(first, alternatives=tuple(others))


class _Text:
    """The text of a sequence as it grows, up to a stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._detokenizer = StreamingDetokenizer(tokenizer)
        self._stops = StopStrings(stops)
        self._watches = bool(stops)

    @property
    def matched(self) -> str | None:
        """The stop string that was found, or None."""
        return self._stops.matched

    def add(self, token_id: int) -> bool:
        """Take in a token, and say whether a stop string is complete with it."""
        if not self._watches:
            return False
        self.push(token_id)
        return self.matched is not None

    def push(self, token_id: int) -> str:
        """Take in a token, and return the text that is final with it."""
        return self._stops.add(self._detokenizer.add(token_id))[0]

    def flush(self) -> str:
        """The rest of the text: no token follows."""
        if self.matched is not None:
            return ""
        text, matched = self._stops.add(self._detokenizer.flush())
        return text if matched is not None else text + self._stops.flush()

    def copy(self) -> _Text:
        """The same, to be continued otherwise."""
        if not self._watches:
            return self
        other: _Text = copy.copy(self)
        other._detokenizer = self._detokenizer.copy()
        other._stops = self._stops.copy()
        return other


def _generation(
    completion: Completion,
    tokenizer: Tokenizer,
    stops: Sequence[str],
    *,
    prompt_length: int,
    load_s: float,
) -> Generation:
    ids = [step.token_id for step in completion.steps]
    reason = completion.finish_reason
    growing = _Text(tokenizer, stops)
    # A stop token ends the text; it is no part of it, even where it spells something.
    pieces = [growing.push(token) for token in (ids[:-1] if reason == "stop" else ids)]
    text = "".join([*pieces, growing.flush()])
    stop: str | int | None = ids[-1] if reason == "stop" else None
    if growing.matched is not None:
        stop, reason = growing.matched, "stop_string"
    logprobs = [token_logprobs(step) for step in completion.steps]
    return Generation(
        text=text,
        token_ids=ids,
        finish_reason=reason,
        usage=Usage(prompt_tokens=prompt_length, cached_tokens=0, completion_tokens=len(ids)),
        timings=completion.watch.timings(
            load_s=load_s, prefilled_tokens=prompt_length, completion_tokens=len(ids)
        ),
        seed=completion.seed,
        stop=stop,
        logprobs=None if logprobs[0] is None else logprobs,
        score=completion.score,
    )
