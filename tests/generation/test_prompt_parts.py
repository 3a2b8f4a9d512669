"""Parts of a prompt beside sequences that are generating."""

from __future__ import annotations

import pytest

from phirt.generation.prompt_parts import PromptParts


def settled(*, fixed_s: float, token_s: float, step_s: float) -> int:
    """The length that parts come to, where a part costs so much and each token so much."""
    parts = PromptParts()
    for _ in range(60):
        size = parts.size(10_000, step_s=step_s)
        parts.took(size, fixed_s + token_s * size)
    return parts.size(10_000, step_s=step_s)


def test_a_first_part_is_short():
    assert PromptParts().size(1000, step_s=0.02) == 4


@pytest.mark.parametrize("fixed_s", [0.0, 0.01, 0.025])
def test_a_part_takes_a_step_and_a_half(fixed_s):
    size = settled(fixed_s=fixed_s, token_s=0.001, step_s=0.02)
    assert fixed_s + 0.001 * size == pytest.approx(1.5 * 0.02, abs=0.002)


def test_two_tokens_at_least():
    assert settled(fixed_s=0.1, token_s=0.1, step_s=0.001) == 2


def test_a_slower_step_allows_longer_parts():
    assert settled(fixed_s=0.01, token_s=0.001, step_s=0.05) == pytest.approx(65, abs=2)


def test_a_clock_that_does_not_tick():
    parts = PromptParts()
    for _ in range(5):
        parts.took(parts.size(1000, step_s=0.0), 0.0)
    assert parts.size(1000, step_s=0.0) == 4


def test_one_stall_is_soon_forgotten():
    parts = PromptParts()
    for _ in range(40):
        size = parts.size(10_000, step_s=0.02)
        parts.took(size, 0.01 + 0.001 * size)
    parts.took(size, 1.0)
    for _ in range(6):
        size = parts.size(10_000, step_s=0.02)
        parts.took(size, 0.01 + 0.001 * size)
    assert parts.size(10_000, step_s=0.02) >= 10


def test_single_tokens_do_not_count():
    parts = PromptParts()
    parts.took(1, 5.0)
    assert parts.size(1000, step_s=0.02) == 4


def test_no_rest_of_one():
    parts = PromptParts()
    assert parts.size(5, step_s=0.02) == 5
    assert parts.size(6, step_s=0.02) == 4
    assert parts.size(3, step_s=0.02) == 3
