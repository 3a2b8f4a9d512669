"""Lines that are coloured on a terminal, plain in a pipe, and wrapped for both."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeAlias

from phirt.cli.terminal import is_terminal, plain

__all__ = ["Line", "Segment", "aligned", "paragraph", "print_lines"]

Segment: TypeAlias = tuple[str, str]
"""A piece of a line, and rich's name for how it looks."""

Line: TypeAlias = list[Segment]

_NARROWEST, _WIDEST, _PLAIN = 60, 100, 80


def print_lines(lines: Callable[[int], Iterable[Line]]) -> None:
    """Print to stdout.

    Args:
        lines: Gives the lines for a width in columns.
    """
    if not is_terminal(sys.stdout):
        for line in lines(_PLAIN):
            print("".join(text for text, _ in line).rstrip())
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    width = min(max(console.width, _NARROWEST), _WIDEST)
    for line in lines(width):
        console.print(Text.assemble(*line), soft_wrap=True)


def paragraph(text: str, *, width: int, indent: int = 0, style: str = "") -> Iterator[Line]:
    """A text, wrapped and indented; what orders a terminal about is taken out."""
    margin, text = " " * indent, plain(text)
    # Of commands that do not fit into one line each has its own: broken elsewhere, the first part
    # of what is copied would be a command too, and another one.
    parts = re.split("(?<=&&) ", text) if indent + len(text) > width else [text]
    for part in parts:
        for line in textwrap.wrap(
            part,
            width,
            initial_indent=margin,
            subsequent_indent=margin,
            # A command or a path is copied whole.
            break_long_words=False,
            break_on_hyphens=False,
        ):
            yield [(line, style)]


def aligned(row: Sequence[str], widths: Sequence[int], width: int, *, names: int) -> str:
    """A row of a table: names to the left, then figures to the right.

    Args:
        row: Its cells.
        widths: Of the columns.
        width: Of the line; columns are closer together where they would not fit.
        names: How many of the cells are names.
    """
    cells = (
        cell.ljust(size) if index < names else cell.rjust(size)
        for index, (cell, size) in enumerate(zip(row, widths, strict=True))
    )
    gap = 2 if sum(widths) + 2 * (len(widths) - 1) <= width else 1
    return (" " * gap).join(cells).rstrip()
