"""Functions that `transformers` gives to chat templates, beside jinja2's own."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from phirt.text.budget import exceeded

__all__ = ["RefusedError", "TemplateDict", "raise_exception", "strftime_now", "to_json"]

_MAX_STRFTIME = 100  # characters of a format


class RefusedError(Exception):
    """The template called ``raise_exception``: it refuses the messages, in these words."""


class TemplateDict:
    """``dict(...)`` and ``dict.fromkeys(...)``, and nothing else of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """A dictionary."""
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """A dictionary of equal values."""
        return dict.fromkeys(*args)


def raise_exception(message: object) -> None:
    """Refuse the messages."""
    raise RefusedError(str(message))


def strftime_now(template: str) -> str:
    """The local time, formatted."""
    if len(template) > _MAX_STRFTIME:  # the C library may widen each field: %999999d
        raise exceeded("strftime format", f"{_MAX_STRFTIME} characters")
    return datetime.now().strftime(template)  # noqa: DTZ005 - local time, as in transformers


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter ``tojson``: unlike jinja2's it escapes no HTML, and takes json's options."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
