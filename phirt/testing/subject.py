"""One backend with one model, beside what the answers should be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from phirt.backends.reference.adapter import ReferenceBackend, ReferenceModel
from phirt.models.folder import read_folder
from phirt.protocols import (
    Backend,
    KVCache,
    LoadedModel,
    LoadOptions,
    Logits,
    ModelInfo,
    Session,
)
from phirt.testing.tiny_tokenizer import PAD_TOKEN_ID
from phirt.types import Artifact, FloatArray, IntArray

__all__ = ["Oracle", "Subject", "check_greedy", "empty_folder", "random_ids", "read_artifact"]


def random_ids(count: int, *, seed: int = 0) -> list[int]:
    """Token ids of the tiny tokenizer, special ones left out; the same for the same arguments."""
    ids: IntArray = np.random.default_rng(seed).integers(0, PAD_TOKEN_ID, count)
    return [int(token) for token in ids]


def read_artifact(backend: Backend, folder: Path) -> Artifact:
    """What ``backend`` is given to load from a folder."""
    return read_folder(folder, formats=backend.formats).artifact


def empty_folder(path: Path) -> Path:
    """A new folder."""
    path.mkdir(parents=True)
    return path


class Oracle:
    """The reference backend's answers about one checkpoint, each computed once.

    Args:
        checkpoint: A Hugging Face folder of a dense decoder.
    """

    def __init__(self, checkpoint: Path) -> None:
        backend = ReferenceBackend()
        artifact = read_artifact(backend, checkpoint)
        self.model: ReferenceModel = backend.load(artifact, "cpu", LoadOptions())
        self._known: dict[tuple[int, ...], FloatArray] = {}

    @property
    def info(self) -> ModelInfo:
        """What the reference says about the model."""
        return self.model.info

    def logits(self, ids: Sequence[int]) -> FloatArray:
        """Logits of every position, (n, vocab), from one pass over all ids without a cache.

        Under LongRoPE the number of ids decides the factors, for every position.
        """
        key = tuple(ids)
        if key not in self._known:
            session = self.model.new_session(max_length=len(key), expected_length=len(key))
            self._known[key] = session.verify(key).numpy()
            session.close()
        return self._known[key]

    def cache(self, ids: Sequence[int]) -> KVCache:
        """The KV cache after all ids."""
        session = self.model.new_session(max_length=len(ids), expected_length=len(ids))
        session.prefill(ids)
        cache = session.export_kv()
        session.close()
        return cache


@dataclass(frozen=True)
class Subject:
    """What a test of the suite is given.

    Attributes:
        backend: The adapter under test.
        device: Where it runs.
        architecture: Of the tiny checkpoint.
        artifact: What the adapter loaded.
        model: The loaded model.
        oracle: What the answers should be.
        tolerance: Most that a logit may differ.
        options: How it was loaded.
    """

    backend: Backend
    device: str
    architecture: str
    artifact: Artifact
    model: LoadedModel
    oracle: Oracle
    tolerance: float
    options: LoadOptions = field(default_factory=LoadOptions)

    @property
    def name(self) -> str:
        """Backend and model, for messages."""
        return f"{self.backend.name} x {self.architecture}"

    def reload(self) -> LoadedModel:
        """The same model, loaded once more."""
        return self.backend.load(self.artifact, self.device, self.options)

    @contextmanager
    def session(self, max_length: int, *, model: LoadedModel | None = None) -> Iterator[Session]:
        """A session for ``max_length`` tokens, closed at the end."""
        session = (model or self.model).new_session(
            max_length=max_length, expected_length=max_length
        )
        try:
            yield session
        finally:
            session.close()

    def assert_logits(self, actual: Logits | FloatArray, expected: FloatArray, what: str) -> None:
        """Fail unless logits are those expected, within `tolerance`.

        Args:
            actual: Shape (n, vocab).
            expected: Likewise.
            what: What was done, for the message.
        """
        values = actual if isinstance(actual, np.ndarray) else actual.numpy()
        if values.shape != expected.shape:
            raise AssertionError(
                f"{self.name}: {what}: logits of shape {values.shape}, not {expected.shape}"
            )
        difference = np.abs(values - expected)
        if not np.all(difference <= self.tolerance):  # Also where one of them is NaN.
            row, token = np.unravel_index(
                np.argmax(np.nan_to_num(difference, nan=np.inf)), difference.shape
            )
            wrong = int(np.count_nonzero(~(difference <= self.tolerance).all(axis=1)))
            raise AssertionError(
                f"{self.name}: {what}: {wrong} of {len(values)} rows differ by more than "
                f"{self.tolerance:g}; most in row {row} at token {token}: "
                f"{values[row, token]:.6g} instead of {expected[row, token]:.6g}"
            )

    def check(self, holds: bool, message: str) -> None:
        """Fail with backend and model before the message unless something holds."""
        if not holds:
            raise AssertionError(f"{self.name}: {message}")


def check_greedy(
    logits_of: Callable[[Sequence[int]], FloatArray],
    ids: Sequence[int],
    *,
    prompt_length: int,
    rope_boundary: int | None,
    tolerance: float,
) -> list[str]:
    """What is wrong with a greedy continuation: nothing, or one line per wrong token.

    A token is right if no other has a logit more than ``tolerance`` above its own, given
    the tokens before it. So a close call may go either way, and all later tokens count.

    Args:
        logits_of: Logits of every position (n, vocab), from one pass over n ids.
        ids: Prompt and continuation.
        prompt_length: Tokens of the prompt.
        rope_boundary: `ModelInfo.rope_boundary`: tokens up to it see the short factors only.
        tolerance: Largest gap that is a close call.
    """
    last = len(ids) - 1  # No logits after the last token are needed.
    whole = logits_of(ids[:last])
    short = whole
    if rope_boundary is not None and prompt_length <= rope_boundary < last:
        short = logits_of(ids[:rope_boundary])
    faults = []
    for position in range(prompt_length, len(ids)):
        row = (whole if rope_boundary is None or position > rope_boundary else short)[position - 1]
        gap = float(row.max() - row[ids[position]])
        if not gap <= tolerance:
            faults.append(
                f"token {position - prompt_length + 1} (position {position}) is {ids[position]}, "
                f"{gap:.4g} below {int(row.argmax())}"
            )
    return faults
