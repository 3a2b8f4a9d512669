"""Which packages are installed, from the names of folders alone: reading metadata takes longer."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

__all__ = ["Installed", "runtime_versions", "scan_installed"]

_METADATA = (".dist-info", ".egg-info")
# Packages that a runtime is, or brings, or is a plugin of.
_RUNTIMES = re.compile(r"(onnxruntime|openvino|mlx|torch|transformers|numpy|nvidia-|onnx$)")


@dataclass(frozen=True, slots=True, order=True)
class Installed:
    """One installed distribution.

    Attributes:
        folder: The path entry that it lies in.
        name: Lower case, with dashes.
        version: As its folder's name has it.
        changed_ns: When its metadata was written: installing a version again changes it.
    """

    folder: str
    name: str
    version: str
    changed_ns: int


def scan_installed(path: Iterable[str]) -> list[Installed]:
    """The distributions on a path such as `sys.path`, those that are found first first."""
    return [found for folder in dict.fromkeys(path) for found in sorted(_scan_folder(folder))]


def runtime_versions(installed: Iterable[Installed]) -> dict[str, str]:
    """Versions, by name, of what has to do with a runtime; of several, the one that is imported."""
    versions: dict[str, str] = {}
    for found in installed:
        if _RUNTIMES.match(found.name):
            versions.setdefault(found.name, found.version)
    return dict(sorted(versions.items()))


def _scan_folder(folder: str) -> Iterator[Installed]:
    try:
        with os.scandir(folder or os.curdir) as entries:
            for entry in entries:
                stem, dot, ending = entry.name.rpartition(".")
                if dot + ending in _METADATA:
                    name, _, version = stem.partition("-")
                    name = re.sub(r"[-_.]+", "-", name).lower()
                    changed = entry.stat(follow_symlinks=False).st_mtime_ns
                    yield Installed(folder, name, version, changed)
    except OSError:
        return  # a zip file, or an entry that is not there
