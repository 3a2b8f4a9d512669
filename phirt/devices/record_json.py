"""The record of a machine as JSON, read strictly: a record that decides must not be guessed at.

Fields that have a default may be left out; anything that the record does not know is refused,
with the place where it stands.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from phirt.devices.machine import SCHEMA, BackendRecord, Machine
from phirt.devices.names import DeviceName

__all__ = ["from_json", "machine_from_json", "to_json"]

T = TypeVar("T")


def to_json(record: object) -> dict[str, Any]:
    """A `Machine`, or a part of one, as values that JSON has.

    Raises:
        TypeError: It is not an instance of a dataclass.
    """
    if not dataclasses.is_dataclass(record) or isinstance(record, type):
        raise TypeError(f"a record is an instance of a dataclass, not {type(record).__name__}")
    document: dict[str, Any] = _plain(record)
    return document


def machine_from_json(document: object) -> Machine:
    """Read a record that `to_json` wrote, or somebody by hand.

    Raises:
        ValueError: It is no record of a machine, or of another version of phirt; the message
            says which field is wrong.
    """
    if isinstance(document, Mapping) and document.get("schema", SCHEMA) != SCHEMA:
        writer = document.get("phirt")
        raise ValueError(
            f"The record has schema {document['schema']!r} (written by phirt {writer!r}); this "
            f"phirt reads schema {SCHEMA}. Read it with the version that wrote it."
        )
    return from_json(Machine, document, where="machine")


def from_json(kind: type[T], document: object, *, where: str) -> T:
    """Read a part of a record.

    Args:
        kind: The dataclass.
        document: What the JSON parser gave.
        where: What to call it in messages.

    Raises:
        ValueError: A field is unknown, missing or of a wrong type, or a listed device has a name
            that ``device=`` cannot be given.
    """
    if not isinstance(document, Mapping):
        # TypeError is for code that passes a wrong argument; this is a file that is wrong.
        raise ValueError(f"{where} must be an object, not {_named(document)}")  # noqa: TRY004
    fields = {field.name: field for field in dataclasses.fields(cast("Any", kind))}
    unknown = sorted(str(name) for name in document.keys() - fields.keys())
    if unknown:
        raise ValueError(f"{where} has no field {unknown[0]!r}; it has: {', '.join(fields)}")
    missing = [name for name in fields.keys() - document.keys() if _is_required(fields[name])]
    if missing:
        raise ValueError(f"{where} lacks the field {min(missing)!r}")
    hints = _hints(cast("type", kind))
    made = kind(
        **{name: _read(hints[name], each, f"{where}.{name}") for name, each in document.items()}
    )
    if isinstance(made, BackendRecord):
        _check_names(made, where)
    return made


def _check_names(record: BackendRecord, where: str) -> None:
    """Refuse names that no user could type, and that nothing that merges devices could read."""
    for index, offer in enumerate(record.listing):
        if offer.device == "auto" or offer.device != str(DeviceName.parse(offer.device)):
            raise ValueError(
                f"{where}.listing[{index}].device must be a name such as 'cuda:1', not "
                f"{offer.device!r}"
            )


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {field.name: _plain(getattr(value, field.name)) for field in fields}
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return value


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _read(hint: Any, value: Any, where: str) -> Any:
    """A value of the type that an annotation names."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is types.UnionType:
        (inner,) = (each for each in arguments if each is not types.NoneType)
        return None if value is None else _read(inner, value, where)
    if origin is Literal:
        if value not in arguments:
            known = ", ".join(map(repr, arguments))
            raise ValueError(f"{where} must be one of {known}, not {_named(value)}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where} must be a list, not {_named(value)}")
        return tuple(
            _read(arguments[0], each, f"{where}[{index}]") for index, each in enumerate(value)
        )
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} must be an object, not {_named(value)}")
        return {key: _read(arguments[1], each, f"{where}.{key}") for key, each in value.items()}
    if dataclasses.is_dataclass(hint):
        return from_json(cast("type", hint), value, where=where)
    return _read_scalar(hint, value, where)


def _read_scalar(hint: type, value: Any, where: str) -> Any:
    # To Python, true is a 1, and JSON knows no difference between 1 and 1.0.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and is_number and math.isfinite(value):
        return float(value)
    if hint is int and is_number and isinstance(value, int) and value >= 0:
        return value
    if hint in (str, bool) and isinstance(value, hint):
        return value
    wanted = {"str": "a string", "bool": "true or false", "int": "a whole number from 0"}
    raise ValueError(
        f"{where} must be {wanted.get(hint.__name__, 'a number')}, not {_named(value)}"
    )


def _named(value: object) -> str:
    """A value in a message, short whatever it is."""
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
