"""Rendered chats: byte for byte what `transformers` renders."""

from __future__ import annotations

import datetime

import pytest

from phirt.text.chat import ChatTemplate
from tests.hard_strings import HARD_STRINGS
from tests.text.chat_templates import EXPRESSIONS, TEMPLATES
from tests.text.tiny_tokenizers import byte_level

pytestmark = pytest.mark.oracle

CHATS: dict[str, list[dict[str, object]]] = {
    "one question": [{"role": "user", "content": "What is the capital of France?"}],
    "a conversation": [
        {"role": "system", "content": " You are terse. \n"},
        {"role": "user", "content": "Hi <b>there</b> & 'you'"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello.", "reasoning": "hm"},
        {"role": "user", "content": "  spaces  \n\n", "name": None, "extra": {"nested": [1, 2.5]}},
        {"role": "assistant", "content": "", "thinking": "nothing"},
        {"role": "user", "content": "{{ 7 * 7 }} {% raw %}"},
    ],
    "hard strings": [
        {"role": role, "content": text}
        for text, role in zip(HARD_STRINGS.values(), ["user", "assistant"] * 30, strict=True)
    ],
}
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string"}, "days": {"type": ["integer", "null"]}},
        },
    },
}


@pytest.fixture(scope="module")
def oracle():
    import transformers

    return transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level(), **TOKENS)


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS.keys())
@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES.keys())
@pytest.mark.parametrize(
    "variables",
    [{}, {"add_generation_prompt": False}, {"tools": [TOOL], "enable_thinking": False}],
    ids=["plain", "no generation prompt", "tools"],
)
def test_templates_in_the_manner_of_models(oracle, source, chat, variables):
    variables = {"add_generation_prompt": True, **variables}
    theirs = oracle.apply_chat_template(chat, chat_template=source, tokenize=False, **variables)
    ours = ChatTemplate(source, **TOKENS)
    assert ours.render(chat, **variables) == theirs
    assert ours.render(chat, **variables) == theirs  # rendering leaves nothing behind


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_expressions(oracle, expression):
    source = (
        f"{{% set x = [{expression}] %}}{{{{ x }}}}{{% for y in x %}}|{{{{ y }}}}{{% endfor %}}"
    )
    chat = CHATS["a conversation"]
    theirs = oracle.apply_chat_template(chat, chat_template=source, tokenize=False)
    assert ChatTemplate(source, **TOKENS).render(chat) == theirs


def test_the_time(oracle):
    source = "{{ strftime_now('%Y-%m-%d %H:%M') }}"
    chat = CHATS["one question"]
    before = datetime.datetime.now()  # noqa: DTZ005 - local, as in the templates
    ours = ChatTemplate(source).render(chat)
    after = datetime.datetime.now()  # noqa: DTZ005
    assert ours in {f"{time:%Y-%m-%d %H:%M}" for time in (before, after)}
    assert len(oracle.apply_chat_template(chat, chat_template=source, tokenize=False)) == len(ours)


@pytest.mark.model
def test_the_real_model(oracle, smollm2):
    template = smollm2.chat_template
    for chat in CHATS.values():
        theirs = oracle.apply_chat_template(
            chat, chat_template=template.source, tokenize=False, add_generation_prompt=True
        )
        assert template.render(chat) == theirs
