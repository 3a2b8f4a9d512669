"""Where what was found out about this machine is kept, in files that any process may read.

``PHIRT_MACHINE_DIR``, or else ``machine/`` in the store, holds JSON documents: listings and
trials of runtimes, verdicts on loaded models, quarantined devices, measured speeds. All of it
can be found out again. So a damaged file is no file, and a folder that cannot be written costs
time and nothing else.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from phirt.errors import ModelError, StoreError
from phirt.models.remembered import Remembered
from phirt.models.safe_json import parse_json, read_bytes
from phirt.models.staging import locked
from phirt.models.store import Store

__all__ = [
    "VARIABLE",
    "machine_dir",
    "parsed_record",
    "read_record",
    "update_record",
    "write_record",
]

VARIABLE = "PHIRT_MACHINE_DIR"

_T = TypeVar("_T")

_MAX_BYTES = 4 << 20
_TRIES = 5

_logger = logging.getLogger(__name__)


def machine_dir() -> Path:
    """The folder; it need not exist.

    Raises:
        StoreError: It is below the home folder of an unknown user, or a current folder that was
            removed; or the store is (`Store`).
    """
    named = os.environ.get(VARIABLE)
    if not named:
        return Store().root / "machine"
    try:
        return Path(named).expanduser().absolute()
    except (RuntimeError, OSError) as error:
        raise StoreError(
            f"The folder of this machine cannot be at {named!r}: {error} Set {VARIABLE} to the "
            "absolute path of a folder."
        ) from error


def read_record(path: Path) -> dict[str, Any] | None:
    """A document, or None where there is none or it is damaged."""
    data = _bytes_of(path)
    return None if data is None else _document(data, path)


def parsed_record(
    path: Path, known: Remembered[_T], parse: Callable[[dict[str, Any] | None], _T]
) -> _T:
    """What a document says, parsed once for as long as it stays the same.

    Args:
        path: The file.
        known: What was parsed before.
        parse: Given what `read_record` gives. Nobody changes what it returns.
    """
    data = _bytes_of(path)
    if data is None:
        return parse(None)
    return known.of(data, lambda: parse(_document(data, path)))


def _bytes_of(path: Path) -> bytes | None:
    try:
        return read_bytes(path, max_bytes=_MAX_BYTES)
    except FileNotFoundError:
        return None
    except (ModelError, OSError) as error:
        _logger.info("Passed over a damaged record: %s", error)
        return None


def _document(data: bytes, path: Path) -> dict[str, Any] | None:
    try:
        return parse_json(data, source=str(path))
    except ModelError as error:
        _logger.info("Passed over a damaged record: %s", error)
        return None


def write_record(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document so that whoever reads meanwhile reads the old one or the new.

    Where it cannot be written, a line in the log says so.

    Args:
        path: The file; its folder is made.
        document: JSON values only.
    """
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Texts of drivers, paths and variables need not be Unicode.
        partial.write_text(text + "\n", encoding="utf-8", errors="replace", newline="\n")
        _replace(partial, path)
    except OSError as error:
        _logger.warning("%s cannot be written, and will be found out again: %s", path, error)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def update_record(path: Path, change: Callable[[dict[str, Any] | None], Mapping[str, Any]]) -> None:
    """Change a document, so that two processes that do it at once lose nothing.

    Args:
        path: The file.
        change: Given what `read_record` gives, returns the new document.
    """
    try:
        with locked(path.with_name(f"{path.name}.lock")):
            write_record(path, change(read_record(path)))
    except OSError as error:
        _logger.warning("%s cannot be written, and will be found out again: %s", path, error)


def _replace(partial: Path, path: Path) -> None:
    for attempt in range(_TRIES):
        try:
            partial.replace(path)
        except PermissionError:  # Windows: somebody has it open for a moment
            if attempt == _TRIES - 1:
                raise
            time.sleep(0.02 * 2**attempt)
        else:
            return
