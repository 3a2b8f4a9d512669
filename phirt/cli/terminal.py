"""Standard streams as they are found: encodings, pipes, and where the log goes."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import re
import sys
from pathlib import Path
from typing import TextIO

__all__ = ["is_broken_pipe", "is_terminal", "open_log", "plain", "use_utf8"]


# What a terminal takes for orders, and what turns the direction of writing.
_ORDERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def plain(text: str) -> str:
    """A text with a stranger's words in it, such as a file's name, fit for a terminal."""
    return _ORDERS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether someone sits at the other end. A process without a console has no streams."""
    return stream is not None and stream.isatty()


def use_utf8() -> None:
    """Write UTF-8 to files and pipes, and never fail for a character a terminal lacks.

    A stream that is closed (``>&-``, or a Windows program without a console) takes all.
    """
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  for good
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  for good
    for stream in (sys.stdout, sys.stderr):
        if not isinstance(stream, io.TextIOWrapper):
            continue  # replaced by a caller that wants text, not bytes
        if stream.isatty():
            stream.reconfigure(errors="replace")
        else:
            stream.reconfigure(encoding="utf-8", errors="replace")


def is_broken_pipe(error: OSError) -> bool:
    """Whether the reader of our output has gone. Windows says EINVAL for it."""
    return isinstance(error, BrokenPipeError) or (os.name == "nt" and error.errno == errno.EINVAL)


class _StderrHandler(logging.Handler):
    """Writes to whatever `sys.stderr` is now: progress bars replace it while they run."""

    def emit(self, record: logging.LogRecord) -> None:
        # A log that cannot be written must not end the work that it tells of.
        with contextlib.suppress(OSError):
            print(plain(self.format(record)), file=sys.stderr)


def open_log(verbosity: int) -> None:
    """Send the ``phirt`` logger to stderr.

    Args:
        verbosity: 0 for warnings, 1 for what is being done, 2 for details.
    """
    logger = logging.getLogger("phirt")
    logger.setLevel([logging.WARNING, logging.INFO, logging.DEBUG][min(verbosity, 2)])
    if not any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter("phirt: %(levelname)s: %(message)s"))
        logger.addHandler(handler)
