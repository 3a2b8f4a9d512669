"""Whether the store of models can be used, and whether what lies in it is sound."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from phirt.dispatch.machine_dir import machine_dir
from phirt.doctor.commands import quote, set_variable
from phirt.doctor.finding import Finding
from phirt.errors import ModelError, StoreError, UnsafeModelError
from phirt.models.catalog import list_models
from phirt.models.hashing import remembered_sha256
from phirt.models.integrity import Fault, check_folder
from phirt.models.inventory import InstalledModel, is_key
from phirt.models.manifest import MANIFEST_NAME, read_manifest
from phirt.models.removal import find_unfinished
from phirt.models.safe_json import read_json
from phirt.models.store import Store
from phirt.types import ProgressCallback

__all__ = ["examine_records", "examine_store"]

# Fetching and converting the default model takes 0.3 GB; a model of 4 billion parameters, 5 GB.
_LEAST_FREE_BYTES = 2_000_000_000
# A backend for which `phirt pull` converts to each layout.
_BACKENDS = {
    "onnx-genai": "onnxruntime",
    "openvino": "openvino",
    "safetensors": "transformers",
}


def examine_store(*, deep: bool, progress: ProgressCallback | None) -> Iterator[Finding]:
    """The folder, its disk, what was left unfinished, and every model.

    Args:
        deep: Read and hash every file, where else its size and time are compared.
        progress: Told how far hashing has come.
    """
    findings: list[Finding] = []
    try:
        store = Store()
        findings += _examine_root(store.root)
        findings += _examine_leftovers(store)
        findings += _examine_models(store, deep, progress)
        models = store.installed()
    except (StoreError, OSError) as error:
        # What cannot be written may not be readable either, and is told once.
        yield from findings or [_unusable(str(error))]
        return
    yield from findings
    if not findings:
        size = _bytes(sum(model.bytes for model in models))
        how = "every file hashed" if deep else "sizes and times as installed"
        count = f"{len(models)} model{'s' * (len(models) != 1)}"
        found = f"{store.root}: {count}, {size}; {how}."
        yield Finding(severity="ok", area="store", found=found)


def _unusable(found: str) -> Finding:
    return Finding(
        severity="broken",
        area="store",
        found=found,
        why="No model can be fetched or converted. Take another folder for them.",
        command=set_variable("PHIRT_HOME", quote(str(Path.home() / "phirt-models"))),
    )


def _examine_root(root: Path) -> Iterator[Finding]:
    nearest = root
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    try:
        # Asking for permissions says little on Windows and on network drives: try it.
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        reason = error.strerror or error
        yield _unusable(f"The store at {root} cannot be written: {reason}.")
        return
    free = shutil.disk_usage(nearest).free
    if free < _LEAST_FREE_BYTES:
        yield Finding(
            severity="warning",
            area="store",
            found=f"{_bytes(free)} are free on the disk of the store at {root}.",
            why=(
                "A model of 4 billion parameters takes about 5 GB while it is converted. Remove "
                "models (`phirt list`, `phirt rm NAME`), or set PHIRT_HOME to another disk."
            ),
        )


def _examine_leftovers(store: Store) -> Iterator[Finding]:
    unfinished = find_unfinished(store.root)
    if unfinished:
        size = sum(file.lstat().st_size for path in unfinished for file in (path, *path.rglob("*")))
        count = len(unfinished)
        what = "downloads or conversions were" if count > 1 else "download or conversion was"
        yield Finding(
            severity="note",
            area="store",
            found=f"{count} {what} not finished in {store.root}: {_bytes(size)}.",
            why="A pull goes on with what it finds of a download; what nobody wants takes room.",
            command="phirt gc",
        )


def _examine_models(
    store: Store, deep: bool, progress: ProgressCallback | None
) -> Iterator[Finding]:
    models = {model.key: model for model in store.installed()}
    faults: dict[str, list[Fault]] = {}
    for fault in store.verify(progress=progress) if deep else _quick_faults(store):
        faults.setdefault(fault.key, []).append(fault)
    for key, found in faults.items():
        more = f" {len(found) - 1} more of its files are." if len(found) > 1 else ""
        yield _describe(key, _sentence(found[0]) + more, models.get(key), store)


def _quick_faults(store: Store) -> Iterator[Fault]:
    """What sizes and times tell; a file whose time has changed is hashed."""
    hashed = partial(remembered_sha256, records=store.root / "hashes")
    folder = store.root / "models"
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not path.is_dir() or not is_key(path.name):
            continue
        try:
            manifest = read_manifest(path)
            if manifest is not None:
                check_folder(path, manifest, sha256=hashed)
                continue
            problem = f"has no {MANIFEST_NAME}."
        except UnsafeModelError as error:
            problem = f"is refused: {error}"
        except (ModelError, OSError) as error:
            # It names the file, and advises what is a command here.
            problem = str(error).partition(" Install the model again")[0]
            problem = problem.removeprefix(f"{path}{os.sep}")
        yield Fault(key=path.name, path=path, problem=problem)


def _sentence(fault: Fault) -> str:
    """A fault, with its model's key in place of the whole path."""
    file = "" if fault.path.name == fault.key else f"{fault.path.name} "
    return f"{fault.key}: {file}{fault.problem}"


def _describe(key: str, found: str, model: InstalledModel | None, store: Store) -> Finding:
    if not is_key(key) or not (store.root / "models" / key).is_dir():
        return Finding(
            severity="note",
            area="store",
            found=found,
            why="It is a file as it was fetched, and is fetched again when it is wanted.",
        )
    if model is None and not os.path.lexists(store.root / "models" / key / MANIFEST_NAME):
        return Finding(
            severity="warning",
            area="store",
            found=found,
            why="It may be somebody else's folder. phirt neither uses nor removes it.",
        )
    command = None if model is None else _pull(model)
    return Finding(
        severity="broken",
        area="store",
        found=found,
        why=(
            "Loading it is refused. Fetching it again replaces it."
            if command
            else "Loading it is refused. What it was made from is needed to make it again."
        ),
        command=command or f"phirt rm {key}",
    )


def _pull(model: InstalledModel) -> str | None:
    """The command that makes an artifact anew, or None for one from the user's own file."""
    is_known = model.name in {entry.name for entry in list_models()}
    if not is_known and not isinstance(model.manifest.source.get("repository"), str):
        return None
    command = f"phirt pull {quote(model.name)}"
    if "converter" not in model.manifest.versions:
        return command
    # Its files may not tell its layout any more; its key does.
    backends = [name for layout, name in _BACKENDS.items() if f"-{layout}-" in model.key]
    backend = f" --backend {backends[0]}" if backends else ""
    return f"{command} --precision {model.precision}{backend}"


def examine_records() -> Iterator[Finding]:
    """The files in which phirt keeps what it found out about this machine."""
    try:
        folder = machine_dir()
        paths = sorted(folder.glob("*.json"))
    except (StoreError, OSError):
        return  # as the store says
    damaged = [path for path in paths if not _can_be_read(path)]
    if damaged:
        names = ", ".join(path.name for path in damaged)
        yield Finding(
            severity="warning",
            area="records",
            found=f"{names} in {folder} cannot be read.",
            why="What they said is not used: devices are asked, and speeds measured, again.",
            command=f"{_remove()} {' '.join(quote(str(path)) for path in damaged)}",
        )
    elif paths:
        yield Finding(
            severity="ok", area="records", found=f"{folder}: {len(paths)} in all, and readable."
        )


def _can_be_read(path: Path) -> bool:
    try:
        read_json(path, max_bytes=4 << 20)
    except FileNotFoundError:  # removed a moment ago
        return True
    except (ModelError, OSError):
        return False
    return True


def _remove() -> str:
    return "del" if os.name == "nt" else "rm"


def _bytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 5e7 else f"{size / 1e6:,.1f} MB"
