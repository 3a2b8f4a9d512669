"""Takes things out of the store: models that are not wanted, and whatever is left over.

Nothing here asks whether somebody reads what it takes away. What goes is moved out of
sight in one step, so that a reader has all of it or none: on Linux and macOS files that are
open stay readable, on Windows a folder with an open file does not move and stays.

PHIRT_HOME may be a folder in which somebody keeps other things, under the same names even.
What is not called as the store calls its own is not touched.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from phirt.errors import ModelError, ModelNotFoundError, StoreError
from phirt.models.inventory import COPY_RECORD, is_key, manifests
from phirt.models.manifest import Manifest
from phirt.models.safe_json import read_json
from phirt.models.staging import abandoned, discard, is_idle, lock_of, locked, sweep

__all__ = ["Collected", "collect", "find_unfinished", "remove_model"]

_logger = logging.getLogger(__name__)

_UNCONVERTED_KEPT_S = 24 * 3600.0

_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMPILED = re.compile(r"[0-9a-f]{32}")  # as adapters name what they keep
_PARTIAL = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_HASH_RECORD = re.compile(r"[0-9a-f]{64}\.(json|[0-9a-f]{16})")
_LOCK = re.compile(r"(models|sources|copies|openvino|kv-ranges|partial)-.+\.lock")


@dataclass(frozen=True, slots=True)
class Collected:
    """What `collect` freed.

    Attributes:
        freed: Bytes, by what they were: ``"leftovers"``, ``"partial"``, ``"sources"``,
            ``"copies"``, ``"compiled"``, ``"models"``. What did not occur is not there.
        kept: What should have gone, but is in use.
    """

    freed: Mapping[str, int]
    kept: tuple[Path, ...]

    @property
    def bytes(self) -> int:
        """Bytes freed in all."""
        return sum(self.freed.values())


def remove_model(root: Path, key: str) -> int:
    """Remove an artifact, and the fetched file that only it was made from.

    Args:
        root: The store.
        key: The artifact's key, which has been checked.

    Returns:
        Bytes freed.

    Raises:
        ModelNotFoundError: Somebody else has removed it meanwhile.
        StoreError: It is in use.
        OSError: The store cannot be written.
    """
    target = root / "models" / key
    source = next((_source_id(found) for path, found in manifests(root) if path == target), None)
    with locked(lock_of(target, root)):
        try:
            freed = discard(target, root)
        except FileNotFoundError as error:
            raise ModelNotFoundError(f"There is no model {key!r} in the store any more.") from error
        except PermissionError as error:
            raise StoreError(
                f"{target} cannot be removed: {error.strerror}. Another process may have the model "
                "loaded; close it and try again."
            ) from error
    (root / "used" / key).unlink(missing_ok=True)
    others = {_source_id(manifest) for _, manifest in manifests(root)}
    if source is not None and source not in others and is_idle(root):
        file = root / "sources" / source
        with suppress(FileNotFoundError, PermissionError), locked(lock_of(file, root)):
            freed += discard(file, root)
    return freed


def collect(root: Path, *, converter_version: int) -> Collected:
    """Free what no installed model needs, and what can be made again: see `Store.collect`.

    Raises:
        OSError: The store cannot be written.
    """
    if not root.is_dir():
        return Collected({}, ())
    run = _Collection(root)
    run.count("leftovers", sweep(root))
    artifacts = list(manifests(root))
    old = [path for path, manifest in artifacts if _is_older(manifest, converter_version)]
    run.discard("models", old)
    copies = (path for path in _entries(root / "copies") if (path / COPY_RECORD).is_file())
    run.discard("copies", copies)
    compiled = _entries(root / "openvino", _COMPILED)
    run.discard("compiled", compiled, lock=lambda path: path / "lock")
    run.discard("kv-ranges", _entries(root / "kv-ranges", _COMPILED))
    if is_idle(root):  # a download or a conversion under way reads or writes these
        run.discard("partial", _entries(root / "partial", _PARTIAL))
        converted = {_source_id(manifest) for _, manifest in artifacts}
        sources = _entries(root / "sources", _SHA256)
        run.discard("sources", (path for path in sources if _is_spent(path, converted)))
    _forget_files(root / "hashes")
    for marker in _entries(root / "used"):
        if is_key(marker.name) and not (root / "models" / marker.name).exists():
            with suppress(OSError):  # one that is empty, as they are
                if marker.is_file() and marker.stat().st_size == 0:
                    marker.unlink()
    _remove_locks(root / "locks")
    with suppress(OSError):  # it is not there, or somebody is downloading
        (root / "partial").rmdir()
    return Collected(run.freed, tuple(run.kept))


def find_unfinished(root: Path) -> list[Path]:
    """What `collect` would free of work that was begun and that nobody goes on with now."""
    partial = _entries(root / "partial", _PARTIAL) if is_idle(root) else []
    return [*abandoned(root), *partial]


class _Collection:
    """What one run of `collect` has freed so far."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.freed: dict[str, int] = {}
        self.kept: list[Path] = []

    def count(self, kind: str, size: int) -> None:
        if size:
            self.freed[kind] = self.freed.get(kind, 0) + size

    def discard(
        self, kind: str, paths: Iterable[Path], *, lock: Callable[[Path], Path] | None = None
    ) -> None:
        """Discard what nobody holds the lock of."""
        for path in paths:
            held = FileLock(lock(path) if lock else lock_of(path, self._root))
            try:
                Path(held.lock_file).parent.mkdir(exist_ok=True)
                with suppress(NotImplementedError):  # a file system without locks
                    held.acquire(timeout=0)
                if lock and sys.platform == "win32":
                    held.release()  # it lies in the folder, which would not move
                self.count(kind, discard(path, self._root))
            except FileNotFoundError:
                _logger.debug("%s is gone already", path)
            except (Timeout, PermissionError) as error:
                _logger.info("%s is in use and stays: %s", path, error)
                self.kept.append(path)
            finally:
                held.release()


def _source_id(manifest: Manifest) -> str | None:
    """Name in ``sources/`` of the file that an artifact was converted from.

    A manifest may repeat what a stranger's folder says of itself, ``../..`` too.
    """
    name = str(manifest.source.get("id")).removeprefix("sha256:")
    return name if _SHA256.fullmatch(name) else None


def _is_older(manifest: Manifest, converter_version: int) -> bool:
    version = str(manifest.versions.get("converter", ""))
    return version.isdecimal() and int(version) < converter_version


def _is_spent(source: Path, converted: set[str | None]) -> bool:
    """Whether a fetched file has been converted, or nobody came back to convert it."""
    if source.name in converted:
        return True
    with suppress(OSError):
        return time.time() - source.stat().st_mtime > _UNCONVERTED_KEPT_S
    return False


def _forget_files(records: Path) -> None:
    """Remove the records of files that are gone, and records half written."""
    for record in _entries(records, _HASH_RECORD):
        try:
            path = read_json(record).get("path")
            if isinstance(path, str) and Path(path).exists():
                continue
        except (ModelError, OSError, ValueError):
            _logger.debug("%s cannot be read, and is removed", record)
        record.unlink(missing_ok=True)


def _remove_locks(folder: Path) -> None:
    """Remove the lock files that nobody holds.

    Somebody may have opened one a moment ago and lock it after it is unlinked. Then two
    processes do the same work once, and the store stays right: it does not rest on locks.
    """
    for path in _entries(folder, _LOCK):
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
            if sys.platform == "win32":
                lock.release()  # an open file cannot be removed
            path.unlink(missing_ok=True)
        except (Timeout, OSError, NotImplementedError) as error:
            _logger.debug("%s stays: %s", path, error)
        finally:
            lock.release()


def _entries(folder: Path, name: re.Pattern[str] | None = None) -> list[Path]:
    """What lies in a folder of the store, of that name."""
    try:
        return sorted(e for e in folder.iterdir() if name is None or name.fullmatch(e.name))
    except (FileNotFoundError, NotADirectoryError):
        return []
