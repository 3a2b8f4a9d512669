"""``phirt rm``: remove a model from this machine."""

from __future__ import annotations

import argparse

from phirt.cli.selection import keys_of, print_json
from phirt.models.store import Store
from phirt.models.variants import megabytes

__all__ = ["remove"]


def remove(arguments: argparse.Namespace) -> None:
    """Carry out ``phirt rm``: every artifact of that name goes.

    Raises:
        ModelNotFoundError: There is no such model.
        StoreError: It is in use, or the store cannot be written.
    """
    store = Store()
    removed = {key: store.remove(key) for key in keys_of(store, arguments.name)}
    if arguments.json:
        print_json({"removed": removed, "bytes": sum(removed.values())})
        return
    for key, freed in removed.items():
        print(f"Removed {key}: {megabytes(freed)} freed.")
