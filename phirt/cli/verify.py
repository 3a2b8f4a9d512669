"""``phirt verify``: whether the models are still what was installed."""

from __future__ import annotations

import argparse

from phirt.cli.arguments import UsageError
from phirt.cli.progress import ProgressBars
from phirt.cli.selection import keys_of, print_json
from phirt.models.integrity import Fault
from phirt.models.store import Store

__all__ = ["verify"]


def verify(arguments: argparse.Namespace) -> int:
    """Carry out ``phirt verify``.

    Returns:
        1 where something is not right, else 0.

    Raises:
        UsageError: A template is to be accepted, and no model is named.
        ModelError: There is no such model.
    """
    store = Store()
    keys = None if arguments.name is None else keys_of(store, arguments.name)
    if arguments.accept_template:
        if keys is None:
            raise UsageError("--accept-template needs the NAME of a model")
        for key in keys:
            store.accept_template(key)
    faults: list[Fault] = []
    with ProgressBars() as bars:
        if keys is None:
            faults += store.verify(progress=bars)
        for key in keys or ():
            faults += store.verify(key, progress=bars)
    checked = len(store.installed()) if keys is None else len(keys)
    if arguments.json:
        found = [{"key": f.key, "path": str(f.path), "problem": f.problem} for f in faults]
        print_json({"checked": checked, "faults": found})
    else:
        for fault in faults:
            print(fault)
        print(f"{checked} {'model' if checked == 1 else 'models'} checked: {_verdict(faults)}")
    return 1 if faults else 0


def _verdict(faults: list[Fault]) -> str:
    if not faults:
        return "all as installed."
    count = f"{len(faults)} fault" + ("s" if len(faults) > 1 else "")
    return f"{count}. `phirt pull NAME` repairs a model, `phirt rm NAME` removes it."
