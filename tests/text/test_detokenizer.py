"""The streaming detokenizer: in sum `decode`, and in each piece whole characters."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from phirt.text.detokenizer import StreamingDetokenizer
from phirt.text.tokenizer import Tokenizer
from tests.text.tiny_tokenizers import byte_level, sentencepiece


def _with_decoder(decoder):
    backend = sentencepiece()
    backend.decoder = decoder
    return backend


def _without_decoder():
    return tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "\ufffd": 2}))


TOKENIZERS = {
    name: Tokenizer(backend)
    for name, backend in {
        "byte level": byte_level(),
        # As an added token, é is the letter for encoding and, decoded, the byte 0xE9.
        "added token of the byte alphabet": byte_level(added=["é"]),
        "sentencepiece": sentencepiece(),
        "two spaces stripped": sentencepiece(strip=2),
        "no space stripped": sentencepiece(strip=0),
        "metaspace": _with_decoder(decoders.Metaspace()),
        "metaspace never prepended": _with_decoder(decoders.Metaspace(prepend_scheme="never")),
        "not streamable": _with_decoder(decoders.CTC()),
        "stripped at the end": _with_decoder(decoders.Strip("o", 0, 1)),
        "no decoder": _without_decoder(),
    }.items()
}


def pieces(tokenizer, ids):
    detokenizer = StreamingDetokenizer(tokenizer)
    return [*(detokenizer.add(token_id) for token_id in ids), detokenizer.flush()]


def ids_of(tokenizer, *tokens):
    ids = [tokenizer.token_to_id(token) for token in tokens]
    assert None not in ids
    return ids


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())
@given(data=st.data())
def test_the_sum_of_the_pieces_is_what_decode_gives(tokenizer, data):
    # One id beyond the vocabulary: the logits of a model may have more columns than that.
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size), max_size=40))
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


# U+2581 is how SentencePiece spells a space, so as text it does not come back.
@pytest.mark.parametrize("name", ["byte level", "sentencepiece"])
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd▁")))
def test_text_is_never_cut_within_a_character(name, text):
    tokenizer = TOKENIZERS[name]
    streamed = pieces(tokenizer, tokenizer.encode(text))
    assert "".join(streamed) == text
    assert all("\ufffd" not in piece for piece in streamed)


def test_an_emoji_of_four_tokens_appears_whole():
    tokenizer = TOKENIZERS["byte level"]
    ids = tokenizer.encode("a🦜b", add_special_tokens=False)
    assert pieces(tokenizer, ids) == ["a", "", "", "🦜", "b", ""]


def test_byte_tokens_wait_for_the_end_of_their_run():
    # A run with an invalid byte decodes to U+FFFD as a whole, so nothing of it is final before.
    tokenizer = TOKENIZERS["sentencepiece"]
    emoji = ids_of(tokenizer, "<0xF0>", "<0x9F>", "<0xA6>", "<0x9C>")
    h = ids_of(tokenizer, "h")
    assert pieces(tokenizer, emoji + h) == ["", "", "", "", "🦜h", ""]
    assert pieces(tokenizer, emoji) == ["", "", "", "", "🦜"]
    bad = ids_of(tokenizer, "<0xFF>")
    assert pieces(tokenizer, [*emoji, *bad, *h])[-2] == "\ufffd" * 5 + "h"


def test_an_unfinished_character_is_replaced_at_the_end_only():
    tokenizer = TOKENIZERS["byte level"]
    ids = tokenizer.encode("🦜", add_special_tokens=False)[:-1]
    assert pieces(tokenizer, ids) == ["", "", "", "\ufffd"][-len(ids) - 1 :]


def test_an_invalid_byte_is_replaced_as_soon_as_it_is_known_to_be():
    tokenizer = TOKENIZERS["byte level"]
    alone = ids_of(tokenizer, "ÿ", "h")  # "ÿ" stands for the byte 0xFF
    assert pieces(tokenizer, alone) == ["\ufffd", "h", ""]
    broken_off = ids_of(tokenizer, "ð", "h")  # 0xF0 begins a character of four bytes
    assert pieces(tokenizer, broken_off) == ["", "\ufffdh", ""]


def test_special_tokens_are_silent_even_within_a_character():
    tokenizer = TOKENIZERS["byte level"]
    end = tokenizer.token_to_id("<|end|>")
    ids = tokenizer.encode("é🦜", add_special_tokens=False)
    scattered = [token_id for pair in zip(ids, [end] * len(ids), strict=True) for token_id in pair]
    assert "".join(pieces(tokenizer, scattered)) == tokenizer.decode(ids)


def test_spaces_between_words_survive_and_the_first_is_stripped():
    tokenizer = TOKENIZERS["sentencepiece"]
    assert pieces(tokenizer, ids_of(tokenizer, "▁h", "▁h", "▁", "▁", "h")) == [
        *("h", " h", " ", " ", "h"),
        "",
    ]
    assert pieces(tokenizer, ids_of(tokenizer, "▁", "▁h")) == ["", " h", ""]


class _CountingTokenizer(Tokenizer):
    decoded = 0

    def decode(self, token_ids, *, skip_special_tokens=True):
        self.decoded += len(token_ids)
        return super().decode(token_ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize("text", ["hello world " * 500, "🦜" * 1000, " " * 2000, "\ufffd" * 1000])
def test_each_token_is_decoded_a_bounded_number_of_times(text):
    for make in (byte_level, sentencepiece):
        tokenizer = _CountingTokenizer(make())
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert "".join(pieces(tokenizer, ids)) == text
        assert tokenizer.decoded <= 6 * len(ids)


@pytest.mark.model
@given(data=st.data())
def test_the_sum_of_the_pieces_on_the_real_tokenizer(smollm2, data):
    tokenizer = smollm2.tokenizer
    token = st.one_of(st.integers(0, tokenizer.vocab_size), st.integers(0, 300))
    ids = data.draw(st.lists(token, max_size=40))
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())
@given(data=st.data())
def test_a_copy_goes_its_own_way(tokenizer, data):
    ids = st.lists(st.integers(0, tokenizer.vocab_size), max_size=12)
    start, first, second = data.draw(ids), data.draw(ids), data.draw(ids)
    detokenizer = StreamingDetokenizer(tokenizer)
    text = "".join(detokenizer.add(token) for token in start)
    other = detokenizer.copy()
    for stream, rest in ((detokenizer, first), (other, second)):
        added = "".join([*(stream.add(token) for token in rest), stream.flush()])
        assert text + added == tokenizer.decode(start + rest)
