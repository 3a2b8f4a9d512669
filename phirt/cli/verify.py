"""``phirt verify``: whether the models are still what was installed."""

from __future__ import annotations

import argparse
from dataclasses import replace

from phirt.cli.arguments import UsageError
from phirt.cli.progress import ProgressBars
from phirt.cli.selection import keys_of, print_json
from phirt.cli.terminal import plain
from phirt.models.integrity import Fault
from phirt.models.store import Store
from phirt.types import Progress, ProgressCallback

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
        report = _Whole(bars, _bytes_of(store, keys))
        if keys is None:
            faults += store.verify(progress=report)
        for key in keys or ():
            faults += store.verify(key, progress=report)
    checked = len(store.installed()) if keys is None else len(keys)
    if arguments.json:
        found = [{"key": f.key, "path": str(f.path), "problem": f.problem} for f in faults]
        print_json({"checked": checked, "faults": found})
    else:
        for fault in faults:
            print(plain(str(fault)))
        print(f"{checked} {'model' if checked == 1 else 'models'} checked: {_verdict(faults)}")
    return 1 if faults else 0


class _Whole:
    """Reports all files as one, where each is reported by itself."""

    def __init__(self, report: ProgressCallback, total: int) -> None:
        self._report = report
        self._total = total
        self._before = 0

    def __call__(self, progress: Progress) -> None:
        completed = min(self._before + progress.completed, self._total)
        self._report(replace(progress, completed=completed, total=self._total))
        if progress.completed == progress.total:
            self._before += progress.completed


def _bytes_of(store: Store, keys: list[str] | None) -> int:
    models = [model.bytes for model in store.installed() if keys is None or model.key in keys]
    fetched = (store.root / "sources").rglob("*") if keys is None else ()
    return sum(models) + sum(path.stat().st_size for path in fetched if path.is_file())


def _verdict(faults: list[Fault]) -> str:
    if not faults:
        return "all as installed."
    count = f"{len(faults)} fault" + ("s" if len(faults) > 1 else "")
    return f"{count}. `phirt pull NAME` repairs a model, `phirt rm NAME` removes it."
