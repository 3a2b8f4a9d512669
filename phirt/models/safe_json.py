"""Reads the JSON files that come with a model, which are data from a stranger.

The standard parser is lenient where a hostile file needs strictness: it recurses once
per nesting level, keeps the last of two equal keys, takes ``NaN``, reads ``1e999`` as
infinity and spends quadratic time on a number of a million digits. Every such file ends
in one `ModelFormatError` that names the file and the cause.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from phirt.errors import ModelFormatError, ModelNotFoundError

__all__ = [
    "MAX_JSON_BYTES",
    "JsonFields",
    "parse_json",
    "parse_versioned",
    "read_bytes",
    "read_json",
]

# The largest file seen with a real model (a tokenizer_config.json that lists 260,000 tokens)
# is a tenth of that.
MAX_JSON_BYTES = 16 << 20
"""The largest document that is read where nobody says less."""
_MAX_DEPTH = 64
# Hugging Face writes `model_max_length` as int(1e30), 31 digits, into most tokenizer
# configurations, so 64 bits would be too narrow. What a field may hold is its own check.
_MAX_DIGITS = 40

# A string, terminated or not, or a bracket. Possessive, and an unterminated string runs to
# the end of the text: one pass over the text, whatever it holds.
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\Z)|[\[{]|[\]}]', re.DOTALL)


def read_bytes(path: Path, *, max_bytes: int) -> bytes:
    """Read a small file of a model folder.

    Args:
        path: The file.
        max_bytes: Largest size to read.

    Raises:
        ModelNotFoundError: There is no such file.
        ModelFormatError: It is larger than ``max_bytes``, not a regular file (a pipe
            would block), or cannot be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ModelFormatError(f"{path} is not a regular file.")
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except FileNotFoundError as error:
        raise ModelNotFoundError(f"There is no file {path}.") from error
    except OSError as error:
        raise ModelFormatError(f"{path} cannot be read: {error.strerror or error}.") from error
    if len(data) > max_bytes:
        raise ModelFormatError(f"{path} is larger than the {max_bytes:,} bytes allowed for it.")
    return data


def read_json(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object from a file of a model folder.

    Args:
        path: The file.
        max_bytes: Largest size to read.

    Raises:
        ModelNotFoundError: There is no such file.
        ModelFormatError: It is too large, not UTF-8, not JSON, or JSON that `parse_json`
            refuses.
    """
    return parse_json(read_bytes(path, max_bytes=max_bytes), source=str(path))


def parse_json(data: bytes, *, source: str) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        data: The text, UTF-8.
        source: What to call it in an error: a file's path.

    Raises:
        ModelFormatError: Not UTF-8, not JSON, not an object at the top level, nested more
            than 64 deep, a number of more than 40 digits or beyond float range, a key that
            occurs twice in one object, or the constants NaN and Infinity.
    """
    try:
        text = data.decode("utf-8")
        _check_depth(text)
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_constant,
        )
    except UnicodeDecodeError as error:
        raise ModelFormatError(f"{source} is not UTF-8 text (byte {error.start}).") from error
    except ValueError as error:  # JSONDecodeError among them
        raise ModelFormatError(f"{source} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        found = type(value).__name__
        raise ModelFormatError(f"{source} must hold a JSON object; it holds a {found}.")
    return value


def parse_versioned(data: bytes, path: Path, *, newest: int) -> JsonFields:
    """Parse a JSON object of phirt's own, which says in ``format_version`` what it is.

    Args:
        data: The text, UTF-8.
        path: The file that it is of, in a model folder.
        newest: The latest format that is read.

    Raises:
        ModelFormatError: As `parse_json`, or it is of a newer format.
    """
    fields = JsonFields(parse_json(data, source=str(path)), source=str(path))
    version = fields.integer("format_version", minimum=1, maximum=1 << 31)
    if version > newest:
        raise ModelFormatError(
            f"{path} is of format {version}; this phirt reads up to {newest}. Upgrade phirt, or "
            "remove the folder and install the model again."
        )
    return fields


def _check_depth(text: str) -> None:
    depth = 0
    for match in _TOKEN.finditer(text):
        first = text[match.start()]
        if first in "[{":
            depth += 1
            if depth > _MAX_DEPTH:
                raise ValueError(f"nested more than {_MAX_DEPTH} deep")
        elif first in "]}":
            depth -= 1


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:80]!r} occurs twice in one object")
            seen.add(key)
    return result


def _integer(digits: str) -> int:
    count = len(digits.lstrip("-"))
    if count > _MAX_DIGITS:
        raise ValueError(f"an integer of {count:,} digits")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits) if len(digits) <= 8 * _MAX_DIGITS else math.inf
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:20]}... is out of range")
    return value


def _constant(name: str) -> NoReturn:
    raise ValueError(f"the constant {name} is not JSON")


class JsonFields:
    """Typed access to the fields of a parsed file, by dotted path.

    Every method takes a path such as ``"model.decoder.head_size"``. The plain ones raise
    `ModelFormatError` where the field is absent; the ``optional_`` ones return None where
    it is absent or null. All raise it, naming file and field, where the value is of the
    wrong type or out of range.
    """

    def __init__(self, data: Mapping[str, Any], *, source: str) -> None:
        self._data = data
        self._source = source

    def integer(self, path: str, *, minimum: int, maximum: int) -> int:
        """The integer at ``path``, between ``minimum`` and ``maximum``, both inclusive."""
        return self._check_integer(path, self._required(path), minimum, maximum)

    def optional_integer(self, path: str, *, minimum: int, maximum: int) -> int | None:
        """As `integer`, or None."""
        value = self.value(path)
        return None if value is None else self._check_integer(path, value, minimum, maximum)

    def integers(self, path: str, *, minimum: int, maximum: int) -> tuple[int, ...]:
        """The integers at ``path``: one, a list of them, or none where absent or null."""
        value = self.value(path)
        if value is None:
            return ()
        items = value if isinstance(value, list) else [value]
        return tuple(self._check_integer(path, item, minimum, maximum) for item in items)

    def number(self, path: str, *, minimum: float, maximum: float) -> float:
        """The number at ``path``, an integer or not, between both bounds, inclusive."""
        return self._check_number(path, self._required(path), minimum, maximum)

    def optional_number(self, path: str, *, minimum: float, maximum: float) -> float | None:
        """As `number`, or None."""
        value = self.value(path)
        return None if value is None else self._check_number(path, value, minimum, maximum)

    def numbers(self, path: str, *, minimum: float, maximum: float) -> tuple[float, ...]:
        """The list of numbers at ``path``, each between both bounds, inclusive."""
        value = self._required(path)
        if not isinstance(value, list):
            self._fail(path, f"must be a list of numbers, not {_show(value)}")
        return tuple(self._check_number(path, item, minimum, maximum) for item in value)

    def boolean(self, path: str) -> bool:
        """The truth value at ``path``; False where it is absent or null."""
        value = self.value(path)
        if value is None:
            return False
        if not isinstance(value, bool):
            self._fail(path, f"must be true or false, not {_show(value)}")
        return value

    def string(self, path: str, *, max_length: int = 4096) -> str:
        """The string at ``path``, of at most ``max_length`` characters."""
        return self._check_string(path, self._required(path), max_length)

    def optional_string(self, path: str, *, max_length: int = 4096) -> str | None:
        """As `string`, or None."""
        value = self.value(path)
        return None if value is None else self._check_string(path, value, max_length)

    def mapping(self, path: str) -> dict[str, Any]:
        """The object at ``path``; empty where it is absent or null."""
        value = self.value(path)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self._fail(path, f"must be an object, not {_show(value)}")
        return value

    def value(self, path: str) -> Any:
        """Whatever is at ``path``, or None where it is absent."""
        value: Any = self._data
        walked: list[str] = []
        for key in path.split("."):
            if value is None:
                return None
            if not isinstance(value, Mapping):
                self._fail(".".join(walked), f"must be an object, not {_show(value)}")
            value = value.get(key)
            walked.append(key)
        return value

    def _required(self, path: str) -> Any:
        value = self.value(path)
        if value is None:
            raise ModelFormatError(f"{self._source} lacks the field {path!r}.")
        return value

    def _check_integer(self, path: str, value: object, minimum: int, maximum: int) -> int:
        # bool is an int to Python, and 1.0 is not one to JSON's readers.
        if not isinstance(value, int) or isinstance(value, bool):
            self._fail(path, f"must be an integer, not {_show(value)}")
        if not minimum <= value <= maximum:
            self._fail(path, f"must be between {minimum:,} and {maximum:,}, not {_show(value)}")
        return value

    def _check_number(self, path: str, value: object, minimum: float, maximum: float) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            self._fail(path, f"must be a number, not {_show(value)}")
        if not minimum <= value <= maximum:
            self._fail(path, f"must be between {minimum:g} and {maximum:g}, not {_show(value)}")
        return float(value)

    def _check_string(self, path: str, value: object, max_length: int) -> str:
        if not isinstance(value, str):
            self._fail(path, f"must be a string, not {_show(value)}")
        if len(value) > max_length:
            self._fail(path, f"has {len(value):,} characters; at most {max_length:,} are allowed")
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:  # "\ud800": JSON can spell half a character
                self._fail(path, "holds half of a surrogate pair")
        return value

    def _fail(self, path: str, problem: str) -> NoReturn:
        raise ModelFormatError(f"{self._source}: the field {path!r} {problem}.")


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
