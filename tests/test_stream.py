"""Streams: text, stop strings and the many ways to end."""

from __future__ import annotations

import gc
import threading

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from phirt.errors import BackendRuntimeError
from phirt.generation.loop import DecodeLoop
from phirt.generation.params import GenerationParams
from phirt.generation.params_resolved import GenerationDefaults
from phirt.stream import TokenStream
from phirt.text.tokenizer import Tokenizer
from tests.fakes import FakeModel, scripted

END = 256  # the special token of the tokenizer below


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """One token per byte, and one special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: index for index, char in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    backend.save(str(path))
    return Tokenizer.from_file(path)


@pytest.fixture
def make(tokenizer):
    """A stream that will say ``text`` and then the end token."""

    def make(text, *, model_options=None, **params):
        prompt = tokenizer.encode("p")
        script = [*(text if isinstance(text, list) else tokenizer.encode(text)), END]
        options = {"vocab": 257, "context_length": 10_000, "eos": [END], **(model_options or {})}
        model = FakeModel(scripted(257, len(prompt), script), **options)
        loop = DecodeLoop(model, prompt, GenerationParams(**params), defaults=GenerationDefaults())
        return model, TokenStream(loop, tokenizer, load_s=0.5)

    return make


def texts(stream):
    return [token.text for token in stream]


class TestText:
    def test_tokens_come_one_by_one_and_add_up(self, make):
        _, stream = make("abc")
        assert texts(stream) == ["a", "b", "c", ""]
        assert stream.result.text == "abc"
        assert stream.result.finish_reason == "stop"
        assert stream.result.stop == END

    def test_a_character_of_several_tokens_comes_whole(self, make):
        _, stream = make("a😀b")
        assert texts(stream) == ["a", "", "", "", "😀", "b", ""]

    def test_the_stop_token_counts_and_is_no_part_of_the_text(self, make, tokenizer):
        _, stream = make("ab", stop_token_ids=tokenizer.encode("b"))
        list(stream)
        result = stream.result
        assert result.text == "a"
        assert result.token_ids == tokenizer.encode("ab")
        assert result.usage.completion_tokens == 2

    def test_an_unfinished_character_at_the_end_is_a_replacement_character(self, make):
        _, stream = make("a😀", max_new_tokens=3)
        assert "".join(texts(stream)) == stream.result.text == "a�"

    def test_timings_carry_the_time_of_the_load(self, make):
        _, stream = make("a")
        list(stream)
        assert stream.result.timings.load_s == 0.5


class TestStopStrings:
    def test_a_stop_string_over_several_tokens_never_leaks(self, make):
        model, stream = make("one STOP two", stop=["STOP"])
        assert "".join(texts(stream)) == "one "
        result = stream.result
        assert (result.text, result.finish_reason, result.stop) == ("one ", "stop_string", "STOP")
        assert model.sessions_open == 0

    def test_generation_ends_with_the_token_that_completes_it(self, make):
        _, stream = make("ab!cd", stop="!")
        list(stream)
        assert stream.result.usage.completion_tokens == 3

    def test_what_was_held_back_is_told_if_it_was_no_stop_string(self, make):
        _, stream = make("abST", stop=["STOP"])
        assert "".join(texts(stream)) == stream.result.text == "abST"
        assert stream.result.finish_reason == "stop"

    def test_a_stop_string_in_the_last_token_allowed_wins_over_length(self, make):
        _, stream = make("ab!", stop="!", max_new_tokens=3)
        list(stream)
        assert stream.result.finish_reason == "stop_string"

    def test_one_that_waited_on_a_longer_one_counts_at_the_end(self, make):
        _, stream = make("abcd", stop=["bcdef", "cd"])
        assert "".join(texts(stream)) == stream.result.text == "ab"
        assert (stream.result.finish_reason, stream.result.stop) == ("stop_string", "cd")

    def test_new_stop_strings_judge_what_is_held_back(self, make):
        _, stream = make("abXYcd", stop=["XYZ"])
        seen = [next(stream).text for _ in range(4)]
        assert "".join(seen) == "ab"
        stream.params = stream.params.merge(stop=["XYc"])
        assert "".join(texts(stream)) == ""
        assert stream.result.text == "ab"
        assert stream.result.stop == "XYc"

    def test_a_match_that_waits_is_judged_again_under_new_stop_strings(self, make):
        _, stream = make("abcdxyz", stop=["bcdef", "cd"])
        seen = [next(stream).text for _ in range(4)]
        stream.params = stream.params.merge(stop=["y"])
        assert "".join([*seen, *texts(stream)]) == stream.result.text == "abcdx"

    def test_text_held_back_under_old_stop_strings_is_not_lost(self, make):
        _, stream = make("abXYcd", stop=["XYZ"])
        seen = [next(stream).text for _ in range(4)]
        stream.params = stream.params.merge(stop=())
        assert "".join([*seen, *texts(stream)]) == "abXYcd"


class TestTextHeldBack:
    """What is held back is part of the result, however the stream ended."""

    def test_after_close(self, make):
        _, stream = make("abST", stop=["STOP"])
        seen = [next(stream).text for _ in range(4)]
        stream.close()
        assert "".join(seen) == "ab"
        assert stream.result.text == stream.result.text == "abST"
        assert stream.result.finish_reason == "cancelled"

    def test_after_the_limit_was_lowered(self, make):
        _, stream = make("abSTuv", stop=["STOP"])
        for _ in range(4):
            next(stream)
        stream.params = stream.params.merge(max_new_tokens=3)
        assert texts(stream) == []
        assert (stream.result.text, stream.result.finish_reason) == ("abST", "length")

    def test_after_an_error(self, make):
        _, stream = make("a😀b", model_options={"fail_at": 4})
        with pytest.raises(BackendRuntimeError):
            list(stream)
        assert stream.result.text == "a\ufffd"
        assert stream.result.finish_reason == "error"


class TestEnding:
    def test_the_result_of_a_stream_that_goes_on_is_an_error(self, make):
        _, stream = make("abc")
        next(stream)
        with pytest.raises(RuntimeError, match=r"close\(\)"):
            stream.result  # noqa: B018 - the property raises

    def test_closing_keeps_what_was_produced(self, make):
        model, stream = make("abc")
        next(stream)
        stream.close()
        stream.close()
        assert stream.result.text == "a"
        assert stream.result.finish_reason == "cancelled"
        assert list(stream) == []
        assert model.sessions_open == 0

    def test_leaving_the_context_closes_it(self, make):
        model, stream = make("abc")
        with stream:
            next(stream)
        assert model.sessions_open == 0

    def test_an_error_keeps_what_was_produced(self, make):
        model, stream = make("abc", model_options={"fail_at": 3})
        seen = [next(stream).text, next(stream).text]
        with pytest.raises(BackendRuntimeError):
            next(stream)
        assert stream.result.finish_reason == "error"
        assert stream.result.text == "".join(seen) == "ab"
        assert model.sessions_open == 0

    def test_dropping_it_frees_the_session(self, make):
        """Row L2."""
        model, stream = make("abc")
        next(stream)
        assert model.sessions_open == 1
        del stream
        gc.collect()
        assert model.sessions_open == 0

    def test_500_dropped_or_closed_streams_leave_nothing(self, make):
        """Row L2: no thread, no session."""
        threads = threading.active_count()
        for index in range(500):
            model, stream = make("abc")
            next(stream)
            if index % 2:
                stream.close()
            del stream
            assert model.sessions_open == 0
        assert threading.active_count() == threads

    def test_closing_from_another_thread_ends_a_running_step(self, make):
        """Row L2."""
        model, stream = make("abc", model_options={"stall": True})
        seen = []
        reader = threading.Thread(target=lambda: seen.extend(stream))
        reader.start()
        while not model.calls:
            pass
        stream.close()
        assert model.sessions_open == 0  # free when close() returns
        reader.join(timeout=30)
        assert seen == []
        assert stream.result.finish_reason == "cancelled"

    def test_a_processor_may_close_its_own_stream(self, make):
        def closing(token_ids, logits):
            stream.close()
            return logits

        model, stream = make("abc", logits_processors=[closing])
        assert len(list(stream)) == 1
        assert stream.result.finish_reason == "cancelled"
        assert model.sessions_open == 0


def test_a_stream_is_not_iterated_from_inside_its_own_step(make):
    def reentrant(token_ids, logits):
        next(stream)
        return logits

    _, stream = make("ab", logits_processors=[reentrant])
    with pytest.raises(RuntimeError, match="inside its own step"):
        next(stream)


def test_ctrl_c_between_two_lines_of_a_step_ends_the_stream(make, monkeypatch):
    model, stream = make("abc")
    next(stream)

    def interrupted(text):
        raise KeyboardInterrupt

    monkeypatch.setattr(stream._stops, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert list(stream) == []
    assert model.sessions_open == 0
    monkeypatch.undo()
    assert stream.result.finish_reason == "error"


def test_logprobs_that_are_asked_for_now_and_then_keep_their_places(make):
    _, stream = make("abcd", logprobs=0)
    next(stream)
    stream.params = stream.params.merge(logprobs=None)
    next(stream)
    next(stream)
    stream.params = stream.params.merge(logprobs=1)
    list(stream)
    entries = stream.result.logprobs
    assert [entry is not None for entry in entries] == [True, False, False, True, True]
    assert len(entries) == len(stream.result.token_ids)


def test_logprobs_come_with_each_token_and_in_the_result(make):
    _, stream = make("ab", logprobs=2)
    per_token = [token.logprobs for token in stream]
    assert stream.result.logprobs == per_token
    assert [entry.token_id for entry in per_token] == stream.result.token_ids
    assert all(len(entry.top) == 2 for entry in per_token)
    assert per_token[0].top[0] == (per_token[0].token_id, per_token[0].logprob)
