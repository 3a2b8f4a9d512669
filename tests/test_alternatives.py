"""Beams and samples as text, over a real runtime and a tiny random model."""

from __future__ import annotations

import pytest

import phirt

BEAMS = {"num_beams": 4, "max_new_tokens": 10}
SAMPLES = {"temperature": 1.0, "seed": 3, "max_new_tokens": 12}


class TestBeams:
    def test_one_generation_whose_alternatives_are_the_others(self, tiny_model):
        best = tiny_model.generate("hello", **BEAMS, n=3)
        assert len(best.alternatives) == 2
        scores = [best.score, *(other.score for other in best.alternatives)]
        assert scores == sorted(scores, reverse=True)
        assert all(other.alternatives == () for other in best.alternatives)
        assert tiny_model.generate("hello", **BEAMS).alternatives == ()

    def test_text_usage_and_timings(self, tiny_model):
        prompt = tiny_model.tokenizer.encode("hello")
        best = tiny_model.generate(prompt, **BEAMS, n=2)
        for found in (best, *best.alternatives):
            assert found.text == tiny_model.tokenizer.decode(found.token_ids)
            assert found.usage.prompt_tokens == len(prompt)
            assert found.usage.completion_tokens == len(found.token_ids) == 10
            assert found.finish_reason == "length"
            assert found.timings.ttft_s > 0
            assert found.timings.decode_tokens_per_s > 0
            assert found.failovers == ()

    def test_the_score_is_that_of_the_tokens(self, tiny_model):
        prompt = tiny_model.tokenizer.encode("hello World")
        best = tiny_model.generate(prompt, **BEAMS, length_penalty=0.0)
        logprobs = tiny_model.score([*prompt, *best.token_ids])[len(prompt) - 1 :]
        assert best.score == pytest.approx(float(logprobs.sum()), abs=1e-4)

    def test_it_is_at_least_as_probable_as_greedy(self, tiny_model):
        greedy = tiny_model.generate("hello", max_new_tokens=10, temperature=0, logprobs=0)
        best = tiny_model.generate("hello", **BEAMS, length_penalty=0.0, logprobs=0)
        total = sum(entry.logprob for entry in greedy.logprobs)
        assert best.score >= total - 1e-4
        assert best.score == pytest.approx(sum(entry.logprob for entry in best.logprobs), abs=1e-4)

    def test_a_stop_string_ends_a_beam_and_is_not_returned(self, tiny_model):
        free = tiny_model.generate("hello", **BEAMS)
        stop = free.text[3:5]
        best = tiny_model.generate("hello", **BEAMS, n=4, stop=[stop])
        ended = [g for g in (best, *best.alternatives) if g.finish_reason == "stop_string"]
        assert ended
        for found in ended:
            assert found.stop == stop
            whole = tiny_model.tokenizer.decode(found.token_ids)
            assert whole.startswith(found.text + stop)
        assert all(stop not in g.text for g in (best, *best.alternatives))

    def test_a_stop_token_ends_a_beam_and_is_no_text(self, tiny_model):
        free = tiny_model.generate("hello", **BEAMS)
        token = free.token_ids[4]
        # Below 0, so that the short ones are not displaced.
        best = tiny_model.generate(
            "hello", **BEAMS, n=4, stop_token_ids=[token], length_penalty=-1.0
        )
        ended = [g for g in (best, *best.alternatives) if g.finish_reason == "stop"]
        assert ended
        for found in ended:
            assert found.stop == found.token_ids[-1] == token
            assert found.text == tiny_model.tokenizer.decode(found.token_ids[:-1])

    def test_a_chat(self, tiny_model):
        found = tiny_model.generate([{"role": "user", "content": "hello"}], **BEAMS)
        assert found.usage.prompt_tokens > 1

    def test_rows_are_free_afterwards(self, tiny_model):
        # Other requests of this model have left caches that are kept.
        before = set(tiny_model.loaded._open_sessions)
        for _ in range(3):
            tiny_model.generate("hello", **BEAMS)
        assert set(tiny_model.loaded._open_sessions) <= before


class TestSamples:
    def test_the_first_is_the_one_of_n_1(self, tiny_model):
        several = tiny_model.generate("hello", **SAMPLES, n=3)
        assert several.token_ids == tiny_model.generate("hello", **SAMPLES).token_ids
        assert several.seed == 3
        assert several.score is None
        assert len(several.alternatives) == 2

    def test_each_is_repeated_by_its_seed(self, tiny_model):
        several = tiny_model.generate("hello", **SAMPLES, n=3)
        for found in several.alternatives:
            again = tiny_model.generate("hello", **{**SAMPLES, "seed": found.seed})
            assert again.token_ids == found.token_ids
            assert again.text == found.text

    def test_without_a_seed_one_is_drawn_that_repeats_all(self, tiny_model):
        options = {**SAMPLES, "n": 2}
        del options["seed"]
        first = tiny_model.generate("hello", **options)
        again = tiny_model.generate("hello", **options, seed=first.seed)
        assert again.token_ids == first.token_ids
        assert again.alternatives[0].token_ids == first.alternatives[0].token_ids

    def test_stop_strings_end_each_on_its_own(self, tiny_model):
        free = tiny_model.generate("hello", **SAMPLES, n=2)
        (other,) = free.alternatives
        stop = other.text[2:4]
        found = tiny_model.generate("hello", **SAMPLES, n=2, stop=stop).alternatives[0]
        assert found.finish_reason == "stop_string"
        assert found.text == other.text.partition(stop)[0]
        alone = tiny_model.generate("hello", **{**SAMPLES, "seed": other.seed}, stop=stop)
        assert (alone.text, alone.token_ids) == (found.text, found.token_ids)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"n": 2, "temperature": 1.0}])
def test_a_stream_is_refused(tiny_model, options):
    with pytest.raises(ValueError, match=r"cannot be streamed.*Use Model\.generate"):
        tiny_model.stream("hello", **options)
    with (
        tiny_model.stream("hello") as stream,
        pytest.raises(ValueError, match="cannot be streamed"),
    ):
        stream.params = phirt.GenerationParams(**options)


def test_params_of_another_type_are_refused(tiny_model):
    with pytest.raises(TypeError, match="params must be a GenerationParams, not dict"):
        tiny_model.generate("hello", params={"num_beams": 2})


def test_token_ids_beyond_the_vocabulary(tiny_model):
    with pytest.raises(ValueError, match="suppress_tokens holds token id 999999"):
        tiny_model.generate("hello", num_beams=2, suppress_tokens=[999_999])


def test_a_closed_model(tiny_gguf, tmp_path, monkeypatch):
    monkeypatch.setenv("PHIRT_HOME", str(tmp_path))
    with phirt.load(tiny_gguf, precision="fp32") as model:
        pass
    with pytest.raises(phirt.SessionClosedError, match="is closed"):
        model.generate("hello", num_beams=2)
