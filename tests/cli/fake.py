"""A scripted model in place of `phirt.load`: the command line's tests need no weights.

``python -m tests.cli.fake ARGUMENTS`` is ``phirt ARGUMENTS`` with that model, for the tests
that need a process or a terminal of their own.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Self

import phirt
from phirt.errors import ContextLengthError, ModelNotFoundError
from phirt.generation.timings import Timings, Usage
from phirt.stream import Generation, Token
from phirt.types import FinishReason, Progress


@dataclass
class FakeStream:
    """Tokens from a script; a step that is an exception is raised."""

    steps: Iterator[str | BaseException]
    finish_reason: FinishReason = "stop"
    texts: list[str] = field(default_factory=list)
    closed: bool = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Token:
        step = next(self.steps)
        if isinstance(step, BaseException):
            raise step
        self.texts.append(step)
        return Token(len(self.texts), step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    @property
    def result(self) -> Generation:
        count = len(self.texts)
        return Generation(
            text="".join(self.texts),
            token_ids=list(range(1, count + 1)),
            finish_reason=self.finish_reason,
            usage=Usage(7, 0, count),
            timings=Timings(0.5, 0.25, 28.0, None),
            seed=0,
        )


@dataclass
class FakeModel:
    """Answers every prompt with one script, and remembers what it was asked."""

    script: Iterable[str | BaseException] = ("The capital", " is", " Paris", ".")
    finish_reason: FinishReason = "stop"
    chat_template: object | None = "a template"
    refuses: Exception | None = None
    name: str = "fake"
    backend: str = "scripted"
    device: str = "cpu"
    loaded_with: dict[str, Any] = field(default_factory=dict)
    asked: list[Any] = field(default_factory=list)
    streams: list[FakeStream] = field(default_factory=list)
    closed: bool = False

    def load(self, model: str | None = None, **options: Any) -> Self:
        self.loaded_with = {"model": model, **options}
        if model == "missing":
            raise ModelNotFoundError("Model 'missing' is neither a name, a folder nor a file.")
        if model == "malformed":
            raise ValueError("device='c p u' is not\na device name.")
        for done in (0, 30_000_000, 60_000_000):
            options["progress"](Progress("download", done, 60_000_000, "bytes"))
        return self

    def stream(self, prompt: Any, **overrides: Any) -> FakeStream:
        self.asked.append(SimpleNamespace(prompt=prompt, overrides=overrides))
        if self.refuses is not None:
            raise self.refuses
        self.streams.append(FakeStream(iter(self.script), self.finish_reason))
        return self.streams[-1]

    def generate(self, prompt: Any, **overrides: Any) -> Generation:
        with self.stream(prompt, **overrides) as stream:
            for _ in stream:
                pass
            return stream.result

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True


class TerminalModel(FakeModel):
    """For the terminal: answers with the number of messages, or without end, or not at all."""

    def stream(self, prompt: Any, **overrides: Any) -> FakeStream:
        words = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        if "too long" in words:
            raise ContextLengthError("The prompt is too long.", required=9, available=8)
        if "forever" in words:
            return FakeStream(self._forever())
        words.encode()  # as a tokenizer does: a lone surrogate is a ValueError
        said = "|".join(m["content"] for m in prompt) if isinstance(prompt, list) else prompt
        return FakeStream(iter(["heard: ", said]))

    def _forever(self) -> Iterator[str]:
        while True:
            yield "la "
            time.sleep(0.02)


if __name__ == "__main__":
    # A shell starts what runs in the background with SIGINT ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.platform != "win32" and os.environ.get("PHIRT_TEST_TERMINAL"):
        # The tests' pseudo terminal becomes this session's own, so that ^C is a signal.
        import fcntl
        import termios

        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    from phirt.cli import main

    vars(phirt)["load"] = TerminalModel().load
    sys.exit(main())
