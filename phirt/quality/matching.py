"""Whether two models can be compared: whether one token id means the same to both."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest

from phirt.errors import UnsupportedModelError
from phirt.model import Model

__all__ = ["shared_vocabulary"]


def shared_vocabulary(reference: Model, candidate: Model, sections: Mapping[str, str]) -> int:
    """Number of logits that both models have for the same tokens.

    One of them may have more: exports pad a vocabulary to a multiple of some number. What is
    padded has no token, and is left out.

    Raises:
        UnsupportedModelError: Their tokenizers differ, or one has fewer logits than the other
            and than the tokenizer has tokens; the message says in what.
    """
    names = f"{reference.name!r} and {candidate.name!r} cannot be compared"
    theirs, ours = reference.tokenizer, candidate.tokenizer
    if theirs.vocab_size != ours.vocab_size:
        raise UnsupportedModelError(
            f"{names}: the tokenizer of the reference has {theirs.vocab_size:,} tokens, that of "
            f"the candidate {ours.vocab_size:,}. Divergence is over one vocabulary; compare "
            "forms of one model."
        )
    for token in range(theirs.vocab_size):
        expected, found = theirs.id_to_token(token), ours.id_to_token(token)
        if expected != found:
            raise UnsupportedModelError(
                f"{names}: token {token} is {expected!r} to the tokenizer of the reference, and "
                f"{found!r} to that of the candidate. Compare forms of one model."
            )
    for name, text in sections.items():
        pairs = zip_longest(theirs.encode(text), ours.encode(text))
        place = next((i for i, (expected, found) in enumerate(pairs) if expected != found), None)
        if place is not None:
            raise UnsupportedModelError(
                f"{names}: their tokenizers have the same tokens, and cut the text {name!r} "
                f"differently from token {place} on. One of the tokenizer.json is not that of "
                "the model."
            )
    sizes = reference.loaded.info.vocab_size, candidate.loaded.info.vocab_size
    shared = min(sizes)
    if sizes[0] != sizes[1] and shared < theirs.vocab_size:
        raise UnsupportedModelError(
            f"{names}: the reference has {sizes[0]:,} logits, the candidate {sizes[1]:,}, and "
            f"the tokenizer {theirs.vocab_size:,} tokens. That is more than padding."
        )
    return shared
