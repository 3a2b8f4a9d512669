"""The text that models are compared on, and the spans of tokens that it is cut into.

A span is run by itself, without what stands before it in the text: so spans are independent of
each other, memory stays bounded, and a few of them can stand for a long text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from phirt.text.tokenizer import Tokenizer

__all__ = ["MOST_TOKENS", "Span", "check_enough", "cut_spans", "read_sections", "read_text"]

MOST_TOKENS = 128
"""Tokens of a span: enough context that a model knows what it is reading."""

# With fewer a model only guesses; so many fit into the shortest context that there is.
_FEWEST = 16


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens that are run by themselves.

    Attributes:
        section: Name of the section of the text.
        start: Number of its first token in the section, from 0.
        prefix: Tokens that the tokenizer puts before any text, such as BOS. They are run, and
            what is predicted after the last of them is not judged: it would be the same in
            every span.
        token_ids: Those of the text.
    """

    section: str
    start: int
    prefix: tuple[int, ...]
    token_ids: tuple[int, ...]


def read_sections(text: str | Path | Mapping[str, str] | None) -> Mapping[str, str]:
    """The sections of a text, by name.

    Args:
        text: The text, a file of it, several by name, or None for phirt's own.

    Raises:
        ValueError: It is empty, or a file that is not UTF-8.
        TypeError: It is none of these.
        OSError: The file cannot be read.
    """
    if text is None:
        return _own_sections()
    if isinstance(text, str):
        sections: Mapping[str, str] = {"text": text}
    elif isinstance(text, Path):
        sections = {text.stem: read_text(text)}
    elif isinstance(text, Mapping):
        sections = dict(text)
    else:
        raise TypeError(f"text must be a str, a Path or a mapping, not {type(text).__name__}")
    for name, content in sections.items():
        if not all(isinstance(each, str) for each in (name, content)):
            raise TypeError("A mapping of texts has names as keys and texts as values")
        if not content.strip():
            raise ValueError(f"The text {name!r} is empty. Give some prose of the kind you need.")
    if not sections:
        raise ValueError("There is no text to compare on.")
    return sections


def read_text(path: Path) -> str:
    """A file of text.

    Raises:
        ValueError: It is not UTF-8.
        OSError: It cannot be read.
    """
    try:
        # A byte order mark is what Windows editors put before UTF-8.
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: byte {error.start} is not. Convert it to UTF-8."
        ) from error


def _own_sections() -> Mapping[str, str]:
    folder = files("phirt.quality") / "texts"
    texts = sorted(
        (file for file in folder.iterdir() if file.name.endswith(".txt")),
        key=lambda file: file.name,
    )
    return {file.name.removesuffix(".txt"): file.read_text(encoding="utf-8") for file in texts}


def check_enough(sections: Mapping[str, str], tokens: int) -> None:
    """Refuse to compare on next to nothing.

    Args:
        sections: Texts by name.
        tokens: About how many tokens are taken of all together.

    Raises:
        ValueError: They are too few.
    """
    if tokens < _FEWEST * len(sections):
        raise ValueError(
            f"tokens={tokens} is too few for {len(sections)} texts: at least "
            f"{_FEWEST * len(sections)} are needed, {_FEWEST} for each."
        )


def cut_spans(
    sections: Mapping[str, str], tokenizer: Tokenizer, *, tokens: int, longest: int
) -> list[Span]:
    """Choose spans of each section, as many of one as of another, and evenly spread over it.

    Args:
        sections: Texts by name.
        tokenizer: The tokenizer of the models.
        tokens: About how many tokens the spans have together; a text that has fewer is taken
            whole. At least 16 for each section.
        longest: Most tokens of a span, its prefix included.

    Raises:
        ValueError: ``tokens`` is too few, or a text too short.
    """
    prefix = _prefix_of(tokenizer)
    most = min(MOST_TOKENS, longest - len(prefix))
    check_enough(sections, tokens)
    count = max(len(sections), tokens // most)
    size = min(most, max(_FEWEST, tokens // count))
    each, more = divmod(count, len(sections))
    spans: list[Span] = []
    for number, (name, text) in enumerate(sections.items()):
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) < _FEWEST:
            raise ValueError(
                f"The text {name!r} has {len(ids)} tokens, and {_FEWEST} are the least that say "
                "anything. Give a longer one."
            )
        for start, end in _spread(len(ids), size, each + (number < more)):
            spans.append(Span(name, start, prefix, tuple(ids[start:end])))
    return spans


def _spread(length: int, size: int, count: int) -> Iterator[tuple[int, int]]:
    """Up to ``count`` pieces of ``size``, that do not overlap, with equal gaps between them."""
    size = min(size, length)
    count = min(count, length // size)
    for index in range(count):
        start = round(index * length / count)
        yield start, start + size


def _prefix_of(tokenizer: Tokenizer) -> tuple[int, ...]:
    """What the tokenizer puts before a text."""
    bare = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a")
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return tuple(whole[:start])
    return ()
