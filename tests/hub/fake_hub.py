"""A model hub on loopback that speaks what huggingface_hub asks for, and misbehaves on order.

Two servers: the hub itself, and a second host to which it redirects for large files, as the
real one does. Both are threads of this process::

    with FakeHub() as hub:
        hub.add_repo("org/name", {"config.json": b"{}", "model.safetensors": b"..."})
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        hub.misbehave("reset", on="model.safetensors", after=1000, times=1)
"""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Mapping
from http.server import ThreadingHTTPServer
from typing import Any, Self

from tests.hub.fake_content import Content, Fault, Literal, Repo, Request, Snapshot
from tests.hub.fake_handler import Handler

__all__ = ["FakeHub"]


class FakeHub:
    """The hub. Closing it frees every request that it keeps waiting.

    Attributes:
        endpoint: The hub's address, for HF_ENDPOINT.
        cdn: The address of the second host.
        requests: What both received, in order.
        connections: How many connections both accepted.
        bytes_sent: Bytes of files that were sent; those of listings do not count.
        accepted: Tokens the hub knows, each with the gated repositories it may read.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.connections = 0
        self.bytes_sent = 0
        self.accepted: dict[str, set[str]] = {}
        self.closing = threading.Event()
        self.lock = threading.Lock()
        self._faults: list[Fault] = []
        self._servers = [_Server(self, "hub"), _Server(self, "cdn")]
        self.endpoint, self.cdn = (server.address for server in self._servers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def add_repo(
        self,
        repo: str,
        files: Mapping[str, bytes | Content],
        *,
        revision: str = "main",
        license: str | None = "apache-2.0",  # noqa: A002 - as the hub calls it
        gated: bool = False,
        private: bool = False,
    ) -> str:
        """Add a repository, or a commit to it, which `revision` then names; its commit."""
        contents = {
            path: Literal(data) if isinstance(data, bytes) else data for path, data in files.items()
        }
        listing = "".join(f"{path}\0{contents[path].sha256}\0" for path in sorted(contents))
        commit = hashlib.sha1(f"{repo}\0{listing}".encode(), usedforsecurity=False).hexdigest()
        entry = self.repos.setdefault(repo, Repo(repo))
        entry.license, entry.gated, entry.private = license, gated, private
        entry.commits[commit] = Snapshot(commit, contents)
        entry.revisions[revision] = commit
        return commit

    def misbehave(
        self,
        kind: str,
        *,
        on: str = "",
        times: int | None = None,
        skip: int = 0,
        after: int = 0,
        **options: Any,
    ) -> None:
        """Do wrong in one way, until `behave` or for a number of times.

        Args:
            kind: On any request ``"status"`` (options: status, headers, body) and
                ``"redirect"`` (to); on a file ``"reset"``, ``"truncate"`` and ``"stall"``
                (after that many bytes), ``"drip"`` (a byte at a time, every `every` seconds),
                ``"ignore_range"``, ``"flip"`` (the byte at `after`), ``"longer"`` (more than
                it said, in chunks), ``"replace"`` (by `data`), ``"gzip"`` (by `data` packed);
                on a listing ``"listing"`` (change, a function of the document) and ``"gzip"``.
            on: A part of the request's path; of a file's name for what the second host sends.
            times: How often.
            skip: How often not, before that.
            after: Bytes of a file, counted from its beginning, range or not.
            options: What the kind takes.
        """
        self._faults.append(Fault(kind, on, times, skip, after, options))

    def behave(self) -> None:
        """Do no wrong from now on."""
        self._faults.clear()

    def take_fault(self, kind: str, path: str) -> Fault | None:
        """The first fault of that kind that applies, counted as used."""
        with self.lock:
            for fault in self._faults:
                if fault.kind == kind and fault.on in path and fault.times != 0:
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    if fault.times is not None:
                        fault.times -= 1
                    return fault
        return None

    def close(self) -> None:
        """Stop both servers and close every connection."""
        self.closing.set()
        for server in self._servers:
            server.stop()


class _Server(ThreadingHTTPServer):
    """One of the two hosts, on a port of its own."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, hub: FakeHub, role: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub = hub
        self.role = role
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self._connections: set[socket.socket] = set()
        self._thread = threading.Thread(
            target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self._thread.start()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.hub.lock:
            self._connections.add(request)
            self.hub.connections += 1
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self.hub.lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is what half of the tests are about."""

    def stop(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()
        with self.hub.lock:
            left = list(self._connections)
        for connection in left:
            self.shutdown_request(connection)
