"""Streams of a real, tiny model, timed from threads."""

import pytest

from phirt.benchmark.streams import Case, prompt_of, time_streams
from phirt.errors import BackendRuntimeError, ContextLengthError


def test_prompts_are_varied_ids_of_the_vocabulary_and_differ_from_the_first_on():
    prompts = [prompt_of(number, 32, 300) for number in range(300)]
    assert len({prompt[0] for prompt in prompts}) == 300
    assert all(0 <= each < 300 for prompt in prompts for each in prompt)
    assert all(len(set(prompt)) > 20 for prompt in prompts)
    assert prompt_of(7, 32, 300) == prompts[7]
    assert prompt_of(300, 1, 300) == [0]


def test_every_stream_generates_as_many_tokens(tiny_model):
    case = Case(prompt_tokens=12, new_tokens=5, concurrency=3, number=4)
    found = time_streams(tiny_model, case)
    assert [len(gaps) for gaps in found.inter_token_s] == [4, 4, 4]
    for ttft, rate, gaps in zip(
        found.ttft_s, found.decode_tokens_per_s, found.inter_token_s, strict=True
    ):
        assert 0 < ttft < found.total_s
        assert rate == pytest.approx(4 / sum(gaps))
        assert ttft + sum(gaps) <= found.total_s + 1e-9
    assert len(found.prefill_tokens_per_s) == 3


def test_no_prompt_goes_on_from_another(tiny_model, monkeypatch):
    stream, seen = type(tiny_model).stream, []

    def keep(self, prompt, **given):
        seen.append(stream(self, prompt, **given))
        return seen[-1]

    monkeypatch.setattr(type(tiny_model), "stream", keep)
    for number in (0, 2, 4):
        case = Case(prompt_tokens=12, new_tokens=3, concurrency=2, number=number)
        time_streams(tiny_model, case)
    assert [each.result.usage.cached_tokens for each in seen] == [0] * 6


def test_what_fails_in_a_stream_is_raised(tiny_model):
    with pytest.raises(ContextLengthError):
        time_streams(tiny_model, Case(prompt_tokens=4000, new_tokens=2, concurrency=2, number=0))


def test_a_stream_that_ends_early_is_no_measurement(tiny_model, monkeypatch):
    stream = type(tiny_model).stream
    monkeypatch.setattr(
        type(tiny_model),
        "stream",
        lambda self, prompt, **given: stream(self, prompt, **given | {"max_new_tokens": 2}),
    )
    with pytest.raises(BackendRuntimeError, match="A stream of 5 tokens ended after 2: length"):
        time_streams(tiny_model, Case(prompt_tokens=4, new_tokens=5, concurrency=1, number=0))
