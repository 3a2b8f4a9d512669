"""The merges of a BPE vocabulary, read from a file or recovered from its scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from phirt.errors import ModelFormatError

__all__ = ["merges_from_scores", "parse_merges"]

# Cutting a piece in two everywhere costs the square of its length; vocabularies hold runs of
# a few hundred spaces at most.
_MAX_PIECE = 1024


def parse_merges(
    lines: Sequence[str], vocab: Mapping[str, int], *, name: str
) -> list[tuple[str, str]]:
    """Split merges written as ``"left right"``.

    Args:
        lines: The merges, best first.
        vocab: Ids by token.
        name: What messages call the file.

    Raises:
        ModelFormatError: A merge is not a pair, or a part of it or its result is no token.
    """
    merges: list[tuple[str, str]] = []
    for index, line in enumerate(lines):
        left, _, right = line.partition(" ")
        parts = left in vocab and right in vocab and left and right
        if not parts or left + right not in vocab:
            raise ModelFormatError(
                f"{name}: merge {index:,}, {line!r:.80}, does not join two tokens of the "
                "vocabulary to a third. Use another file."
            )
        merges.append((left, right))
    return merges


def merges_from_scores(
    vocab: Mapping[str, int], scores: NDArray[np.float32], *, name: str
) -> list[tuple[str, str]]:
    """The merges that a SentencePiece BPE vocabulary implies, best first.

    SentencePiece joins the two neighbours whose joined piece scores highest, so every way to
    cut a piece into two pieces is a merge, ranked by the piece's score. Ties are broken as
    `transformers` breaks them (`generate_merges`): longer left part, then longer right part,
    first; then by the order of pieces, of left parts and of right parts in the vocabulary.

    Args:
        vocab: Ids by token.
        scores: Score of every id, shape (len(vocab),).
        name: What messages call the file.

    Raises:
        ModelFormatError: A score is not finite, or a piece is absurdly long.
    """
    if not np.isfinite(scores).all():
        raise ModelFormatError(f"{name}: a token's score is NaN or infinite. Use another file.")
    ranked: list[tuple[float, int, int, int, int, int, str, str]] = []
    for piece, index in vocab.items():
        if len(piece) > _MAX_PIECE:
            raise ModelFormatError(
                f"{name}: token {index:,} has {len(piece):,} characters, more than {_MAX_PIECE:,}."
            )
        score = float(scores[index])
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                ids = (index, vocab[left], vocab[right])
                ranked.append((-score, -cut, cut - len(piece), *ids, left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]
