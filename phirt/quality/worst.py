"""Where in a text two models differ most, as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from phirt.quality.divergence import Rows
from phirt.quality.report import WorstPosition
from phirt.quality.spans import Span
from phirt.text.tokenizer import Tokenizer

__all__ = ["Judged", "worst_positions"]

_SHOWN = 5
_BEFORE, _AFTER = 16, 6  # tokens that are shown around a position
_HALF = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for half a character


@dataclass(frozen=True, slots=True)
class Judged:
    """A span and what was found in it.

    Attributes:
        span: The span.
        first: Index among its tokens of the first that was predicted and judged.
        rows: What was found, one row for each token from there on.
    """

    span: Span
    first: int
    rows: Rows


def worst_positions(judged: Sequence[Judged], tokenizer: Tokenizer) -> tuple[WorstPosition, ...]:
    """The largest divergence of each of the spans that have the largest, worst first.

    Neighbours of one bad position are bad as well, so a span is shown once.
    """
    ranked = sorted(judged, key=lambda each: float(each.rows.kl.max()), reverse=True)
    return tuple(_position(each, tokenizer) for each in ranked[:_SHOWN])


def _position(judged: Judged, tokenizer: Tokenizer) -> WorstPosition:
    row = int(judged.rows.kl.argmax())
    index = judged.first + row
    ids = judged.span.token_ids
    context, rows = ids[:index], judged.rows
    start = max(0, index - _BEFORE)
    return WorstPosition(
        section=judged.span.section,
        position=judged.span.start + index,
        # Half a character at its end belongs to the token that completes it.
        before=_added(ids[:start], ids[start:index], tokenizer).rstrip(_HALF),
        token=_named(context, ids[index], tokenizer),
        after=_added(ids[: index + 1], ids[index + 1 : index + 1 + _AFTER], tokenizer),
        reference_token=_named(context, int(rows.reference_ids[row]), tokenizer),
        reference_probability=float(rows.reference_peaks[row]),
        candidate_token=_named(context, int(rows.candidate_ids[row]), tokenizer),
        candidate_probability=float(rows.candidate_peaks[row]),
        kl=float(rows.kl[row]),
    )


def _named(context: Sequence[int], token: int, tokenizer: Tokenizer) -> str:
    """The text that a token adds; where that is no whole character, the tokenizer's spelling."""
    text = _added(context, [token], tokenizer)
    return text if text.strip(_HALF) else tokenizer.id_to_token(token) or f"<{token}>"


def _added(context: Sequence[int], more: Sequence[int], tokenizer: Tokenizer) -> str:
    """What tokens add to the text of those before: decoders look at what stands beside."""
    # A special token that is predicted (the end of a text) is worth seeing.
    before = tokenizer.decode(context, skip_special_tokens=False)
    whole = tokenizer.decode([*context, *more], skip_special_tokens=False)
    return whole[_same(before, whole) :]


def _same(one: str, other: str) -> int:
    """Characters with which both begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
