"""Messages of a chat, checked and copied into what a chat template may see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from phirt.text.budget import MAX_NESTING

__all__ = ["check_messages", "plain_data", "plain_message"]

# Names that clients give a message's reasoning; templates read the first, some the second.
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_MAX_DEPTH = MAX_NESTING // 2


def check_messages(messages: object) -> None:
    """Refuse what is not a chat.

    Raises:
        TypeError: Not a list of mappings whose role and content are strings.
        ValueError: No messages, or one without a role or content.
    """
    if not isinstance(messages, list | tuple):
        raise TypeError(f"A chat must be a list of messages, not {type(messages).__name__}.")
    if not messages:
        raise ValueError("A chat needs at least one message.")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(
                f"Message {index} must be a mapping with 'role' and 'content', "
                f"not {type(message).__name__}."
            )
        for field in ("role", "content"):
            value = message.get(field)
            if value is None:
                if field == "content" and message.get("tool_calls"):
                    continue
                raise ValueError(f"Message {index} has no {field!r}.")
            if not isinstance(value, str):
                raise TypeError(
                    f"{field!r} of message {index} must be a str, not {type(value).__name__}."
                )


def plain_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as transformers passes it: without None, its reasoning under every name."""
    plain = {key: plain_data(value) for key, value in message.items() if value is not None}
    reasoning = next((plain[key] for key in _REASONING_FIELDS if key in plain), None)
    if reasoning is None:
        return plain
    return {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def plain_data(value: Any, depth: int = 0) -> Any:
    """A copy in plain JSON types: other objects have methods that no sandbox knows.

    An object of another type becomes a text that names its type.

    Raises:
        ValueError: Lists and mappings nest too deep.
    """
    if depth > _MAX_DEPTH:
        raise ValueError(f"Messages and template variables may nest {_MAX_DEPTH} levels deep.")
    if isinstance(value, np.generic):
        value = value.item()
    for kind in (str, int, float):  # subclasses, such as enumerations, may override conversions
        if isinstance(value, kind) and not isinstance(value, bool):
            return getattr(kind, f"__{kind.__name__}__")(value)
    if isinstance(value, Mapping):
        return {plain_data(k, depth + 1): plain_data(v, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        items = [plain_data(item, depth + 1) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if value is None or isinstance(value, bool):
        return value
    return f"<{type(value).__name__}>"
