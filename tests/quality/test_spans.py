"""The text, and how it is cut: all of it is seen, nothing overlaps, what is wrong is told."""

from __future__ import annotations

import json

import pytest
import tokenizers

from phirt.quality.spans import MOST_TOKENS, cut_spans, read_sections
from phirt.testing.tiny_tokenizer import tokenizer_document
from phirt.text.tokenizer import Tokenizer


def tokenizer(*, bos=False):
    document = tokenizer_document()
    if bos:
        document["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 0}},
            ],
            "special_tokens": {
                "<|endoftext|>": {
                    "id": "<|endoftext|>",
                    "ids": [
                        tokenizers.Tokenizer.from_str(json.dumps(document)).token_to_id(
                            "<|endoftext|>"
                        )
                    ],
                    "tokens": ["<|endoftext|>"],
                }
            },
        }
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(document)))


LONG = {name: letter * 1000 for name, letter in (("one", "x"), ("two", "y"), ("three", "z"))}


def cut(sections, tokens, *, longest=1000, bos=False):
    return cut_spans(sections, tokenizer(bos=bos), tokens=tokens, longest=longest)


def test_every_section_is_seen_and_spans_are_spread_over_it():
    spans = cut(LONG, 9 * MOST_TOKENS)
    assert [span.section for span in spans] == ["one"] * 3 + ["two"] * 3 + ["three"] * 3
    assert [span.start for span in spans[:3]] == [0, 333, 667]
    assert {len(span.token_ids) for span in spans} == {MOST_TOKENS}


def test_few_tokens_make_short_spans_and_leave_out_no_section():
    spans = cut(LONG, 90)
    assert [(span.section, len(span.token_ids)) for span in spans] == [
        ("one", 30),
        ("two", 30),
        ("three", 30),
    ]


def test_a_text_with_fewer_tokens_than_asked_for_is_taken_whole():
    spans = cut({"short": "x" * 300}, 4096)
    assert [(span.start, len(span.token_ids)) for span in spans] == [(0, 128), (150, 128)]
    assert [len(span.token_ids) for span in cut({"short": "x" * 40}, 4096)] == [40]


def test_what_the_tokenizer_puts_first_is_put_before_every_span():
    plain, spans = cut(LONG, 384), cut(LONG, 384, bos=True)
    assert {span.prefix for span in plain} == {()}
    assert [len(span.prefix) for span in spans] == [1, 1, 1]
    assert [span.token_ids for span in spans] == [span.token_ids for span in plain]


def test_a_span_fits_into_the_context_with_its_prefix():
    spans = cut(LONG, 384, longest=33, bos=True)
    assert {len(span.token_ids) for span in spans} == {32}
    assert len(spans) == 12


def test_too_few_tokens_for_the_sections():
    with pytest.raises(ValueError, match="tokens=40 is too few for 3 texts: at least 48"):
        cut(LONG, 40)


def test_a_text_that_is_too_short():
    with pytest.raises(ValueError, match="'note' has 2 tokens"):
        cut({"note": "hi"}, 100)


def test_a_text_a_file_and_several(tmp_path):
    file = tmp_path / "prose.txt"
    file.write_bytes("\ufeffOne\r\nline".encode())
    assert read_sections("Some text") == {"text": "Some text"}
    assert read_sections(file) == {"prose": "One\nline"}
    assert read_sections({"a": "x", "b": "y"}) == {"a": "x", "b": "y"}


def test_phirts_own_text_has_languages_and_code():
    own = read_sections(None)
    assert {"english", "chinese", "python"} <= set(own)
    assert all(len(text) > 500 for text in own.values())


@pytest.mark.parametrize("text", ["", "  \n", {"a": "x", "b": ""}, {}])
def test_an_empty_text(text):
    with pytest.raises(ValueError, match=r"is empty|no text"):
        read_sections(text)


def test_a_file_that_is_not_utf8(tmp_path):
    file = tmp_path / "latin.txt"
    file.write_bytes(b"caf\xe9 and more")
    with pytest.raises(ValueError, match="not UTF-8 text: byte 3"):
        read_sections(file)


@pytest.mark.parametrize("text", [b"bytes", 3, {"a": 1}])
def test_what_is_no_text(text):
    with pytest.raises(TypeError, match="text"):
        read_sections(text)
