"""``phirt list``: the models on this machine, or those that phirt knows by name."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from phirt.cli.selection import as_json, print_json, print_table
from phirt.models.catalog import CatalogEntry, HubSource, Source, list_models
from phirt.models.store import Store
from phirt.models.variants import GGUF, megabytes

__all__ = ["describe_entry", "print_list"]


def print_list(arguments: argparse.Namespace) -> None:
    """Carry out ``phirt list``."""
    if arguments.remote:
        _print_catalog(as_document=arguments.json)
        return
    models = Store().installed()
    if arguments.json:
        print_json({"models": [as_json(model) for model in models]})
        return
    if not models:
        print("No models yet: `phirt pull NAME` fetches one, `phirt list --remote` names some.")
        return
    rows = [
        (
            model.name,
            model.format or "damaged",
            model.precision,
            megabytes(model.bytes),
            (model.revision or "")[:7],
            f"{model.last_used:%Y-%m-%d}" if model.last_used else "",
            model.key,
        )
        for model in models
    ]
    print_table(("NAME", "FORMAT", "PRECISION", "SIZE", "REVISION", "USED", "KEY"), rows)


def describe_entry(entry: CatalogEntry) -> dict[str, Any]:
    """What `--json` says of a model that phirt knows by name."""
    return {
        "name": entry.name,
        "description": entry.description,
        "license": entry.license,
        "parameters": entry.parameters,
        "context_length": entry.context_length,
        "architecture": entry.architecture,
        "document": entry.document,
        "checked": entry.checked,
        "sources": [
            {"kind": "hub" if isinstance(source, HubSource) else "pypi", **asdict(source)}
            for source in entry.sources
        ],
    }


def _print_catalog(*, as_document: bool) -> None:
    entries = list_models()
    if as_document:
        print_json({"models": [describe_entry(entry) for entry in entries]})
        return
    rows = [
        (
            entry.name,
            f"{entry.parameters / 1e9:.2g} B" if entry.parameters else "?",
            f"{entry.context_length:,}",
            entry.license,
            "yes" if entry.is_checked else "no",
            ", ".join(dict.fromkeys(map(_form, entry.sources))),
        )
        for entry in entries
    ]
    print_table(("NAME", "SIZE", "CONTEXT", "LICENCE", "CHECKED", "FORMS"), rows)
    print(
        "\nWhat is unchecked was read in documents, which `phirt show NAME` names, and was not "
        "looked up at a hub."
    )


def _form(source: Source) -> str:
    if not isinstance(source, HubSource):
        return GGUF
    return f"{source.format} ({source.device})" if source.device else source.format
