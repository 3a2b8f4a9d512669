"""The default model in fp32 gives the same answers on every runtime, greedy and sampled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

import phirt
from phirt.generation.params_resolved import resolve
from phirt.generation.sampling import choose_token
from phirt.generation.sampling_random import RandomStream
from phirt.types import FloatArray

pytestmark = [pytest.mark.model, pytest.mark.oracle, pytest.mark.slow]

FIRST = "onnxruntime"
OTHERS = ["onnxruntime-genai", "openvino", "mlx", "transformers"]
CHAT = [{"role": "user", "content": "Write a long story about a dragon and a princess."}]
SEEDS = range(20)
SAMPLED = phirt.GenerationParams(temperature=0.8, top_p=0.95, max_new_tokens=16)
TOLERANCE = 1e-3  # of logits, which is what "equal" means in fp32


@contextmanager
def loaded(backend: str, home: object) -> Iterator[phirt.Model]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PHIRT_HOME", str(home))
        with phirt.load(backend=backend, precision="fp32") as model:
            yield model


def greedy(model: phirt.Model) -> list[int]:
    return model.generate(CHAT, max_new_tokens=64, min_new_tokens=64).token_ids


def sampled(model: phirt.Model) -> dict[int, list[int]]:
    return {
        seed: model.generate(CHAT, params=SAMPLED, seed=seed, ignore_eos=True).token_ids
        for seed in SEEDS
    }


@pytest.fixture(scope="module")
def first(model_home, smollm2_gguf):
    with loaded(FIRST, model_home) as model:
        yield model


@pytest.fixture(scope="module")
def expected(first):
    return greedy(first), sampled(first)


def logits_after(model: phirt.Model, ids: list[int]) -> FloatArray:
    """Logits after a prompt, as the decode loop gets them."""
    session = model._loaded.new_session(max_length=len(ids), expected_length=len(ids))
    try:
        row: FloatArray = session.prefill(ids).numpy()[-1].copy()
        return row
    finally:
        session.close()


@pytest.mark.parametrize("backend", OTHERS)
def test_one_answer(backend, first, expected, model_home):
    tokens, texts = expected
    with loaded(backend, model_home) as model:
        assert (model.backend, model.precision) == (backend, "fp32")
        assert greedy(model) == tokens
        found = sampled(model)
        differing = [seed for seed in SEEDS if found[seed] != texts[seed]]
        for seed in differing:
            check_boundary(seed, found[seed], texts[seed], model, first)
    assert len(differing) <= len(SEEDS) // 20


def check_boundary(seed, found, expected, model, first):
    """Logits within the tolerance chose two tokens with one number: it lies on a boundary."""
    position = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
    prefix = model.encode(CHAT) + expected[:position]
    ours, theirs = logits_after(model, prefix), logits_after(first, prefix)
    assert np.abs(ours - theirs).max() < TOLERANCE
    sampling = resolve(SAMPLED, model.generation_defaults).sampling
    number = RandomStream(seed).uniform(position)
    assert choose_token(ours, sampling, number) == found[position]
    assert choose_token(theirs, sampling, number) == expected[position]
