"""What the benchmarks share: the default model, and its distance from fp32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import phirt
from benchmarks.bare_loop import BareLoop
from benchmarks.precision_table import TEXT, compare

PROMPT = [{"role": "user", "content": "Write a long story about a dragon and a princess."}]


@pytest.fixture(scope="session")
def model() -> Iterator[phirt.Model]:
    """The default model as a user loads it; PHIRT_HOME says where it is kept."""
    with phirt.load() as loaded:
        yield loaded


@pytest.fixture(scope="session")
def prompt_ids(model: phirt.Model) -> list[int]:
    """A short chat prompt."""
    return model.encode(PROMPT)


@pytest.fixture(scope="session")
def kl(model: phirt.Model) -> float:
    """Mean KL divergence of the model from fp32, with the kernels of decode, in nats.

    A speed says nothing without it: both sides of a comparison run this very model.
    """
    token_ids = model.encode(TEXT.read_text(encoding="utf-8"))[:600]
    reference = BareLoop(phirt.pull(precision="fp32")).logits(token_ids, chunk=256)
    return compare(reference, BareLoop(model.path).logits(token_ids, chunk=1), token_ids).kl_mean
