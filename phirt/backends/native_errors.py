"""What adapters do alike with an exception of their runtime's."""

from __future__ import annotations

__all__ = ["first_line"]


def first_line(error: BaseException) -> str:
    """The first line of its message, or its type's name where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
