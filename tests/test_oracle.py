"""The whole library, from GGUF file to tokens, against transformers on the same file."""

from __future__ import annotations

import pytest

import phirt

PROMPTS = {
    "a question": "What is the capital of France?",
    "code": "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "prose": "The old lighthouse keeper walked down the stairs and looked at the sea. " * 18,
}

pytestmark = [pytest.mark.model, pytest.mark.oracle, pytest.mark.slow]


@pytest.fixture(scope="module")
def exact_model(model_home, smollm2_gguf):
    """The default model in fp32, as a user loads it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PHIRT_HOME", str(model_home))
        with phirt.load(precision="fp32") as model:
            yield model


@pytest.mark.parametrize("name", PROMPTS)
def test_64_greedy_tokens_are_identical(exact_model, smollm2_oracle, name):
    import torch

    ids = exact_model.encode(PROMPTS[name])
    ends = sorted(exact_model._loaded.info.eos_token_ids)
    theirs = smollm2_oracle.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        do_sample=False,
        min_new_tokens=64,
        max_new_tokens=64,
        eos_token_id=ends,
    )[0, len(ids) :].tolist()
    ours = exact_model.generate(ids, min_new_tokens=64, max_new_tokens=64)
    assert ours.token_ids == theirs


def test_scores_are_those_of_transformers(exact_model, smollm2_oracle):
    import torch

    ids = exact_model.encode(PROMPTS["prose"])
    with torch.no_grad():
        logits = smollm2_oracle(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = [float(logits[i, token]) for i, token in enumerate(ids[1:])]
    assert exact_model.score(ids) == pytest.approx(expected, abs=1e-3)
