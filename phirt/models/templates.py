"""Where a model folder keeps its chat template."""

from __future__ import annotations

import hashlib
from pathlib import Path

from phirt.errors import ModelFormatError
from phirt.models.safe_json import JsonFields, read_bytes, read_json

__all__ = ["NO_TEMPLATE", "TEMPLATE_FILES", "chat_template_of", "read_chat_template", "template_id"]

TEMPLATE_FILES = ("chat_template.jinja", "tokenizer_config.json")
"""The files that a template may be in; the first wins, as in transformers."""

NO_TEMPLATE = "none"

_MAX_CHARACTERS = 1 << 20


def read_chat_template(folder: Path) -> str | None:
    """Source of a folder's chat template (Jinja), or None.

    Raises:
        ModelFormatError: The file that it is in is damaged.
    """
    file = folder / TEMPLATE_FILES[1]
    document = read_json(file) if file.exists() else {}
    return chat_template_of(folder, JsonFields(document, source=str(file)))


def chat_template_of(folder: Path, tokenizer: JsonFields) -> str | None:
    """`read_chat_template`, where tokenizer_config.json has been read already.

    Args:
        folder: The model folder.
        tokenizer: Its tokenizer_config.json, or no fields.

    Raises:
        ModelFormatError: The template is not text, or too long.
    """
    file = folder / TEMPLATE_FILES[0]
    if file.exists():
        data = read_bytes(file, max_bytes=_MAX_CHARACTERS)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ModelFormatError(f"{file} is not UTF-8 text (byte {error.start}).") from error
    value = tokenizer.value("chat_template")
    if not isinstance(value, list):
        return tokenizer.optional_string("chat_template", max_length=_MAX_CHARACTERS)
    for item in value:
        if isinstance(item, dict) and item.get("name") == "default":
            named = JsonFields(item, source=str(folder / TEMPLATE_FILES[1]))
            return named.string("template", max_length=_MAX_CHARACTERS)
    return None


def template_id(template: str | None) -> str:
    """SHA-256 of a template in lower-case hex, or `NO_TEMPLATE`."""
    return NO_TEMPLATE if template is None else hashlib.sha256(template.encode()).hexdigest()
