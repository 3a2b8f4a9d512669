"""What the benchmarks share: the default model, and its distance from fp32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import phirt

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
