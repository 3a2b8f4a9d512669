"""Finds installed distributions that have overwritten each other's files.

The builds of one runtime (onnxruntime, onnxruntime-gpu, onnxruntime-webgpu …) are separate
distributions that hold the same package. An installer takes a second one without a word and
writes over the first; what is left imports, mixes two versions, and is mended by neither.
"""

from __future__ import annotations

import csv
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import TypeAlias

from phirt.errors import BackendBrokenError

__all__ = [
    "Conflict",
    "PathState",
    "check_single_owner",
    "find_conflicts",
    "listed_files",
    "path_state",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conflict:
    """A package that several installed distributions own.

    Attributes:
        module: The package, such as ``"onnxruntime"``.
        folder: Where it is installed.
        owners: Versions of the distributions that own it, by name.
    """

    module: str
    folder: Path
    owners: Mapping[str, str]

    @property
    def wanted(self) -> str:
        """The one to keep: the build with a suffix has all that the plain one has."""
        return max(self.owners, key=len)

    def __str__(self) -> str:
        listed = " and ".join(f"{name} {version}" for name, version in self.owners.items())
        return (
            f"{listed} both installed the package {self.module!r} into {self.folder}, and "
            "overwrote each other's files."
        )


def check_single_owner(module: str, *, backend: str) -> None:
    """Refuse a package that several installed distributions own.

    Only distributions whose names begin with the package's are looked at (a plugin such as
    onnxruntime-ep-openvino is, and owns another package), and of each only its RECORD: it
    costs a millisecond and imports nothing. Without a RECORD (conda) or in an editable
    install nothing is known, and nothing is refused.

    Args:
        module: Top-level package, such as ``"onnxruntime"``.
        backend: Name of the backend that needs it, for the message.

    Raises:
        BackendBrokenError: At least two own it; the message has both names and versions, and
            the command that mends it.
    """
    for folder, owners in _owners_on_path(path_state(), module):
        if len(owners) > 1:
            raise _refusal(Conflict(module=module, folder=folder, owners=owners), backend)


PathState: TypeAlias = tuple[tuple[str, int], ...]
"""The entries of ``sys.path``, and when something was last installed in or removed from each."""


def path_state() -> PathState:
    """What is installed, as far as it decides what `importlib.metadata` finds.

    What was found by one state can be kept for as long as it stays.
    """
    return tuple((entry, _changed_at(entry)) for entry in sys.path)


def _changed_at(entry: str) -> int:
    try:
        return os.stat(entry or os.curdir).st_mtime_ns  # noqa: PTH116  # a Path takes as long again
    except OSError:
        return 0


@lru_cache(maxsize=64)
def _owners_on_path(state: PathState, module: str) -> tuple[tuple[Path, dict[str, str]], ...]:
    """Folders of the path up to the one that holds a package, with who owns it there."""
    found = []
    for entry, _ in state:
        folder = Path(entry)
        found.append((folder, _owners(folder, module)))
        if found[-1][1] or (folder / module).is_dir():
            break  # the first entry that holds the package is the one that is imported
    return tuple(found)


def find_conflicts(
    is_looked_at: Callable[[str], bool], *, path: Sequence[str] | None = None
) -> list[Conflict]:
    """All packages that several installed distributions own.

    Other than `check_single_owner`, it looks at every distribution whatever its name, and at
    every file: some runtimes keep their library in one distribution and their package in
    another. It reads every RECORD, which takes tenths of a second.

    Args:
        is_looked_at: Whether a top-level package is of interest. Some are shared on purpose.
        path: Where to look, in the order of ``sys.path``, which is taken where it is None.
    """
    conflicts: dict[str, Conflict] = {}
    imported: set[str] = set()
    for entry in sys.path if path is None else path:
        owners: dict[str, dict[str, str]] = {}
        for distribution in distributions(path=[entry]):
            files = [
                file for file in listed_files(distribution) if is_looked_at(file.partition("/")[0])
            ]
            if files:
                name, version = distribution.name, distribution.version  # read at every use
                for file in files:
                    owners.setdefault(file, {})[name] = version
        for file, versions in sorted(owners.items()):
            module = file.partition("/")[0]
            if len(versions) > 1 and module not in imported:
                known = conflicts[module].owners if module in conflicts else {}
                merged = dict(sorted({**known, **versions}.items()))
                conflicts[module] = Conflict(module=module, folder=Path(entry), owners=merged)
        # The first entry that holds a package is the one that is imported.
        imported |= {file.partition("/")[0] for file in owners}
    return [conflicts[module] for module in sorted(conflicts)]


def listed_files(distribution: Distribution) -> dict[str, int | None]:
    """Sizes in bytes, where recorded, of the files that a distribution says it has installed.

    By path from the folder that it is installed in, with ``/``. What Python compiles, and the
    distribution's own metadata, are left out; so are files elsewhere, such as commands.
    """
    files: dict[str, int | None] = {}
    for row in csv.reader((distribution.read_text("RECORD") or "").splitlines()):
        name, size = row[0] if row else "", row[-1] if row else ""
        if "/" not in name or name.startswith(("../", "/")):
            continue
        if ".dist-info/" not in name and "__pycache__/" not in name:
            files[name] = int(size) if size.isdecimal() else None
    return files


def _owners(folder: Path, module: str) -> dict[str, str]:
    """Versions, by name, of the distributions that installed the package into a folder."""
    owners: dict[str, str] = {}
    try:
        found = sorted(folder.glob(f"{module}*.dist-info"))
    except OSError:
        return owners
    for metadata in found:
        distribution = Distribution.at(metadata)
        record = distribution.read_text("RECORD") or ""
        if re.search(rf'^"?{re.escape(module)}/__init__\.py"?,', record, re.MULTILINE):
            owners[distribution.name] = distribution.version
    return owners


def _refusal(conflict: Conflict, backend: str) -> BackendBrokenError:
    names = " ".join(conflict.owners)
    others = " or ".join(name for name in conflict.owners if name != conflict.wanted)
    return BackendBrokenError(
        f"Backend {backend!r}: {conflict} Keep one of them: "
        f"python -m pip uninstall -y {names} && python -m pip install {conflict.wanted} "
        f"(or install {others} in the end)."
    )
