"""Chats as prompts: a model's chat template, rendered as `transformers` renders it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from phirt.text.messages import check_messages, plain_data, plain_message

__all__ = ["ChatTemplate"]


class ChatTemplate:
    """A model's chat template. Safe to use from many threads at once.

    The output equals that of `transformers`' ``apply_chat_template(..., tokenize=False)``,
    byte for byte, for every template that keeps to jinja2's filters for text, lists, numbers
    and JSON. It is rendered in a sandbox, with budgets for work, text, lists, integers,
    nesting, recursion and output.

    Args:
        source: The template, in jinja2's language.
        bos_token: Text of the beginning-of-sequence token; undefined in the template if None.
        eos_token: The same of the end-of-sequence token.
        pad_token: The same of the padding token.
        unk_token: The same of the unknown token.

    Raises:
        TypeError: ``source`` is not a string.
        ModelFormatError: The template is not valid.
        UnsafeModelError: It reaches for what templates must not, or is too large.
    """

    def __init__(
        self,
        source: str,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        pad_token: str | None = None,
        unk_token: str | None = None,
    ) -> None:
        if not isinstance(source, str):
            raise TypeError(f"A chat template must be a str, not {type(source).__name__}.")
        tokens = {
            "bos_token": bos_token,
            "eos_token": eos_token,
            "pad_token": pad_token,
            "unk_token": unk_token,
        }
        self._special_tokens = {name: text for name, text in tokens.items() if text is not None}
        self._source = source
        # jinja2 is imported with the first template, so that `import phirt` stays light.
        from phirt.text.sandbox import TemplateProgram

        self._program = TemplateProgram(source)

    @property
    def source(self) -> str:
        """The template's text."""
        return self._source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt of a chat, special tokens included: encode it without adding any.

        Args:
            messages: The chat, oldest first: mappings with a string ``role`` and a string
                ``content``; ``content`` may be missing beside ``tool_calls``.
            add_generation_prompt: Whether to end with the header of the assistant's answer.
            **variables: What else the template may read, such as ``tools`` or
                ``enable_thinking``. Values that are not plain JSON types become text naming
                their type.

        Raises:
            TypeError: The messages are not a list of mappings with string fields.
            ValueError: There are no messages, one lacks its role or content, or the template
                refuses them, for example because roles must alternate; with its own words.
            UnsafeModelError: The template exceeds a budget or is refused an operation.
            ModelFormatError: The template fails otherwise.
        """
        check_messages(messages)
        context = {
            "messages": [plain_message(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self._special_tokens,
            **{name: plain_data(value) for name, value in variables.items()},
        }
        return self._program.render(context)
