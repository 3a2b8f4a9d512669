"""Which models in the store a name on the command line means."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from phirt.cli.terminal import plain
from phirt.errors import ModelNotFoundError
from phirt.models.inventory import InstalledModel, is_key
from phirt.models.store import Store

__all__ = ["as_json", "installed_as", "keys_of", "print_json", "print_table"]


def installed_as(store: Store, name: str) -> list[InstalledModel]:
    """The artifacts of that key, name or repository."""
    models = store.installed()
    return [model for model in models if model.key == name] or [
        model for model in models if name in (model.name, model.source)
    ]


def keys_of(store: Store, name: str, *, known: Iterable[str] = ()) -> list[str]:
    """The keys of the artifacts that a name means, those with a damaged phirt.json too.

    Args:
        store: Where to look.
        name: The name.
        known: Other names that the user may have meant.

    Raises:
        ModelNotFoundError: There are none; the message suggests the nearest names.
    """
    keys = [model.key for model in installed_as(store, name)]
    folders = store.root / "models"
    if not keys and is_key(name) and (folders / name).is_dir():
        keys = [name]
    if not keys:
        here = {text for model in store.installed() for text in (model.name, model.key)}
        near = difflib.get_close_matches(name, here | set(known), n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ModelNotFoundError(
            f"No model {name[:200]!r} is in the store at {store.root}; `phirt list` shows what "
            f"is.{hint}"
        )
    return keys


def as_json(model: InstalledModel) -> dict[str, Any]:
    """What `--json` says of an artifact."""
    return {
        "key": model.key,
        "name": model.name,
        "path": str(model.path),
        "format": model.format,
        "precision": model.precision,
        "architecture": model.manifest.architecture,
        "bytes": model.bytes,
        "source": model.source,
        "revision": model.revision,
        "last_used": model.last_used and model.last_used.isoformat(timespec="seconds"),
    }


def print_json(document: object) -> None:
    """Print one JSON document."""
    print(plain(json.dumps(document, indent=2, ensure_ascii=False)))


def print_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print columns that fit their contents."""
    rows = [tuple(map(plain, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
