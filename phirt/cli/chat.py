"""An interactive chat: history kept, Ctrl-C ends an answer, Ctrl-D the chat."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from phirt.errors import GenerationError

if TYPE_CHECKING:
    from phirt import Model
    from phirt.types import ChatMessage

__all__ = ["chat"]

_END = "Ctrl-Z and Enter" if os.name == "nt" else "Ctrl-D"


def chat(model: Model, overrides: dict[str, Any]) -> None:
    """Read messages from the terminal and answer them until the input ends.

    Args:
        model: A model with a chat template.
        overrides: Generation parameters for every answer.
    """
    # Editing and recalling lines, where Python has it: input() uses it once imported.
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")
    print(
        f"{model.name} on {model.device}. Ctrl-C ends an answer, {_END} the chat.", file=sys.stderr
    )
    history: list[ChatMessage] = []
    while True:
        try:
            message = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print(f"\n({_END} ends the chat)", file=sys.stderr)
            continue
        if message.strip():
            _answer(model, history, message, overrides)


def _answer(
    model: Model, history: list[ChatMessage], message: str, overrides: dict[str, Any]
) -> None:
    """Print the answer as it comes; append both to the history, if there was any answer."""
    asked: ChatMessage = {"role": "user", "content": message}
    text = ""
    try:
        with model.stream([*history, asked], **overrides) as stream:
            for token in stream:
                text += token.text
                print(token.text, end="", flush=True)
    except KeyboardInterrupt:
        # The user has read enough. What was said so far stays in the history.
        pass
    except (GenerationError, ValueError) as error:
        # Such as a message that no longer fits in the context, or is no UTF-8: the next may.
        print(f"phirt: {error}", file=sys.stderr)
    if text:
        history += [asked, {"role": "assistant", "content": text}]
    print()
