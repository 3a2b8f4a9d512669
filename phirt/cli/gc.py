"""``phirt gc``: free what no model needs."""

from __future__ import annotations

import argparse

from phirt.build.version import CONVERTER_VERSION
from phirt.cli.selection import print_json
from phirt.models.store import Store
from phirt.models.variants import megabytes

__all__ = ["collect"]


def collect(arguments: argparse.Namespace) -> None:
    """Carry out ``phirt gc``.

    Raises:
        StoreError: The store cannot be written.
    """
    found = Store().collect(converter_version=CONVERTER_VERSION)
    if arguments.json:
        kept = [str(path) for path in found.kept]
        print_json({"freed": dict(found.freed), "bytes": found.bytes, "kept": kept})
        return
    for kind, freed in found.freed.items():
        print(f"{kind}: {megabytes(freed)} freed")
    for path in found.kept:
        print(f"{path} is in use and was kept")
    print(f"{megabytes(found.bytes)} freed in all.")
