from __future__ import annotations

import json
import os
import sys
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phirt.errors import ModelFormatError, ModelNotFoundError
from phirt.models.safe_json import JsonFields, parse_json, read_json

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**39), 10**39)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
    max_leaves=20,
)


@given(st.dictionaries(st.text(st.characters(codec="utf-8")), json_values))
def test_what_json_writes_is_read_back(value):
    assert parse_json(json.dumps(value).encode(), source="x") == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode(), source="x") == value


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", "nested more than 64 deep"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested more than 64 deep"),
        ("[" * 100_000, "nested more than 64 deep"),
        ('{"a": ' + "9" * 1_000_000 + "}", "an integer of 1,000,000 digits"),
        ('{"a": -' + "9" * 5_000 + "}", "an integer of 5,000 digits"),
        ('{"a": 1e999}', "the number 1e999... is out of range"),
        ('{"a": 0.' + "1" * 1_000_000 + "}", "out of range"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' occurs twice"),
        ('{"x": {"a": 1, "\\u0061": 3}}', "the key 'a' occurs twice"),
        ('{"a": NaN}', "the constant NaN"),
        ('{"a": -Infinity}', "the constant -Infinity"),
        ("[1]", "must hold a JSON object; it holds a list"),
        ("", "Expecting value"),
        ('{"a": 1', "delimiter"),
        ('{"a": "[[[', "Unterminated string"),
        ("\ufeff{}", "BOM"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else None,
)
def test_m14_hostile_json_is_a_typed_error_that_names_file_and_cause(tmp_path, text, cause):
    path = tmp_path / "genai_config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ModelFormatError) as caught:
        read_json(path)
    assert str(path) in str(caught.value)
    assert cause in str(caught.value)
    assert len(str(caught.value)) < 500


def test_brackets_inside_strings_are_not_nesting():
    value = {"chat_template": '[{"' * 1000, "b": '\\"[' * 1000}
    assert parse_json(json.dumps(value).encode(), source="x") == value


def test_64_levels_are_read():
    text = '{"a":' + "[" * 63 + "]" * 63 + "}"
    assert parse_json(text.encode(), source="x")


def test_hugging_faces_thirty_digit_lengths_are_read():
    # tokenizer_config.json of most models: "no limit" is int(1e30).
    assert parse_json(b'{"model_max_length": 1000000000000000019884624838656}', source="x")


def test_bytes_that_are_not_utf8_are_a_typed_error():
    with pytest.raises(ModelFormatError, match=r"x is not UTF-8 text \(byte 6\)"):
        parse_json(b'{"a":"\xff"}', source="x")


def test_a_file_that_is_too_large_is_not_read_whole(tmp_path):
    path = tmp_path / "big.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse
    tracemalloc.start()
    try:
        with pytest.raises(ModelFormatError, match="larger than the 1,000 bytes"):
            read_json(path, max_bytes=1000)
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


def test_a_missing_file_is_not_found(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"nothing\.json"):
        read_json(tmp_path / "nothing.json")


if sys.platform != "win32":  # which has no named pipes in folders

    def test_a_named_pipe_does_not_block(tmp_path):
        os.mkfifo(tmp_path / "pipe.json")
        with pytest.raises(ModelFormatError, match="not a regular file"):
            read_json(tmp_path / "pipe.json")


FIELDS = JsonFields(
    {
        "a": {"b": 3, "flag": True, "name": "x", "half": "\ud800", "none": None},
        "n": [1, 2],
        "x": 0.5,
    },
    source="f.json",
)


def test_fields_by_dotted_path():
    assert FIELDS.integer("a.b", minimum=0, maximum=3) == 3
    assert FIELDS.string("a.name") == "x"
    assert FIELDS.integers("n", minimum=0, maximum=9) == (1, 2)
    assert FIELDS.integers("a.b", minimum=0, maximum=9) == (3,)
    assert FIELDS.integers("a.none", minimum=0, maximum=9) == ()
    assert FIELDS.optional_integer("a.none", minimum=0, maximum=9) is None
    assert FIELDS.optional_integer("no.such.field", minimum=0, maximum=9) is None
    assert FIELDS.mapping("nothing") == {}
    assert FIELDS.number("a.b", minimum=0, maximum=3) == 3.0
    assert FIELDS.number("x", minimum=0, maximum=1) == 0.5
    assert FIELDS.optional_number("a.none", minimum=0, maximum=1) is None
    assert FIELDS.numbers("n", minimum=0, maximum=9) == (1.0, 2.0)
    assert FIELDS.boolean("a.flag") is True
    assert FIELDS.boolean("a.none") is False


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda: FIELDS.integer("a.b", minimum=4, maximum=1000), "'a.b' must be between 4 and"),
        (lambda: FIELDS.integer("a.flag", minimum=0, maximum=9), "must be an integer, not True"),
        (lambda: FIELDS.integer("a.none", minimum=0, maximum=9), "f.json lacks the field 'a.none'"),
        (lambda: FIELDS.integer("a.b.c", minimum=0, maximum=9), "'a.b' must be an object, not 3"),
        (lambda: FIELDS.integers("n", minimum=2, maximum=9), "must be between 2 and 9, not 1"),
        (lambda: FIELDS.number("x", minimum=1, maximum=2), "'x' must be between 1 and 2, not 0.5"),
        (lambda: FIELDS.number("a.flag", minimum=0, maximum=2), "must be a number, not True"),
        (lambda: FIELDS.numbers("x", minimum=0, maximum=2), "must be a list of numbers, not 0.5"),
        (lambda: FIELDS.numbers("no", minimum=0, maximum=2), "f.json lacks the field 'no'"),
        (lambda: FIELDS.boolean("a.b"), "must be true or false, not 3"),
        (lambda: FIELDS.string("n"), "must be a string, not [1, 2]"),
        (lambda: FIELDS.string("a.name", max_length=0), "has 1 characters; at most 0"),
        (lambda: FIELDS.string("a.half"), "half of a surrogate pair"),
        (lambda: FIELDS.mapping("n"), "must be an object, not [1, 2]"),
    ],
)
def test_a_wrong_field_is_one_line_that_names_it(read, message):
    with pytest.raises(ModelFormatError) as caught:
        read()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
