"""Fetching files, and rows S2, S5, S6, S7 and S10: what a hub and a line may do meanwhile."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import time
import tracemalloc

import pytest
from huggingface_hub import constants

from phirt.errors import ModelNotFoundError, UnsafeModelError
from phirt.models import hub_download, hub_session
from phirt.models.hub_download import download
from phirt.types import Progress
from tests.hub.conftest import FILES, REPO, WEIGHTS, content_of, files_of, snapshot_of
from tests.hub.fake_content import Generated

DATA = "onnx/model.onnx.data"
TWO_THIRDS = len(WEIGHTS) * 2 // 3


def partial_files(store):
    folder = store.root / "partial"
    return [path for path in folder.rglob("*") if path.is_file()] if folder.exists() else []


def test_the_files_arrive_below_their_paths_and_nothing_else_does(pull, store):
    assert content_of(pull()) == FILES
    assert list(store.root.rglob("*")) == []


def test_only_the_files_that_were_asked_for_are_fetched(hub, pull):
    assert content_of(pull(["config.json"])) == {"config.json": FILES["config.json"]}
    assert not any("model" in request.path.rpartition("/")[2] for request in hub.requests[1:])


def test_one_connection_to_each_host_serves_all(hub, pull):
    hub.add_repo(REPO, {f"{index}.gguf": b"x" for index in range(5)})
    pull()
    assert hub.connections == 2


def test_progress_counts_the_bytes_of_all_files(pull):
    seen: list[Progress] = []
    pull(progress=seen.append)
    total = sum(map(len, FILES.values()))
    assert {(item.stage, item.total, item.unit) for item in seen} == {("download", total, "bytes")}
    assert [item.completed for item in seen] == sorted(item.completed for item in seen)
    assert seen[-1].completed == total


def test_the_commit_is_fetched_whatever_the_branch_says_by_now(hub, pull, snapshot):
    hub.add_repo(REPO, {**FILES, "config.json": b"newer"})
    assert content_of(pull(snapshot=snapshot)) == FILES


def test_what_an_error_says_when_the_file_has_gone(hub, pull, snapshot):
    hub.repos[REPO].commits.clear()
    with pytest.raises(ModelNotFoundError, match="has no revision"):
        pull(snapshot=snapshot)


# What is never fetched


@pytest.mark.parametrize(
    "path",
    [
        "modeling.py",
        "pytorch_model.bin",
        "x/consolidated.00.PT",
        "libops.so",
        "libops.so.1",
        "ops.dll",
        "a.pkl",
    ],
)
def test_programs_and_pickles_are_not_fetched_whoever_asks(hub, pull, path):
    hub.add_repo(REPO, {**FILES, path: b"x"})
    hub.requests.clear()
    with pytest.raises(UnsafeModelError, match="program or a pickle"):
        pull()
    assert [request.path for request in hub.requests if "resolve" in request.path] == []


def test_the_weights_of_openvino_are_no_pickle(hub, pull):
    hub.add_repo(REPO, {"openvino_model.bin": b"weights"})
    assert content_of(pull()) == {"openvino_model.bin": b"weights"}


@pytest.mark.parametrize("path", ["../x", "/x", "a/../../x", "C:\\x", "a\\b", "nul", "", "a\0"])
def test_s1_a_path_that_leads_elsewhere_is_not_written(hub, pull, snapshot, store, path):
    file = dataclasses.replace(snapshot.files[0], path=path)
    with pytest.raises(UnsafeModelError, match="is not fetched"):
        pull(snapshot=dataclasses.replace(snapshot, files=(file,)))
    assert not store.root.exists()


def test_two_paths_that_are_one_on_some_systems_are_refused(hub, pull):
    hub.add_repo(REPO, {"a/Config.json": b"1", "a/config.json": b"2"})
    with pytest.raises(UnsafeModelError, match="upper and lower case"):
        pull()


# S2: more than was said


def test_s2_a_compressed_file_is_not_opened(hub, pull):
    hub.misbehave("gzip", on=DATA, data=bytes(200 << 20))
    tracemalloc.start()
    with pytest.raises(UnsafeModelError, match="packed as 'gzip'"):
        pull()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 << 20


def test_s2_a_file_that_never_ends_is_stopped_at_its_size(hub, pull, store):
    hub.misbehave("longer", on=DATA)
    with pytest.raises(UnsafeModelError, match="it has more than 300,000 bytes"):
        pull()
    assert all(path.stat().st_size <= len(WEIGHTS) for path in partial_files(store))


@pytest.mark.parametrize("size", [0, 1, len(WEIGHTS) - 1, len(WEIGHTS) + 1])
def test_a_file_of_another_size_than_listed_is_refused(hub, pull, size):
    hub.misbehave("replace", on=DATA, data=bytes(size))
    with pytest.raises(UnsafeModelError, match=rf"it has {size} bytes where 300,000 were expected"):
        pull()
    assert sum(DATA in request.path for request in hub.requests) == 2  # the hub, the second host


def test_memory_does_not_grow_with_the_file(hub, pull):
    hub.add_repo(REPO, {"model.safetensors": Generated(64 << 20)})
    tracemalloc.start()
    pull()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 << 20  # the hub's own megabyte included


# S5: going on


def test_s5_after_a_break_only_the_rest_is_sent_again(hub, pull, monkeypatch):
    monkeypatch.setattr(hub_session, "_TRIES", 1)
    hub.misbehave("truncate", on=DATA, after=len(WEIGHTS) * 6 // 10, times=1)
    with pytest.raises(ModelNotFoundError, match=r"tried once: the connection .*kept"):
        pull()
    sent = hub.bytes_sent
    assert content_of(pull()) == FILES
    assert hub.bytes_sent - sent <= 0.45 * sum(map(len, FILES.values()))


KILLED = """
import os, sys
from pathlib import Path
from phirt.models.hub import open_snapshot
from phirt.models.hub_download import download
from phirt.models.hub_names import HubName
from phirt.models.store import Store

snapshot = open_snapshot(HubName.parse("org/large"), offline=False)
folder = Path(sys.argv[2])
folder.mkdir()
seen = []
def progress(item):
    if item.completed > item.total * 0.6:
        os._exit(9)
from phirt.models import hub_download
hub_download._REPORT_EVERY_S = 0
download(snapshot, snapshot.files, folder, store=Store(Path(sys.argv[1])), progress=progress)
"""


def test_s5_after_a_kill_another_process_goes_on(hub, pull, store, tmp_path):
    large = Generated(10 << 20)
    hub.add_repo("org/large", {"a.gguf": large, "b.json": b"{}"})
    command = [sys.executable, "-c", KILLED, str(store.root), str(tmp_path / "killed")]
    killed = subprocess.run(command, check=False, stderr=subprocess.PIPE)
    assert killed.returncode == 9, killed.stderr
    assert len(partial_files(store)) == 1
    assert list((tmp_path / "killed").iterdir()) == []
    sent = hub.bytes_sent
    folder = pull(snapshot=snapshot_of("org/large"))
    assert (folder / "a.gguf").read_bytes() == b"".join(large.blocks(0, large.size))
    # Less what the kernel had taken from the hub and the killed process had not read.
    assert hub.bytes_sent - sent <= 0.45 * large.size
    assert partial_files(store) == []


def test_s5_files_that_were_whole_are_not_fetched_again(hub, pull, monkeypatch):
    monkeypatch.setattr(hub_session, "_TRIES", 1)
    hub.misbehave("status", on="config.json", status=500, times=1)
    hub.add_repo(REPO, {"a.gguf": WEIGHTS, "config.json": b"{}"})
    with pytest.raises(ModelNotFoundError, match="HTTP 500"):
        pull()
    sent = hub.bytes_sent
    assert content_of(pull()) == {"a.gguf": WEIGHTS, "config.json": b"{}"}
    assert hub.bytes_sent - sent == 2


# S6: pieces that do not fit


def test_s6_a_hub_without_range_is_read_from_the_beginning(hub, pull):
    hub.misbehave("truncate", on=DATA, after=TWO_THIRDS, times=1)
    hub.misbehave("ignore_range", on=DATA)
    assert content_of(pull()) == FILES


def test_s6_a_file_that_changed_between_two_tries_is_begun_anew(hub, pull, monkeypatch):
    monkeypatch.setattr(hub_session, "_TRIES", 1)
    hub.misbehave("replace", on=DATA, data=bytes(len(WEIGHTS)), times=1)
    hub.misbehave("truncate", on=DATA, after=TWO_THIRDS, times=1)
    with pytest.raises(ModelNotFoundError):
        pull()
    assert content_of(pull()) == FILES


def test_s6_a_piece_that_arrived_damaged_is_begun_anew(hub, pull):
    hub.misbehave("truncate", on=DATA, after=TWO_THIRDS, times=1)
    hub.misbehave("flip", on=DATA, after=5, times=1)
    assert content_of(pull()) == FILES


@pytest.mark.parametrize("other", [WEIGHTS + b"more", WEIGHTS[:100]], ids=["longer", "shorter"])
def test_s6_a_file_of_another_length_meanwhile_is_begun_anew(hub, pull, other):
    hub.misbehave("truncate", on=DATA, after=TWO_THIRDS, times=1)
    hub.misbehave("replace", on=DATA, data=other, skip=1, times=1)
    assert content_of(pull()) == FILES


def test_s6_a_partial_file_that_is_too_long_is_begun_anew(hub, pull, store, snapshot):
    place = store.root / "partial" / files_of(snapshot, [DATA])[0].digest
    place.mkdir(parents=True)
    (place / "free.x").write_bytes(WEIGHTS + b"more")
    assert content_of(pull()) == FILES
    assert partial_files(store) == []


# S7: another content


def test_s7_one_byte_flipped_is_refused_and_not_kept(hub, pull, store):
    for path in FILES:
        if not FILES[path]:
            continue
        hub.misbehave("flip", on=path, after=7, times=1)
        with pytest.raises(UnsafeModelError, match=rf"{path}.* is not the file .* its hash is"):
            pull([path])
        assert partial_files(store) == []
    assert content_of(pull()) == FILES


def test_s7_a_hub_that_lists_another_hash_is_refused(hub, pull):
    def lie(info):
        for item in info["siblings"]:
            if "lfs" in item:
                item["lfs"]["sha256"] = "0" * 64
        return info

    hub.misbehave("listing", change=lie)
    with pytest.raises(UnsafeModelError, match="not 0000"):
        pull()


def test_s7_a_partial_file_with_a_flipped_byte_is_begun_anew(hub, pull, store, snapshot):
    place = store.root / "partial" / files_of(snapshot, [DATA])[0].digest
    place.mkdir(parents=True)
    (place / "free.x").write_bytes(b"x" + WEIGHTS[1:])
    assert content_of(pull()) == FILES


# S10: faults of the hub and of the line


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_s10_a_fault_that_passes_is_outlasted(hub, pull, status):
    hub.misbehave("status", status=status, times=2)
    assert content_of(pull()) == FILES


@pytest.mark.parametrize("kind", ["reset", "truncate"])
def test_s10_broken_connections_are_gone_on_from(hub, pull, kind):
    for tenth in (3, 6, 9):
        hub.misbehave(kind, on=DATA, after=len(WEIGHTS) * tenth // 10, times=1)
    assert content_of(pull()) == FILES


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"kind": "status", "status": 500, "on": "resolve"}, "HTTP 500"),
        ({"kind": "status", "status": 429, "on": "resolve"}, "HTTP 429"),
        ({"kind": "reset", "on": DATA, "after": 1000}, "the connection"),
        ({"kind": "truncate", "on": DATA, "after": 1000}, "the connection"),
    ],
)
def test_s10_a_fault_that_stays_is_an_error_after_five_tries(hub, pull, fault, reason):
    hub.misbehave(**fault)
    with pytest.raises(ModelNotFoundError, match=rf"tried 5 times: .*{reason}.*kept"):
        pull([DATA])
    assert sum("resolve" in request.path for request in hub.requests) == 5


def test_s10_a_stalled_hub_is_given_up_on(hub, pull, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    hub.misbehave("stall", on=DATA, after=1000)
    started = time.monotonic()
    with pytest.raises(ModelNotFoundError, match="tried 5 times: the hub sent nothing for a while"):
        pull()
    assert time.monotonic() - started < 5 * 5 * 0.3


def test_s10_a_hub_that_crawls_is_given_up_on(hub, pull, monkeypatch):
    monkeypatch.setattr(hub_session, "_SLOW_AFTER_S", 0.2)
    hub.misbehave("drip", on=DATA, every=0.01)
    with pytest.raises(ModelNotFoundError, match=r"only [0-9]+ bytes came within"):
        pull()


def test_s10_retry_after_is_honoured(hub, pull, monkeypatch):
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    for headers in ({"Retry-After": "7"}, {"RateLimit": '"api";r=0;t=55'}, {"Retry-After": "?"}):
        hub.misbehave("status", on="resolve", status=429, headers=headers, times=1)
        pull(["config.json"])
    assert waited == [7.0, 55.0, 0.01]


def test_s10_retry_after_may_be_a_date(hub, pull, monkeypatch):
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr(time, "time", lambda: 784111777.0 - 30)
    date = {"Retry-After": "Sun, 06 Nov 1994 08:49:37 GMT"}
    hub.misbehave("status", on="resolve", status=503, headers=date, times=1)
    pull(["config.json"])
    assert waited == [30.0]


def test_s10_a_hub_that_asks_for_too_much_patience_gets_none(hub, pull):
    hub.misbehave("status", on="resolve", status=429, headers={"Retry-After": "86400"})
    with pytest.raises(ModelNotFoundError, match="asks to wait 86400 seconds"):
        pull()
    assert sum("resolve" in request.path for request in hub.requests) == 1


def test_s10_tries_that_bring_much_do_not_count(hub, pull, monkeypatch):
    monkeypatch.setattr(hub_download, "_PROGRESS_BYTES", 10_000)
    for tenth in range(1, 10):
        hub.misbehave("truncate", on=DATA, after=len(WEIGHTS) * tenth // 10, times=1)
    assert content_of(pull()) == FILES


def test_s10_a_hub_without_range_that_always_breaks_is_given_up_on(hub, pull, monkeypatch):
    monkeypatch.setattr(hub_download, "_PROGRESS_BYTES", 10_000)
    hub.misbehave("ignore_range", on=DATA)
    hub.misbehave("truncate", on=DATA, after=TWO_THIRDS)
    with pytest.raises(ModelNotFoundError, match="tried 5 times"):
        pull()


def test_redirects_without_end_are_an_error(hub, pull):
    hub.misbehave("redirect", on="resolve", to=f"{hub.endpoint}/x/resolve/y")
    with pytest.raises(ModelNotFoundError, match="redirects more than 5 times"):
        pull(["config.json"])


def test_s13_nothing_is_connected_to_where_all_is_in_the_users_cache(
    snapshot, store, tmp_path, monkeypatch
):
    blobs = tmp_path / "hf-home" / "hub" / "models--org--tiny" / "blobs"
    blobs.mkdir(parents=True)
    for file in snapshot.files:
        (blobs / file.digest).write_bytes(FILES[file.path])
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("a connection"))
    download(snapshot, snapshot.files, folder, store=store)
    assert content_of(folder) == FILES


def test_a_full_disk_is_the_disks_error_and_what_was_fetched_is_kept(hub, pull, store, monkeypatch):
    def full(self: object, chunk: bytes) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(hub_download._Fetch, "_advance", full)
        with pytest.raises(OSError, match=os.strerror(28)):
            pull()
    assert content_of(pull()) == FILES
