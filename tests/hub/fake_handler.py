"""What the fake hub answers: listings, files, redirects, and the faults it was told to show."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import socket
import struct
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tests.hub.fake_content import Content, Literal, Repo, Request, Snapshot

if TYPE_CHECKING:
    from tests.hub.fake_hub import FakeHub

__all__ = ["Handler"]

_STALL_S = 60.0
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


class Handler(BaseHTTPRequestHandler):
    """One connection to either host."""

    protocol_version = "HTTP/1.1"
    server: Any

    @property
    def hub(self) -> FakeHub:
        return cast("FakeHub", self.server.hub)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
        """Tests look at `FakeHub.requests` instead."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.hub.requests.append(Request(self.server.role, self.command, self.path, headers))
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        with contextlib.suppress(ConnectionError, TimeoutError):
            if self._general_fault(path):
                return
            if self.server.role == "cdn":
                self._blob(path)
            elif path == "/api/models":
                self._search(query)
            elif path.startswith("/api/models/"):
                self._api(path.removeprefix("/api/models/"))
            elif "/resolve/" in path:
                self._resolve(path[1:])
            else:
                self._fail(404, "", "no such page")

    # Listings

    def _search(self, query: dict[str, str]) -> None:
        found = [
            {"id": name, "modelId": name}
            for name, repo in self.hub.repos.items()
            if not repo.private
            and query.get("search", "").lower() in name.lower()
            and query.get("author", name.split("/")[0]) == name.split("/")[0]
        ]
        self._json(found[: int(query.get("limit", "1000"))])

    def _api(self, rest: str) -> None:
        match = re.fullmatch(r"([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", rest)
        repo = self._find_repo(match[1]) if match else None
        if match is None or repo is None:
            return
        if match[2] == "tree":
            revision, _, folder = match[3].partition("/")
            snapshot = repo.find(revision)
            document: Any = snapshot and _tree(snapshot, folder)
        else:
            snapshot = repo.find(match[3] or "main")
            document = snapshot and _info(repo, snapshot)
        if snapshot is None:
            self._fail(404, "RevisionNotFound", f"Invalid rev id: {match[3]}")
            return
        fault = self.hub.take_fault("listing", self.path)
        self._json(fault.options["change"](document) if fault else document)

    def _json(self, document: Any) -> None:
        fault = self.hub.take_fault("gzip", self.path)
        body = json.dumps(document).encode()
        headers = {"Content-Type": "application/json"}
        if fault:
            body, headers["Content-Encoding"] = gzip.compress(fault.options["data"], 1), "gzip"
        self._head(200, {**headers, "Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)

    # Files

    def _resolve(self, path: str) -> None:
        repo_name, _, rest = path.partition("/resolve/")
        repo = self._find_repo(repo_name, reads_files=True)
        if repo is None:
            return
        revision, _, name = rest.partition("/")
        snapshot = repo.find(revision)
        if snapshot is None:
            self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif name not in snapshot.files:
            self._fail(404, "EntryNotFound", "Entry not found")
        else:
            headers = {"X-Repo-Commit": snapshot.commit, "ETag": f'"{snapshot.etag(name)}"'}
            if snapshot.is_lfs(name):
                size = snapshot.files[name].size
                headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(size)}
                place = f"/{quote(repo_name)}/{snapshot.commit}/{quote(name)}"
                headers["Location"] = f"{self.hub.cdn}{place}?signature=abc"
                self._head(302, {**headers, "Content-Length": "0"})
            else:
                self._file(name, snapshot.files[name], headers)

    def _blob(self, path: str) -> None:
        organisation, name, commit, file = path[1:].split("/", 3)
        snapshot = self.hub.repos[f"{organisation}/{name}"].commits[commit]
        self._file(file, snapshot.files[file], {"ETag": f'"{snapshot.etag(file)}"'})

    def _file(self, name: str, content: Content, headers: dict[str, str]) -> None:
        if fault := self.hub.take_fault("replace", name):
            content = Literal(fault.options["data"])
        if fault := self.hub.take_fault("gzip", name):
            content = Literal(gzip.compress(fault.options["data"]))
            headers = {**headers, "Content-Encoding": "gzip"}
        start, end, status = 0, content.size, 200
        wanted = _RANGE.fullmatch(self.headers.get("Range", ""))
        if wanted and not self.hub.take_fault("ignore_range", name):
            start, status = int(wanted[1]), 206
            end = min(int(wanted[2]) + 1, end) if wanted[2] else end
            if start >= content.size:
                self._fail(416, "", "Range Not Satisfiable")
                return
            headers = {**headers, "Content-Range": f"bytes {start}-{end - 1}/{content.size}"}
        longer = self.hub.take_fault("longer", name)
        length = {"Transfer-Encoding": "chunked"} if longer else {"Content-Length": end - start}
        self._head(status, {"Accept-Ranges": "bytes", **headers, **length})
        if self.command == "HEAD":
            return
        for block in self._broken(name, content, start, end):
            if longer:
                self.wfile.write(b"%x\r\n" % len(block) + block + b"\r\n")
            else:
                self.wfile.write(block)
            with self.hub.lock:
                self.hub.bytes_sent += len(block)
        while longer:  # until the client has had enough
            self.wfile.write(b"%x\r\n" % (1 << 16) + bytes(1 << 16) + b"\r\n")

    def _broken(self, name: str, content: Content, start: int, end: int) -> Iterator[memoryview]:
        """The blocks of a file, up to where a fault ends them."""
        take = self.hub.take_fault
        cut = take("reset", name) or take("truncate", name) or take("stall", name)
        flip, drip = take("flip", name), take("drip", name)
        stop = min(max(cut.after, start), end) if cut else end
        place = start
        for block in content.blocks(start, stop):
            if flip and place <= flip.after < place + len(block):
                changed = bytearray(block)
                changed[flip.after - place] ^= 1
                block = memoryview(changed)  # noqa: PLW2901 - the one that is sent
            for index in range(len(block) if drip else 0):
                yield block[index : index + 1]
                time.sleep(drip.options["every"] if drip else 0)
            if not drip:
                yield block
            place += len(block)
        if cut:
            self.close_connection = True
            if cut.kind == "stall":
                self.hub.closing.wait(_STALL_S)
            elif cut.kind == "reset":
                # Closing with a linger of zero sends RST rather than FIN.
                self.connection.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
                self.connection.close()

    # What both share

    def _general_fault(self, path: str) -> bool:
        """Answer with a status or a redirect, if told to."""
        if fault := self.hub.take_fault("status", path):
            body = fault.options.get("body", b"")
            headers = {"Content-Length": str(len(body)), **fault.options.get("headers", {})}
            self._head(fault.options["status"], headers)
            self.wfile.write(body)
        elif fault := self.hub.take_fault("redirect", path):
            self._head(302, {"Location": fault.options["to"], "Content-Length": "0"})
        return fault is not None

    def _find_repo(self, name: str, *, reads_files: bool = False) -> Repo | None:
        """The repository, if it is there and the token may see it; answers otherwise."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        known = token in self.hub.accepted
        repo = self.hub.repos.get(name)
        allowed = self.hub.accepted.get(token, set())
        if token and not known:
            self._fail(401, "", "Invalid credentials in Authorization header")
        elif repo is None or (repo.private and name not in allowed):
            # The hub does not say which repositories are there to whoever may not see them.
            self._fail(404 if known else 401, "RepoNotFound", "Repository not found")
        elif repo.gated and reads_files and name not in allowed:
            message = f"Access to model {name} is restricted."
            self._fail(403 if known else 401, "GatedRepo", message)
        else:
            return repo
        return None

    def _fail(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message, "Content-Length": "0"}
        self._head(status, headers | ({"X-Error-Code": code} if code else {}))

    def _head(self, status: int, headers: dict[str, Any]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()


def _info(repo: Repo, snapshot: Snapshot) -> dict[str, Any]:
    """What /api/models/{repo} says with ``blobs=true``."""
    return {
        "_id": "0" * 24,
        "id": repo.name,
        "modelId": repo.name,
        "sha": snapshot.commit,
        "private": repo.private,
        "gated": "auto" if repo.gated else False,
        "disabled": False,
        "tags": [f"license:{repo.license}"] if repo.license else [],
        "cardData": {"license": repo.license} if repo.license else {},
        "siblings": [
            {
                "rfilename": path,
                "size": content.size,
                "blobId": snapshot.blob_id(path),
                **({"lfs": _lfs(content, "sha256")} if snapshot.is_lfs(path) else {}),
            }
            for path, content in snapshot.files.items()
        ],
    }


def _tree(snapshot: Snapshot, folder: str) -> list[dict[str, Any]]:
    """What /api/models/{repo}/tree/{revision} says with ``recursive=true``."""
    return [
        {
            "type": "file",
            "oid": snapshot.blob_id(path),
            "size": content.size,
            "path": path,
            **({"lfs": _lfs(content, "oid")} if snapshot.is_lfs(path) else {}),
        }
        for path, content in snapshot.files.items()
        if path.startswith(f"{folder}/" if folder else "")
    ]


def _lfs(content: Content, name_of_hash: str) -> dict[str, Any]:
    return {name_of_hash: content.sha256, "size": content.size, "pointerSize": 134}
