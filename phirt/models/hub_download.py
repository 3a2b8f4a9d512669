"""Fetches files of a hub's repository: each checked, none begun anew that was half there."""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import quote

from phirt.errors import UnsafeModelError
from phirt.models.hashing import BackgroundDigest
from phirt.models.hub import HubFile, HubSnapshot, explain_refusal
from phirt.models.hub_cache import cached_files
from phirt.models.hub_names import HubName, path_fault
from phirt.models.hub_partial import PartialFile
from phirt.models.hub_session import (
    Patience,
    RefusedError,
    TransientError,
    body,
    endpoint,
    open_url,
    shown_endpoint,
)
from phirt.models.kill_points import kill_point
from phirt.models.layouts import is_pickle
from phirt.models.real_files import copy_file
from phirt.models.store import Store
from phirt.types import Progress, ProgressCallback

if TYPE_CHECKING:
    import httpx2

__all__ = ["download", "is_code"]

_logger = logging.getLogger(__name__)

_CODE = {".py", ".pyc", ".so", ".dll", ".dylib", ".exe", ".sh", ".bat", ".ps1", ".jar"}
_BLOCK_BYTES = 1 << 20
_REPORT_EVERY_S = 0.1
# A try that brings this much does not count: a long download on a bad line comes to its end.
_PROGRESS_BYTES = 16 << 20
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")


def download(
    snapshot: HubSnapshot,
    files: Sequence[HubFile],
    folder: Path,
    *,
    store: Store,
    progress: ProgressCallback | None = None,
) -> None:
    """Fetch files of a snapshot into a folder, all of them or none.

    What an earlier download left of them in the store is gone on with, and a file that
    Hugging Face's own cache holds is copied from there; both are hashed. Every file has the
    size and the hash that the snapshot gives, or none is put into the folder.

    Args:
        snapshot: The repository at one commit, as `open_snapshot` returned it.
        files: Some of its files.
        folder: Where they go, below their paths in the repository. Empty, and on the disk of
            the store.
        store: Keeps what has been fetched of a file until all are there.
        progress: Told how it comes along, stage ``"download"``, in bytes of all files, those
            among them that needed no fetching.

    Raises:
        ModelNotFoundError: The hub refuses a file, or cannot be reached: what was fetched
            so far is kept.
        UnsafeModelError: A file is code or a pickle, would lie outside the folder, or is not
            what the snapshot says.
        OSError: The disk is full, or cannot be written.
    """
    _check(snapshot, files)
    report = _Report(sum(file.size for file in files), progress)
    with ExitStack() as stack:
        fetches = []
        for file in files:
            part = stack.enter_context(PartialFile(store.root / "partial" / file.digest))
            fetches.append(_Fetch(snapshot, file, part, report))
            fetches[-1].run()
        report.send()
        for fetch in fetches:
            kill_point("take")
            fetch.move_below(folder)


def is_code(path: str) -> bool:
    """Whether a file of that name is a program, or a pickle, which can hold one.

    Args:
        path: Its path in the repository.
    """
    name = PurePosixPath(path).name
    return is_pickle(name) or any(suffix.lower() in _CODE for suffix in Path(name).suffixes)


def _check(snapshot: HubSnapshot, files: Sequence[HubFile]) -> None:
    seen: set[str] = set()
    for file in files:
        if fault := path_fault(file.path):
            raise UnsafeModelError(
                f"{file.path[:200]!r} of {snapshot.repo} is not fetched: {fault}."
            )
        if is_code(file.path):
            raise UnsafeModelError(
                f"{file.path} of {snapshot.repo} is a program or a pickle, which phirt never "
                "fetches. Name a revision or a subfolder with ONNX, OpenVINO, GGUF or "
                "safetensors files."
            )
        if file.path.casefold() in seen:
            raise UnsafeModelError(
                f"{snapshot.repo} has two files {file.path!r} that differ in nothing but upper "
                "and lower case, which are one file on Windows and macOS. Neither was fetched."
            )
        seen.add(file.path.casefold())


class _Report:
    """Bytes of all files that are there, told now and then."""

    def __init__(self, total: int, progress: ProgressCallback | None) -> None:
        self._total = total
        self._progress = progress
        self._completed = 0
        self._due = 0.0

    def add(self, count: int) -> None:
        """Count bytes; fewer than none where a file is begun anew."""
        self._completed += count
        if self._progress is not None and time.monotonic() >= self._due:
            self.send()

    def send(self) -> None:
        """Tell the state now."""
        if self._progress is not None:
            self._progress(Progress("download", self._completed, self._total, "bytes"))
            self._due = time.monotonic() + _REPORT_EVERY_S


class _Fetch:
    """One file: what is there of it, and the tries to get the rest."""

    def __init__(
        self, snapshot: HubSnapshot, file: HubFile, part: PartialFile, report: _Report
    ) -> None:
        self._snapshot = snapshot
        self._file = file
        self._part = part
        self._report = report
        self._count = 0
        self._digest = _digest(file)
        # Whether what is there came in more than one answer, which may not fit together.
        self._is_pieced = False
        self._name = HubName(repo=snapshot.repo, revision=snapshot.commit, path=file.path)

    def run(self) -> None:
        """Have the whole file, checked, in its partial file."""
        if any(self._take(source) for source in cached_files(self._snapshot, self._file)):
            return
        self._resume()
        patience = Patience(f"{self._file.path} of {self._snapshot.repo}")
        farthest = self._count
        while not self._is_complete():
            try:
                self._try()
            except TransientError as error:
                if self._count >= farthest + _PROGRESS_BYTES:
                    farthest = self._count
                    patience.reset()
                patience.wait(error)
            except RefusedError as refusal:
                explain_refusal(refusal, self._name)

    def move_below(self, folder: Path) -> None:
        """Put the file where it belongs; fetch it again if somebody has removed it."""
        target = folder / self._file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        if not self._part.is_ours:
            self._restart()
            self.run()
        self._part.move_to(target)

    def _take(self, source: Path) -> bool:
        """Copy the file from the user's cache, if what is there is what it should be."""
        try:
            copy_file(source, self._part.path)
            self._part.path.touch()  # a copy keeps the original's time
        except (FileNotFoundError, PermissionError) as error:
            _logger.info("%s cannot be copied: %s", source, error)
            return False
        self._resume()
        if self._count == self._file.size and self._digest.hexdigest() == self._file.digest:
            _logger.info("Took %s from %s", self._name, source)
            return True
        _logger.warning("%s is damaged, and is not used.", source)
        self._restart()
        return False

    def _resume(self) -> None:
        """Hash what is there."""
        with self._part.path.open("rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                self._advance(block)
        self._is_pieced = self._count > 0
        if self._count > self._file.size:
            self._restart()

    def _is_complete(self) -> bool:
        """Whether all is there and right; begins anew where it may become right."""
        if self._count < self._file.size:
            return False
        kill_point("check")
        if self._digest.hexdigest() == self._file.digest and self._part.is_ours:
            return True
        if not self._is_pieced:
            self._refuse(f"its hash is {self._digest.hexdigest()}, not {self._file.digest}")
        _logger.info("The pieces of %s do not fit together. Beginning anew.", self._name)
        self._restart()
        return False

    def _try(self) -> None:
        """Get what is missing, as far as one answer goes."""
        address = f"{self._snapshot.repo}/resolve/{self._snapshot.commit}/{quote(self._file.path)}"
        try:
            with open_url(f"{endpoint()}/{address}", first_byte=self._count) as response:
                self._fit(response)
                self._write(response)
        except RefusedError as refusal:
            if refusal.status != 416 or not self._count:
                raise
            self._restart()
        if self._count < self._file.size:
            raise TransientError("the connection ended too early")

    def _fit(self, response: httpx2.Response) -> None:
        """Bring what is there and what the answer holds together."""
        ranges = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        expected = f"{self._count}", f"{self._file.size}"
        if response.status_code == 206 and not (ranges and ranges.groups() == expected):
            self._restart()  # and ask for the whole, next time
            raise TransientError("the hub sent another part of the file than was asked for")
        if response.status_code == 200 and self._count:
            self._restart()
        self._is_pieced = self._count > 0
        length = response.headers.get("Content-Length", "")
        missing = self._file.size - self._count
        if length.isdecimal() and int(length[:20]) != missing:
            self._refuse(f"it has {length[:20]} bytes where {missing:,} were expected")

    def _write(self, response: httpx2.Response) -> None:
        is_longer = False
        with self._part.path.open("r+b") as stream:
            stream.seek(self._count)
            for chunk in body(response):
                is_longer = self._count + len(chunk) > self._file.size
                if is_longer or not self._part.is_ours:
                    break
                kill_point("chunk")
                stream.write(chunk)
                self._advance(chunk)
        # Only now: Windows removes no file that is open.
        if is_longer:
            self._refuse(f"it has more than {self._file.size:,} bytes")
        if not self._part.is_ours:
            self._restart()
            raise TransientError("another process has taken over the partial file")

    def _advance(self, chunk: bytes) -> None:
        self._digest.update(chunk)
        self._count += len(chunk)
        self._report.add(len(chunk))

    def _restart(self) -> None:
        self._report.add(-self._count)
        self._count = 0
        self._digest = _digest(self._file)
        self._is_pieced = False
        self._part.renew()

    def _refuse(self, problem: str) -> None:
        self._part.discard()
        raise UnsafeModelError(
            f"{self._file.path} of {self._snapshot.repo} is not the file that "
            f"{shown_endpoint()} lists: {problem}. It was not used. Check HF_ENDPOINT and the "
            "proxy, or report it to the model's owner."
        )


def _digest(file: HubFile) -> BackgroundDigest:
    if file.sha256 is not None:
        return BackgroundDigest(hashlib.sha256())
    # git's own names, not a signature: the listing that gives them is what is trusted.
    git = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    return BackgroundDigest(git)
