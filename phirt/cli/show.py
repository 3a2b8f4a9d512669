"""``phirt show``: what is known of one model, on this machine, by name, or at a hub."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from phirt.cli.list import describe_entry
from phirt.cli.selection import as_json, installed_as, keys_of, print_json
from phirt.cli.terminal import plain
from phirt.models.catalog import CatalogEntry, HubSource, list_models
from phirt.models.hub_names import HubName
from phirt.models.inventory import InstalledModel
from phirt.models.store import Store
from phirt.models.variants import Variant, list_variants, megabytes

__all__ = ["show"]


def show(arguments: argparse.Namespace) -> None:
    """Carry out ``phirt show``.

    Raises:
        ModelNotFoundError: Nothing is known of such a model.
    """
    name = arguments.name
    installed = installed_as(Store(), name)
    entry = next((entry for entry in list_models() if entry.name == name), None)
    remote: dict[str, Any] | None = None
    if not installed and entry is None:
        remote = _at_hub(name, offline=arguments.offline)
        if remote is None:
            # It says that there is none, and what is near.
            keys_of(Store(), name, known=[known.name for known in list_models()])
    if arguments.json:
        print_json(
            {
                "installed": [_installed(model) for model in installed],
                "catalog": entry and describe_entry(entry),
                "hub": remote,
            }
        )
        return
    if entry is not None:
        _print_entry(entry)
    for model in installed:
        _print_installed(model)
    if remote is not None:
        _print_remote(remote)


def _at_hub(name: str, *, offline: bool) -> dict[str, Any] | None:
    """The builds in a repository, or None for what cannot name one."""
    from phirt.models.hub import open_snapshot

    try:
        hub_name = HubName.parse(name)
    except ValueError:
        return None
    snapshot = open_snapshot(hub_name, offline=offline)
    sizes = {file.path: file.size for file in snapshot.files}
    variants = sorted(list_variants(sizes, repository=snapshot.repo), key=_order)
    return {
        "repository": snapshot.repo,
        "revision": snapshot.commit,
        "license": snapshot.license,
        "gated": snapshot.gated,
        "variants": [
            {**asdict(variant), "devices": sorted(variant.devices)} for variant in variants
        ],
        "described": [variant.described for variant in variants],
    }


def _order(variant: Variant) -> tuple[str, str, int]:
    return variant.format, variant.folder, variant.order


def _installed(model: InstalledModel) -> dict[str, Any]:
    manifest = model.manifest
    return as_json(model) | {
        "weights_id": manifest.weights_id,
        "origin": dict(manifest.source),
        "versions": dict(manifest.versions),
        "chat_template_sha256": manifest.chat_template,
        "files": {name: asdict(record) for name, record in manifest.files.items()},
    }


def _print_entry(entry: CatalogEntry) -> None:
    parameters = f"{entry.parameters:,}" if entry.parameters else "not known"
    print(f"{entry.name}: {entry.description}")
    print(f"  licence       {entry.license}")
    print(f"  parameters    {parameters}")
    print(f"  context       {entry.context_length:,} tokens")
    print(f"  architecture  {entry.architecture}")
    print(f"  read in       {entry.document} ({_checked(entry.checked)})")
    for source in entry.sources:
        if isinstance(source, HubSource):
            device = f" for {source.device}" if source.device else ""
            print(f"  {source.format}{device}, {source.precision}: {source.name}")
            print(f"    read in {source.document} ({_checked(source.checked)})")
        else:
            print(f"  gguf: {source.filename} of {source.distribution} {source.version}")
            print(f"    on the package index, {megabytes(source.wheel_size)}, pinned by hash")


def _checked(date: str | None) -> str:
    return f"checked {date}" if date else "unchecked"


def _print_installed(model: InstalledModel) -> None:
    print(plain(f"{model.name}, installed as {model.key}"))
    print(f"  path          {model.path}")
    form = f"{model.format}, {model.precision}, {model.manifest.architecture}"
    print(plain(f"  format        {form}"))
    print(f"  size          {megabytes(model.bytes)} in {len(model.manifest.files)} files")
    print(plain(f"  source        {model.source or 'not known'}"))
    if model.revision:
        print(plain(f"  revision      {model.revision}"))
    if model.last_used:
        print(f"  last used     {model.last_used:%Y-%m-%d %H:%M} UTC")


def _print_remote(remote: dict[str, Any]) -> None:
    gated = "; its conditions must be accepted" if remote["gated"] else ""
    print(f"{remote['repository']} at {remote['revision']}, not installed")
    print(f"  licence       {remote['license'] or 'not named'}{gated}")
    for described in remote["described"]:
        print(plain(f"  {described}"))
    if not remote["described"]:
        print("  nothing in a form that phirt reads")
