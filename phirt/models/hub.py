"""What a Hugging Face hub holds under a name: one commit, and its files with their hashes."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import quote, urlencode

from phirt.errors import ModelFormatError, ModelNotFoundError, PhirtError, UnsafeModelError
from phirt.models.hub_names import HubName, path_fault
from phirt.models.hub_session import (
    Patience,
    RefusedError,
    TransientError,
    body,
    endpoint,
    open_url,
    shown_endpoint,
)
from phirt.models.pypi import is_offline
from phirt.models.safe_json import JsonFields, parse_json

__all__ = ["HubFile", "HubSnapshot", "explain_refusal", "open_snapshot"]

_logger = logging.getLogger(__name__)

# A hundred bytes a file or so: the largest repositories list some ten thousand.
_MAX_LISTING_BYTES = 32 << 20
_MAX_FILE_BYTES = 1 << 50
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CLIMBS = re.compile(r"(\A|[/\\])\.{0,2}([/\\]|\Z)|\A[A-Za-z]:|\0")
_MOST_CANDIDATES = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFile:
    """A file of a repository.

    Attributes:
        path: Its path in the repository, with ``/``.
        size: Its size in bytes.
        sha256: SHA-256 of its content, in lower-case hex; None for a small file, which git
            itself keeps.
        git_sha1: git's name of the small file: SHA-1 of a header and the content. Of a file
            with a SHA-256, that of the pointer to it.
    """

    path: str
    size: int
    sha256: str | None
    git_sha1: str

    @property
    def digest(self) -> str:
        """What the content is checked against: SHA-256, or else git's SHA-1."""
        return self.sha256 or self.git_sha1


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSnapshot:
    """A repository at one commit.

    Attributes:
        repo: The repository, ``"org/name"``.
        commit: The commit, 40 digits of hex.
        files: All its files that can lie below a folder on every system.
        license: The licence that its card names, if it names one.
        gated: Whether its conditions must be accepted before it is sent.
    """

    repo: str
    commit: str
    files: tuple[HubFile, ...]
    license: str | None
    gated: bool


def check_hub_online(name: HubName, *, offline: bool) -> None:
    """Raise `ModelNotFoundError` where a hub must not be asked for a model."""
    if is_offline(offline):
        raise ModelNotFoundError(
            f"{name} is not in the store, and offline mode forbids asking a hub for it. Run "
            "once without offline=True and HF_HUB_OFFLINE, or name a model folder."
        )


def open_snapshot(name: HubName, *, offline: bool) -> HubSnapshot:
    """Ask the hub which commit a name means, and which files that has.

    Args:
        name: The model. Its path is not looked at.
        offline: Raise instead.

    Raises:
        ModelNotFoundError: There is no such model or revision, it may not be seen, or the
            hub cannot be reached or must not be.
        ModelFormatError: What the hub answered is no listing.
        UnsafeModelError: It lists a file that would lie outside the model's folder.
    """
    check_hub_online(name, offline=offline)
    revision = "" if name.revision is None else f"/revision/{quote(name.revision, safe='')}"
    try:
        data = _fetch(f"/api/models/{name.repo}{revision}?blobs=true", what=str(name))
    except RefusedError as refusal:
        explain_refusal(refusal, name)
    return _snapshot(name, data)


def explain_refusal(refusal: RefusedError, name: HubName) -> NoReturn:
    """Raise what the hub's refusal means for whoever asked, and what to do about it.

    Args:
        refusal: What the hub answered.
        name: What was asked for; with a path, one of its files.

    Raises:
        ModelNotFoundError: Always.
    """
    page = f"{shown_endpoint()}/{name.repo}"
    log_in = "Create an access token there and set HF_TOKEN to it, or run `hf auth login`."
    if refusal.code == "GatedRepo" and not refusal.authenticated:
        text = (
            f"{name} is gated: its conditions must be accepted before it is sent, and no access "
            f"token is set. Open {page}, accept them. {log_in}"
        )
    elif refusal.code == "GatedRepo":
        text = (
            f"{name} is gated, and the account of the access token that was sent has not been "
            f"let in. Open {page} with that account and accept the conditions; a fine-grained "
            "token must also be allowed to read gated models."
        )
    elif refusal.code == "RevisionNotFound":
        text = (
            f"{name.repo} has no revision {name.revision or 'main'!r}. Name a branch, a tag or "
            f"a commit of {page}, or leave it out."
        )
    elif refusal.code == "EntryNotFound":
        text = f"{name.repo} has no file {name.path!r} at that commit. Pull the model again."
    elif refusal.status == 401 and refusal.authenticated and refusal.code != "RepoNotFound":
        text = (
            f"{shown_endpoint()} does not accept the access token that was sent: {refusal}. "
            "Set HF_TOKEN to a valid one, or unset it for public models; `hf auth login` "
            "replaces the one that is saved."
        )
    elif refusal.status in {401, 404}:
        near = _near_names(name.repo)
        suggestion = f" Did you mean {' or '.join(near)}?" if near else ""
        private = "" if refusal.authenticated else f" If it is private: {log_in}"
        text = f"There is no model {name.repo!r} at {shown_endpoint()}.{suggestion}{private}"
    else:
        text = f"{shown_endpoint()} refuses {name}: {refusal}. See {page}."
    raise ModelNotFoundError(text) from refusal


def _fetch(path: str, *, what: str, tries: bool = True) -> bytes:
    """A listing of the hub, whole."""
    patience = Patience(what)
    while True:
        try:
            with open_url(endpoint() + path) as response:
                data = bytearray()
                for chunk in body(response):
                    data += chunk
                    if len(data) > _MAX_LISTING_BYTES:
                        raise ModelFormatError(
                            f"What {shown_endpoint()} says about {what} does not end after "
                            f"{_MAX_LISTING_BYTES:,} bytes. Check HF_ENDPOINT."
                        )
                return bytes(data)
        except TransientError as error:
            if not tries:
                raise
            patience.wait(error)


def _near_names(repo: str) -> list[str]:
    """Names of the hub that look like one that it has not, the likeliest first."""
    organisation, _, model = repo.partition("/")
    words = sorted(re.findall(r"[A-Za-z0-9]{3,}", model), key=len, reverse=True)
    queries = [{"author": organisation}, *({"search": word} for word in words[:1])]
    found: set[str] = set()
    for query in queries:
        address = f"/api/models?{urlencode({**query, 'limit': _MOST_CANDIDATES})}"
        try:
            data = _fetch(address, what="the list of models", tries=False)
            found |= _names(data)
        except (PhirtError, RefusedError, TransientError) as error:
            _logger.debug("The hub cannot be searched for names like %s: %s", repo, error)
    # By lower case: the hub's names differ from what is typed in that, more often than not.
    spelled = {name.lower(): name for name in sorted(found)}
    return [spelled[name] for name in difflib.get_close_matches(repo.lower(), spelled)]


def _names(data: bytes) -> set[str]:
    listed = parse_json(b'{"models":' + data + b"}", source="the hub's list of models")["models"]
    names = set()
    for item in listed if isinstance(listed, list) else []:
        try:
            names.add(HubName.parse(str(item["id"])).repo)
        except (KeyError, TypeError, ValueError):
            continue
    return names


def _snapshot(name: HubName, data: bytes) -> HubSnapshot:
    source = f"What {shown_endpoint()} says about {name}"
    fields = JsonFields(parse_json(data, source=source), source=source)
    commit = fields.string("sha")
    siblings = fields.value("siblings")
    if not _COMMIT.fullmatch(commit) or not isinstance(siblings, list):
        raise ModelFormatError(f"{source} names no commit and files. Check HF_ENDPOINT.")
    files = []
    for entry in siblings:
        file = _file(entry, f"{source}, of a file")
        if fault := path_fault(file.path):
            if _CLIMBS.search(file.path):
                raise UnsafeModelError(
                    f"{shown_endpoint()} lists {file.path[:200]!r} as a file of {name}: {fault}. "
                    "No repository can hold such a file, so nothing of it was fetched."
                )
            _logger.info("%s has a file %r, which is left out: %s", name, file.path, fault)
        else:
            files.append(file)
    return HubSnapshot(
        repo=name.repo,
        commit=commit,
        files=tuple(files),
        license=_license(fields),
        gated=bool(fields.value("gated")),
    )


def _file(entry: Any, source: str) -> HubFile:
    if not isinstance(entry, Mapping):
        raise ModelFormatError(f"{source} is not an object. Check HF_ENDPOINT.")
    fields = JsonFields(entry, source=source)
    path = fields.string("rfilename")
    git_sha1 = fields.string("blobId")
    sha256 = fields.optional_string("lfs.sha256")
    size = fields.integer("size", minimum=0, maximum=_MAX_FILE_BYTES)
    if not _COMMIT.fullmatch(git_sha1) or not (sha256 is None or _SHA256.fullmatch(sha256)):
        raise ModelFormatError(f"{source}, {path[:200]!r}, gives no valid hash.")
    return HubFile(path=path, size=size, sha256=sha256, git_sha1=git_sha1)


def _license(fields: JsonFields) -> str | None:
    """What the card says, or the tag that the hub makes of it; fit to be shown on a terminal."""
    card = fields.value("cardData")
    named = card.get("license") if isinstance(card, Mapping) else None
    if isinstance(named, str):
        return _plain(named)
    tags = fields.value("tags")
    for tag in tags if isinstance(tags, list) else []:
        if isinstance(tag, str) and tag.startswith("license:"):
            return _plain(tag.removeprefix("license:"))
    return None


def _plain(text: str) -> str:
    """A stranger's words without what a terminal would take for orders."""
    return re.sub(r"[^ -~]+", " ", text).strip()[:100]
