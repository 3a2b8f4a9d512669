"""The store: models that phirt fetched or converted, on this machine's disk.

    ROOT/models/KEY/        one artifact: a model folder with its phirt.json
    ROOT/sources/SHA256/    one file as it was fetched, and source.json about it
    ROOT/copies/KEY/        files of a user's folder that some runtime would not read as links
    ROOT/partial/           downloads that are not finished
    ROOT/openvino/          what a runtime compiled of models
    ROOT/kv-ranges/         how large keys and values of models become (`phirt.backends.kv_ranges`)
    ROOT/hashes/            SHA-256 of users' own files, by path, size and time
    ROOT/used/              when each artifact was last looked up
    ROOT/machine/           what was found out about this machine (`phirt.dispatch.machine_dir`)
    ROOT/engines/           environments of build engines (`phirt.build.engines.environments`)
    ROOT/locks/  ROOT/tmp/  housekeeping of `stage`

ROOT is ``PHIRT_HOME``, or else the platform's folder for a user's data.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from phirt.errors import ModelError, ModelNotFoundError, StoreError, UnsafeModelError
from phirt.models.disk import check_room, free_bytes, is_disk_full, megabytes
from phirt.models.hashing import remembered_sha256, sha256_of
from phirt.models.integrity import Fault, accept_chat_template, check_folder
from phirt.models.inventory import (
    COPY_RECORD,
    SOURCE_RECORD,
    InstalledModel,
    faults_of_model,
    faults_of_models,
    faults_of_sources,
    installed_models,
    is_key,
    mark_used,
)
from phirt.models.manifest import MANIFEST_NAME, read_manifest, seal_manifest
from phirt.models.paths import plain_name_fault
from phirt.models.safe_json import JsonFields, read_json

if TYPE_CHECKING:
    from phirt.models.removal import Collected
    from phirt.models.staging import Fill, Find
    from phirt.types import ProgressCallback

__all__ = ["Store"]


_SHA256 = re.compile(r"[0-9a-f]{64}")


class Store:
    """Models on disk, installed whole or not at all.

    Any number of processes and threads may use one store. Installing the same key at the
    same time is safe: one does the work, the others wait for it and find it done.

    Args:
        root: Where the store lies; ``PHIRT_HOME``, or else the platform's user data
            folder, where not given.

    Raises:
        StoreError: The path begins with the home folder of an unknown user.
    """

    def __init__(self, root: Path | None = None) -> None:
        home = root or os.environ.get("PHIRT_HOME") or _user_data_folder()
        try:
            self.root = Path(home).expanduser().absolute()
        except RuntimeError as error:
            raise StoreError(
                f"The store cannot be at {str(home)!r}: {error} Set PHIRT_HOME to a folder."
            ) from error

    def find(self, key: str) -> Path | None:
        """The installed artifact of that key, or None where there is none.

        Every file is compared with phirt.json: its size and time, and where the time
        differs, its content.

        Raises:
            ModelFormatError: A file was changed since it was installed, or is missing.
            StoreError: The artifact cannot be read.
            UnsafeModelError: Its chat template was changed since it was installed.
            ValueError: The key is not a plain lower-case name.
        """
        path = self._model_path(key)
        try:
            manifest = read_manifest(path)
            if manifest is None:
                return None
            check_folder(path, manifest, sha256=self._remembered_sha256)
        except ModelError:
            if not path.exists():  # removed a moment ago
                return None
            raise
        except OSError as error:
            raise StoreError(f"{path} cannot be read: {error}.") from error
        mark_used(self.root, key)
        return path

    def install(
        self, key: str, fill: Fill, *, name: str | None = None, needed_bytes: int = 0
    ) -> Path:
        """Install an artifact, or return the one that is already there.

        One that is there and damaged, or whose chat template was changed, is replaced.

        Args:
            key: A plain lower-case name that says all that the artifact depends on.
            fill: Called with an empty folder, writes the artifact into it, phirt.json
                last (`write_manifest`). What it raises propagates; nothing is left then.
                Hashes and times are added here.
            name: What the user calls the model.
            needed_bytes: Room that the artifact will take; checked before ``fill`` runs.

        Raises:
            StoreError: The disk is full, or the store cannot be written.
            ValueError: The key is not a plain lower-case name.
        """
        target = self._model_path(key)

        def fill_and_seal(folder: Path) -> None:
            fill(folder)
            seal_manifest(folder, name=name)

        def find() -> Path | None:
            try:
                return self.find(key)
            except ModelError:
                return None

        return self._stage(target, fill_and_seal, find=find, needed_bytes=needed_bytes)

    def installed(self) -> list[InstalledModel]:
        """The installed artifacts, by key. One whose phirt.json is damaged is not among them."""
        return installed_models(self.root)

    def verify(
        self, key: str | None = None, *, progress: ProgressCallback | None = None
    ) -> list[Fault]:
        """Hash every file of an artifact, or of the whole store, and say what is not right.

        Args:
            key: The artifact; None for all of them and the files that were fetched.
            progress: Told how far each file has come, stage ``"hash"``, in bytes.

        Raises:
            ModelNotFoundError: There is no such artifact.
            ValueError: The key is not a plain lower-case name.
        """
        if key is None:
            return [*faults_of_models(self.root, progress), *faults_of_sources(self.root, progress)]
        return faults_of_model(self._existing(key), progress)

    def accept_template(self, key: str) -> None:
        """Accept the chat template that an artifact has now (row M6).

        Raises:
            ModelError: There is no such artifact, or its template cannot be read.
            ValueError: The key is not a plain lower-case name.
        """
        path = self._existing(key)
        manifest = read_manifest(path)
        if manifest is not None:
            with self._disk_errors(key, 0):
                accept_chat_template(path, manifest)

    def remove(self, key: str) -> int:
        """Remove an artifact, and the fetched file that only it was made from.

        It goes out of sight at once and whole. A load that is under way meanwhile
        succeeds, or raises that the model is not there.

        Returns:
            Bytes freed.

        Raises:
            ModelNotFoundError: There is no such artifact.
            StoreError: It is in use (on Windows), or no model, or the store cannot be
                written.
            ValueError: The key is not a plain lower-case name.
        """
        path = self._existing(key)
        if path.is_dir() and not os.path.lexists(path / MANIFEST_NAME):
            raise StoreError(
                f"{path} holds no {MANIFEST_NAME}, so it may be somebody else's, and is not "
                "removed. Delete the folder yourself if nobody needs it."
            )
        from phirt.models.removal import remove_model  # as in _stage

        with self._disk_errors(key, 0):
            return remove_model(self.root, key)

    def collect(self, *, converter_version: int) -> Collected:
        """Free what no installed model needs, and what can be made again.

        These are leftovers of processes that died, unfinished downloads, fetched files
        that were converted, copies of linked folders, compiled models, ranges of keys and
        values, artifacts of older converters, and records of files that are gone. What
        somebody works on is left.

        Args:
            converter_version: What artifacts must have been converted by to be kept
                (`phirt.build.version.CONVERTER_VERSION`).

        Raises:
            StoreError: The store cannot be written.
        """
        from phirt.models.removal import collect  # as in _stage

        with self._disk_errors("nothing", 0):
            return collect(self.root, converter_version=converter_version)

    def find_source(self, sha256: str, filename: str, *, size: int) -> Path | None:
        """The fetched file of that SHA-256, or None.

        Its content was hashed when it was installed; now its size and time of
        modification are compared, and it is hashed again only where the time differs.

        Raises:
            ValueError: The hash or the file name is not one.
        """
        path = self._source_path(sha256, filename)
        try:
            record = JsonFields(
                read_json(path.parent / SOURCE_RECORD), source=str(path.parent / SOURCE_RECORD)
            )
            recorded = record.integer("mtime_ns", minimum=0, maximum=(1 << 63) - 1)
            status = path.stat()
            if status.st_size != size:
                return None
            if status.st_mtime_ns != recorded and sha256_of(path) != sha256:
                return None
        except (ModelError, OSError):
            return None
        return path

    def install_source(
        self, sha256: str, filename: str, fill: Fill, *, size: int, needed_bytes: int = 0
    ) -> Path:
        """Install a fetched file, or return the one that is already there.

        Args:
            sha256: What its content must hash to, in lower-case hex.
            filename: Its plain name.
            fill: Called with an empty folder, writes the file into it.
            size: Its size in bytes.
            needed_bytes: Room that fetching it takes; checked before ``fill`` runs.

        Raises:
            StoreError: The disk is full, or the store cannot be written.
            UnsafeModelError: What ``fill`` wrote has another hash.
            ValueError: The hash or the file name is not one.
        """
        target = self._source_path(sha256, filename)

        def fill_and_record(folder: Path) -> None:
            fill(folder)
            file = folder / filename
            found = sha256_of(file)
            if found != sha256:
                raise UnsafeModelError(
                    f"{filename} was fetched, but is not the file that was asked for: its "
                    f"SHA-256 is {found}, not {sha256}. It was not installed."
                )
            record = {"file": filename, "size": size, "mtime_ns": file.stat().st_mtime_ns}
            (folder / SOURCE_RECORD).write_text(json.dumps(record), encoding="utf-8")

        def find() -> Path | None:
            return self.find_source(sha256, filename, size=size)

        return self._stage(target.parent, fill_and_record, find=find, needed_bytes=needed_bytes)

    def install_copy(self, key: str, fill: Fill, *, needed_bytes: int = 0) -> Path:
        """Install a copy of somebody else's model folder, or return the one that is there.

        Args:
            key: A plain lower-case name that says all that the copy depends on.
            fill: Called with an empty folder, copies the files into it.
            needed_bytes: Room that the copy will take; checked before ``fill`` runs.

        Raises:
            StoreError: The disk is full, or the store cannot be written.
            ValueError: The key is not a plain lower-case name.
        """
        target = self._path_of("copies", key)

        def fill_and_record(folder: Path) -> None:
            fill(folder)
            (folder / COPY_RECORD).write_text(json.dumps(_sizes(folder)), encoding="utf-8")

        def find() -> Path | None:
            try:
                recorded = read_json(target / COPY_RECORD)
                return target if recorded.items() <= _sizes(target).items() else None
            except (ModelError, OSError):
                return None

        return self._stage(target, fill_and_record, find=find, needed_bytes=needed_bytes)

    def _model_path(self, key: str) -> Path:
        return self._path_of("models", key)

    def _existing(self, key: str) -> Path:
        path = self._model_path(key)
        if not os.path.lexists(path):
            raise ModelNotFoundError(
                f"There is no model {key!r} in the store at {self.root}. See `phirt list`."
            )
        return path

    def _remembered_sha256(self, path: Path) -> str:
        return remembered_sha256(path, self.root / "hashes")

    def _path_of(self, kind: str, key: str) -> Path:
        if not is_key(key):
            raise ValueError(
                f"{key!r} cannot name a model in the store: use lower-case letters, digits, "
                "'.', '_' and '-', at most 100, beginning with a letter or digit."
            )
        return self.root / kind / key

    def _source_path(self, sha256: str, filename: str) -> Path:
        if not _SHA256.fullmatch(sha256):
            raise ValueError(f"{sha256!r} is not a SHA-256 in lower-case hex.")
        fault = plain_name_fault(filename)
        if fault or filename == SOURCE_RECORD:
            raise ValueError(f"{filename!r} cannot name a file in the store: {fault or 'taken'}.")
        return self.root / "sources" / sha256 / filename

    def _stage(self, target: Path, fill: Fill, *, find: Find, needed_bytes: int) -> Path:
        found = find()
        if found is not None:
            return found
        # Imported here, with filelock behind it: most uses of a store only look.
        from phirt.models.staging import stage

        def fill_if_it_fits(folder: Path) -> None:
            check_room(folder, needed_bytes)
            fill(folder)

        with self._disk_errors(target.name, needed_bytes):
            return stage(target, fill_if_it_fits, find=find, root=self.root)

    @contextmanager
    def _disk_errors(self, name: str, needed_bytes: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if is_disk_full(error):
                needs = f"about {megabytes(needed_bytes)}" if needed_bytes else "more"
                raise StoreError(
                    f"Installing {name} needs {needs} of disk space; {self.root} has "
                    f"{megabytes(free_bytes(self.root))} free. Nothing was left behind. Free "
                    "some space, or set PHIRT_HOME to a folder on another disk."
                ) from error
            if isinstance(error, OSError) and _is_within(error, self.root):
                raise StoreError(
                    f"The store at {self.root} cannot be written: {error}. Set PHIRT_HOME to a "
                    "folder that you may write to."
                ) from error
            raise


def _sizes(folder: Path) -> dict[str, int]:
    """Size in bytes of every file in a copied folder, by its path in it."""
    return {
        file.relative_to(folder).as_posix(): file.stat().st_size
        for file in folder.rglob("*")
        if file.is_file() and file.name != COPY_RECORD
    }


def _user_data_folder() -> Path:
    # Imported here: `import phirt` reaches this module, and should stay quick.
    import platformdirs

    return platformdirs.user_data_path("phirt", appauthor=False)


def _is_within(error: OSError, root: Path) -> bool:
    names = [name for name in (error.filename, error.filename2) if isinstance(name, str | Path)]
    return any(Path(name).is_relative_to(root) or root.is_relative_to(name) for name in names)
