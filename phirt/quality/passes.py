"""Runs a reference and a candidate over the same tokens, and holds their logits together.

Runtimes multiply one row of activations (a step of decoding) with another kernel than many (a
prompt), and a fault or a rounding may be in one of them only. So a candidate is run with both:
``many_rows`` gives logits of every position of a chunk (capability ``verify``), ``one_row``
decodes token by token. The reference is run once, with its many-row kernels, and both are held
against it; only where it lacks ``verify`` it decodes, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal, TypeAlias

import numpy as np

from phirt.errors import ContextLengthError, NonFiniteLogitsError, UnsupportedModelError
from phirt.generation.forward import SMALLEST_CHUNK, split_prompt
from phirt.protocols import LoadedModel, Session
from phirt.quality.divergence import Rows, compare_rows, join_rows
from phirt.quality.figures import Figures, figures_of
from phirt.types import FloatArray

__all__ = [
    "CHUNK",
    "KERNELS",
    "Kernel",
    "compare_pass",
    "compare_tokens",
    "lack_of_verify",
    "longest_pass",
]

Kernel: TypeAlias = Literal["many_rows", "one_row"]
"""Which of a runtime's kernels are run."""

KERNELS: tuple[Kernel, ...] = ("many_rows", "one_row")
"""Both, in the order in which they are reported."""

CHUNK = 128
"""Positions whose logits exist at once, on either side: 4 bytes times the vocabulary for each."""


class _Side:
    """One of the two, run over the tokens from the first to the last.

    Args:
        session: An empty session, which has room for all of them.
        who: What errors call it.
        vocabulary: Logits that are compared.
    """

    def __init__(self, session: Session, who: str, vocabulary: int) -> None:
        self.session = session
        self._who = who
        self._vocabulary = vocabulary

    def verify(self, token_ids: Sequence[int]) -> FloatArray:
        """Logits of each of these tokens, by the many-row kernels, until the next call."""
        first = self.session.length
        return self._checked(self.session.verify(token_ids).numpy(), first)

    def decode(self, token_ids: Sequence[int]) -> FloatArray:
        """Logits of each of these tokens, by the one-row kernels."""
        rows = np.empty((len(token_ids), self._vocabulary), np.float32)
        for row, token in enumerate(token_ids):
            first = self.session.length
            # To an empty cache a token is a prompt, and of one row.
            logits = self.session.decode(token) if first else self.session.prefill([token])
            rows[row] = self._checked(logits.numpy(), first)[0]
        return rows

    def _checked(self, logits: FloatArray, first: int) -> FloatArray:
        shared = logits[:, : self._vocabulary]
        if np.isfinite(shared).all():
            return shared
        row, token = np.argwhere(~np.isfinite(shared))[0]
        raise NonFiniteLogitsError(
            f"The {self._who} computed a logit of {shared[row, token]} for token {token} after "
            f"{first + row + 1} tokens: it is broken, and nothing can be compared. Check its "
            "weights and precision, and the device's driver."
        )


def longest_pass(*models: LoadedModel) -> int:
    """Most tokens that `compare_pass` takes of these models.

    It stays within LongRoPE's short factors, as a session of the long ones begins with more
    tokens than can be decoded one by one.
    """
    limits = (
        (model.info.context_length, model.info.rope_boundary or model.info.context_length)
        for model in models
    )
    # The last token is only predicted.
    return min(map(min, limits)) + 1


def compare_tokens(
    reference: LoadedModel,
    candidate: LoadedModel,
    token_ids: Sequence[int],
    *,
    kernel: Kernel = "many_rows",
) -> Figures:
    """Compare two loaded models on token ids, in one pass.

    Args:
        reference: What the candidate is held against.
        candidate: What is judged.
        token_ids: n ids, at least two; every position but the last is judged, n - 1.
        kernel: The candidate's kernels. The reference runs many rows where it can.

    Raises:
        ValueError: Fewer than two tokens, or an id outside the vocabulary of either.
        ContextLengthError: More tokens than `longest_pass`.
        UnsupportedModelError: ``many_rows`` of a candidate without the capability ``verify``.
        NonFiniteLogitsError: A model computed NaN or infinity.
    """
    if kernel == "many_rows" and not candidate.capabilities.verify:
        raise UnsupportedModelError(
            f"The candidate cannot be run with many rows: {lack_of_verify(candidate)}. Compare "
            "with kernel='one_row'."
        )
    decoded = {"many_rows": 0, "one_row": len(token_ids)}[kernel]
    rows = compare_pass(reference, candidate, token_ids, decoded=decoded, many=not decoded)
    return figures_of([rows[kernel]])


def lack_of_verify(model: LoadedModel) -> str:
    """Why a model lacks the capability ``verify``, in one sentence without its full stop."""
    return model.capabilities.lacks["verify"].reason.rstrip(".")


def compare_pass(
    reference: LoadedModel,
    candidate: LoadedModel,
    token_ids: Sequence[int],
    *,
    decoded: int,
    many: bool = True,
    skipped: int = 0,
    vocabulary: int | None = None,
) -> Mapping[Kernel, Rows]:
    """Run two models over tokens once, and compare what they predict at each.

    Args:
        reference: What the candidate is held against.
        candidate: What is judged.
        token_ids: n ids, of which the last is only predicted.
        decoded: The last positions that the candidate decodes one by one, after a prefill of
            those before, as in an answer to a prompt; 0 for none, n for all.
        many: Whether the candidate is run with many rows, too.
        skipped: Positions at the beginning that are run and not judged.
        vocabulary: Logits that are compared; None for those that both have.

    Returns:
        What was found by each kernel that was run, at positions ``skipped`` to n - 2, or the
        last of these that were decoded.

    Raises:
        ValueError: Nothing is left to judge, or an id is outside the vocabulary.
        ContextLengthError: More tokens than `longest_pass`.
        NonFiniteLogitsError: A model computed NaN or infinity.
    """
    count = len(token_ids) - 1
    shared = vocabulary or min(reference.info.vocab_size, candidate.info.vocab_size)
    _check(token_ids, shared=shared, limit=longest_pass(reference, candidate), skipped=skipped)
    targets = np.array(token_ids[1:], np.int64)
    first_decoded = max(skipped, count - decoded)
    found: dict[Kernel, list[Rows]] = {"many_rows": [], "one_row": []}
    with ExitStack() as stack:

        def side(model: LoadedModel, who: str) -> _Side:
            return _Side(stack.enter_context(_session(model, count)), who, shared)

        judge = side(reference, "reference")
        many_side = side(candidate, "candidate") if many else None
        one_side = side(candidate, "candidate") if decoded else None
        run_judge = judge.verify if reference.capabilities.verify else judge.decode
        sides = filter(None, (judge, many_side, one_side))
        chunk = CHUNK if all(each.session.can_extend for each in sides) else count
        start = 0
        for size in split_prompt(count, max(chunk, SMALLEST_CHUNK)):
            ids, ahead = token_ids[start : start + size], targets[start : start + size]
            expected = run_judge(ids)
            low = min(max(skipped - start, 0), size)
            if many_side is not None:
                given = many_side.verify(ids)
                found["many_rows"].append(compare_rows(expected[low:], given[low:], ahead[low:]))
            low = min(max(first_decoded - start, 0), size)
            if one_side is not None:
                if low:
                    one_side.session.prefill(ids[:low])
                given = one_side.decode(ids[low:])
                found["one_row"].append(compare_rows(expected[low:], given, ahead[low:]))
            start += size
    return {kernel: join_rows(parts) for kernel, parts in found.items() if parts}


@contextmanager
def _session(model: LoadedModel, length: int) -> Iterator[Session]:
    session = model.new_session(max_length=length, expected_length=length)
    try:
        yield session
    finally:
        session.close()


def _check(token_ids: Sequence[int], *, shared: int, limit: int, skipped: int) -> None:
    count = len(token_ids)
    if count < skipped + 2:
        raise ValueError(f"Comparing needs at least {skipped + 2} tokens; there are {count}.")
    if min(token_ids) < 0 or max(token_ids) >= shared:
        raise ValueError(
            f"Token {max(token_ids)} is outside the {shared} logits that both models have."
        )
    if count > limit:
        raise ContextLengthError(
            f"The text has {count} tokens; the most that both models take at once is {limit}. "
            "Compare it in parts.",
            required=count,
            available=limit,
        )
