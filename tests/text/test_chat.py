"""What a chat template takes and refuses; its output is tested in test_chat_rendering."""

from __future__ import annotations

import enum
import subprocess
import sys

import numpy as np
import pytest

from phirt.errors import ModelFormatError, UnsafeModelError
from phirt.text.chat import ChatTemplate

SOURCE = """\
{%- for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}
{%- if add_generation_prompt %}>{% endif %}"""
CHAT = [{"role": "user", "content": "hi"}]


def render(source, chat=CHAT, **variables):
    return ChatTemplate(source).render(chat, **variables)


def test_a_chat_becomes_text():
    assert render(SOURCE) == "[user]hi>"
    assert render(SOURCE, add_generation_prompt=False) == "[user]hi"
    assert ChatTemplate(SOURCE).source == SOURCE


def test_special_tokens_are_defined_if_the_model_has_them():
    source = "{{ bos_token }}|{{ eos_token }}|{{ pad_token is defined }}"
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    assert ChatTemplate(source, **tokens).render(CHAT) == "<s>|</s>|False"
    assert ChatTemplate(source).render(CHAT) == "||False"


def test_variables_reach_the_template():
    assert render("{{ enable_thinking }}{{ tools }}", enable_thinking=False) == "FalseNone"
    assert render("{{ tools | tojson }}", tools=[{"a": 1}]) == '[{"a": 1}]'
    assert ChatTemplate("{{ bos_token }}", bos_token="a").render(CHAT, bos_token="b") == "b"  # noqa: S106


def test_values_are_plain_in_the_template():
    class Role(enum.StrEnum):
        USER = "user"

    chat = [{"role": Role.USER, "content": np.str_("x"), "n": np.float32(0.5), "o": object()}]
    source = "{% set m = messages[0] %}{{ m.role }} {{ m.content }} {{ m.n }} {{ m.o }} {{ yes }}"
    assert render(source, chat, yes=np.bool_(True)) == "user x 0.5 <object> True"


def test_none_is_as_if_absent_in_a_message():
    chat = [{"role": "user", "content": "hi", "name": None}]
    assert render("{{ messages[0].name is defined }}", chat) == "False"


def test_a_tool_call_needs_no_content():
    chat = [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    source = "{{ messages[0].tool_calls[0].name }}{{ messages[0].content is defined }}"
    assert render(source, chat) == "fFalse"


@pytest.mark.parametrize(
    ("chat", "error", "words"),
    [
        ("hello", TypeError, "must be a list of messages, not str"),
        ({"role": "user", "content": "x"}, TypeError, "must be a list of messages, not dict"),
        ([], ValueError, "at least one message"),
        (["hello"], TypeError, "Message 0 must be a mapping"),
        ([*CHAT, {"content": "x"}], ValueError, "Message 1 has no 'role'"),
        ([{"role": "user"}], ValueError, "Message 0 has no 'content'"),
        ([{"role": "user", "content": None}], ValueError, "Message 0 has no 'content'"),
        ([{"role": 1, "content": "x"}], TypeError, "'role' of message 0 must be a str, not int"),
        ([{"role": "user", "content": b"x"}], TypeError, "'content' of message 0 must be a str"),
        ([{"role": "user", "content": ["x"]}], TypeError, "must be a str, not list"),
    ],
)
def test_what_is_no_chat_is_refused(chat, error, words):
    with pytest.raises(error, match=words):
        render(SOURCE, chat)


def test_values_nested_too_deep_are_refused():
    tools: list[object] = []
    for _ in range(100):
        tools = [tools]
    with pytest.raises(ValueError, match="nest 32 levels deep"):
        render(SOURCE, tools=tools)
    cyclic: list[object] = []
    cyclic.append(cyclic)
    with pytest.raises(ValueError, match="nest 32 levels deep"):
        render(SOURCE, [{"role": "user", "content": "x", "extra": cyclic}])


def test_a_template_that_refuses_the_messages_is_quoted():
    source = "{{ raise_exception('Roles must alternate.') }}"
    with pytest.raises(ValueError, match=r"refuses these messages: Roles must alternate\.$"):
        render(source)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% if %}", "Expected an expression"),
        ("{{ x", "unexpected end of template"),
        ("{% unknown %}", "unknown tag 'unknown'"),
        ("{{ 1 | nofilter }}", "No filter named 'nofilter'"),
        ("{{ 1 is notest }}", "No test named 'notest'"),
        ("{{ 'a b' | urlize }}", "No filter named 'urlize'"),
        ("{% break %}", "outside loop"),
        ("{{ " + "9" * 5000 + " }}", "4300 digits"),
        ("{% for a in b %}" * 21 + "{% endfor %}" * 21, "too many statically nested blocks"),
    ],
)
def test_an_invalid_template_is_a_format_error(source, words):
    with pytest.raises(ModelFormatError, match=rf"is not valid: .*{words}"):
        ChatTemplate(source)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ messages[0].nothing.more }}", "has no attribute 'nothing'"),
        ("{{ 'a' + 1 }}", "can only concatenate str"),
        ("{{ 1 // 0 }}", "division"),
        ("{{ [] | map('nofilter') | list }}{{ [1] | map('nofilter') | list }}", "unknown filter"),
        ("{{ 10.0 ** 400 }}", "out of range"),
        ("{{ undefined_function() }}", "'undefined_function' is undefined"),
    ],
)
def test_a_template_that_fails_is_a_format_error(source, words):
    with pytest.raises(ModelFormatError, match=words):
        render(source)


def test_the_template_must_be_a_string():
    with pytest.raises(TypeError, match="must be a str, not bytes"):
        ChatTemplate(b"{{ x }}")  # type: ignore[arg-type]


def test_a_refused_template_leaves_the_next_one_alone():
    with pytest.raises(UnsafeModelError):
        render("{{ 'a' * 10**10 }}")
    assert render(SOURCE) == "[user]hi>"


def test_jinja2_is_imported_with_the_first_template_only():
    program = """if True:
        import sys
        from phirt.text.chat import ChatTemplate
        before = "jinja2" in sys.modules
        ChatTemplate("{{ messages }}")
        print(before, "jinja2" in sys.modules)
    """
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
