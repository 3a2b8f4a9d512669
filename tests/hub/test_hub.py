"""Asking a hub what a name means, and what it says when it cannot or will not."""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import sys
import time
import tracemalloc

import huggingface_hub
import pytest
from huggingface_hub import constants

from phirt.errors import ModelFormatError, ModelNotFoundError, UnsafeModelError
from phirt.models import hub as hub_module
from phirt.models.hub import HubFile, open_snapshot
from phirt.models.hub_names import HubName
from tests.hub.conftest import FILES, REPO, WEIGHTS, snapshot_of


def test_a_name_means_a_commit_with_all_its_files(hub):
    snapshot = snapshot_of()
    assert snapshot.repo == REPO
    assert snapshot.commit == hub.repos[REPO].revisions["main"]
    assert [file.path for file in snapshot.files] == list(FILES)
    assert snapshot.license == "apache-2.0"
    assert not snapshot.gated
    assert len(hub.requests) == 1


def test_large_files_have_a_sha256_and_small_ones_gits_own(hub):
    files = {file.path: file for file in snapshot_of().files}
    weights = files["onnx/model.onnx.data"]
    assert weights.size == len(WEIGHTS)
    assert weights.digest == weights.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    config = files["config.json"]
    framed = b"blob %d\0" % config.size + FILES["config.json"]
    assert config.sha256 is None
    assert config.digest == hashlib.sha1(framed, usedforsecurity=False).hexdigest()


def test_a_branch_a_tag_and_a_commit_are_revisions(hub):
    old = hub.repos[REPO].revisions["main"]
    new = hub.add_repo(REPO, {"config.json": b"[]"}, revision="refs/pr/1")
    assert snapshot_of(f"{REPO}@refs/pr/1").commit == new
    assert snapshot_of(f"{REPO}@main").commit == old
    assert snapshot_of(f"{REPO}@{new}").commit == new


def test_the_licence_may_be_only_a_tag_or_absent(hub):
    hub.misbehave("listing", times=1, change=lambda info: {**info, "cardData": None})
    assert snapshot_of().license == "apache-2.0"
    hub.misbehave("listing", times=1, change=lambda info: {**info, "cardData": {}, "tags": ["x"]})
    assert snapshot_of().license is None


def test_the_endpoint_is_read_at_every_call(hub, monkeypatch):
    assert snapshot_of().repo == REPO
    monkeypatch.setenv("HF_ENDPOINT", f"{hub.cdn}/nothing/")
    with pytest.raises((ModelNotFoundError, ModelFormatError)):
        snapshot_of()
    monkeypatch.setenv("HF_ENDPOINT", f"{hub.endpoint}/")  # a slash too many
    assert snapshot_of().repo == REPO


# Refusals


def test_a_wrong_name_is_answered_with_the_nearest(hub):
    hub.add_repo("microsoft/Phi-3-mini-4k-instruct-onnx", {"config.json": b"{}"})
    hub.add_repo("org/entirely-else", {"config.json": b"{}"})
    for wrong in ("Microsoft/phi-3-mini-4k-instruct", "microsft/Phi-3-mini-4k-instruct-onnx"):
        with pytest.raises(ModelNotFoundError) as caught:
            snapshot_of(wrong)
        assert f"There is no model '{wrong}'" in str(caught.value)
        assert "Did you mean microsoft/Phi-3-mini-4k-instruct-onnx?" in str(caught.value)
        assert "entirely-else" not in str(caught.value)


def test_a_wrong_name_is_one_also_where_the_search_fails(hub):
    hub.misbehave("status", on="/api/models", status=500)
    hub.misbehave("listing", change=lambda found: found)
    hub.behave()
    hub.misbehave("gzip", on="/api/models?", data=b"[]")
    with pytest.raises(ModelNotFoundError, match="There is no model 'org/tinny' at"):
        snapshot_of("org/tinny")
    assert len(hub.requests) == 3


def test_a_wrong_revision_is_named(hub):
    with pytest.raises(ModelNotFoundError, match=r"org/tiny has no revision 'v9'.*leave it out"):
        snapshot_of(f"{REPO}@v9")


def test_a_private_model_needs_a_token(hub, monkeypatch):
    hub.add_repo("org/mine", {"config.json": b"{}"}, private=True)
    hub.accepted["hf_mine"] = {"org/mine"}
    with pytest.raises(ModelNotFoundError, match=r"no model 'org/mine'.*private.*HF_TOKEN"):
        snapshot_of("org/mine")
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    assert snapshot_of("org/mine").repo == "org/mine"


def test_a_token_that_is_not_valid_is_what_the_error_names(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    with pytest.raises(
        ModelNotFoundError, match=r"does not accept the access token.*HF_TOKEN"
    ) as e:
        snapshot_of()
    assert "hf_expired" not in str(e.value)


def test_another_refusal_is_told_in_the_hubs_words_on_one_line(hub):
    hub.misbehave("status", status=403, headers={"X-Error-Message": "Access\x1b[2J is disabled."})
    with pytest.raises(ModelNotFoundError, match=r"refuses org/tiny: HTTP 403 \(Access \[2J is"):
        snapshot_of()


# Listings that are not what they should be


@pytest.mark.parametrize(
    "path",
    [
        "../outside",
        "a/../../outside",
        "/etc/passwd",
        "C:/windows/x",
        "a\\..\\..\\b",
        "a//b",
        "x\0y",
    ],
)
def test_s1_a_file_that_would_lie_outside_is_refused(hub, path):
    hub.misbehave("listing", change=lambda info: planted(info, rfilename=path))
    with pytest.raises(UnsafeModelError, match="No repository can hold such a file"):
        snapshot_of()


@pytest.mark.parametrize("path", ["aux.txt", "a/con", "what?.png", "ab:c", "trailing.", "a\\b"])
def test_a_file_that_some_system_cannot_hold_is_left_out(hub, path):
    hub.misbehave("listing", change=lambda info: planted(info, rfilename=path))
    assert [file.path for file in snapshot_of().files] == list(FILES)[1:]


def planted(info, **changes):
    first, *others = info["siblings"]
    return {**info, "siblings": [{**first, **changes}, *others]}


@pytest.mark.parametrize(
    "change",
    [
        lambda info: [],
        lambda info: {},
        lambda info: {**info, "sha": "../main"},
        lambda info: {**info, "sha": "A" * 40},
        lambda info: {**info, "siblings": None},
        lambda info: {**info, "siblings": [None]},
        lambda info: planted(info, rfilename=7),
        lambda info: planted(info, size=-1),
        lambda info: planted(info, size=1 << 60),
        lambda info: planted(info, size=True),
        lambda info: planted(info, size=None),
        lambda info: planted(info, blobId="../x"),
        lambda info: planted(info, lfs={"sha256": "../x"}),
        lambda info: planted(info, lfs={"sha256": "0" * 63}),
        lambda info: planted(info, lfs="x"),
    ],
)
def test_a_listing_that_is_none_is_a_typed_error(hub, change):
    hub.misbehave("listing", change=change)
    with pytest.raises(ModelFormatError):
        snapshot_of()


@pytest.mark.parametrize("text", [b"<html>log in</html>", b"[" * 100_000, b"\xff", b""])
def test_m14_an_answer_that_is_no_json_is_a_typed_error(hub, text):
    hub.misbehave("status", status=200, body=text)
    with pytest.raises(ModelFormatError):
        snapshot_of()


def test_s2_a_listing_that_never_ends_is_stopped(hub, monkeypatch):
    monkeypatch.setattr(hub_module, "_MAX_LISTING_BYTES", 100_000)
    hub.misbehave("status", status=200, body=json.dumps(["x" * 200_000]).encode())
    with pytest.raises(ModelFormatError, match="does not end after 100,000 bytes"):
        snapshot_of()


def test_s2_a_compressed_listing_is_not_opened(hub):
    hub.misbehave("gzip", data=bytes(200 << 20))
    tracemalloc.start()
    with pytest.raises(UnsafeModelError, match="packed as 'gzip'"):
        snapshot_of()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 << 20


# No network


def test_offline_asks_nobody_and_imports_nothing(hub, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *a: pytest.fail("a connection"))
    with pytest.raises(ModelNotFoundError, match="offline mode forbids"):
        open_snapshot(HubName.parse(REPO), offline=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotFoundError, match="offline mode forbids"):
        snapshot_of()
    assert hub.requests == []
    program = (
        "import sys; from phirt.models.hub import *; from phirt.models.hub_names import HubName\n"
        "try: open_snapshot(HubName.parse('org/name'), offline=True)\n"
        "except FileNotFoundError: print('huggingface_hub' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert result.stdout.split() == [b"False"]


def test_huggingface_hubs_own_switch_holds_too(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError, match="told to stay offline when this program started"):
        snapshot_of()
    assert hub.requests == []


def test_no_network_is_an_error_soon(network, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    started = time.monotonic()
    with pytest.raises(
        ModelNotFoundError, match=r"tried 2 times: no connection.*Check the network"
    ):
        snapshot_of()
    assert time.monotonic() - started < 5


def test_a_proxy_of_the_environment_is_used(hub, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    huggingface_hub.close_session()
    with pytest.raises(ModelNotFoundError, match="HTTPS_PROXY"):
        snapshot_of()
    assert hub.requests == []
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()
    assert snapshot_of().repo == REPO


@pytest.mark.parametrize(
    ("variable", "value"),
    [("HTTP_PROXY", "nonsense://x"), ("HF_ENDPOINT", "ftp://x"), ("HF_ENDPOINT", "http://[x")],
)
def test_settings_that_make_no_sense_are_a_typed_error(hub, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    huggingface_hub.close_session()
    with pytest.raises(ModelNotFoundError, match=variable.replace("HTTP_", "HTTPS_")):
        snapshot_of()


def test_a_password_in_the_endpoint_is_not_shown(network, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", f"http://me:secret@127.0.0.1:{free_port()}")
    with pytest.raises(ModelNotFoundError) as caught:
        snapshot_of()
    assert "secret" not in str(caught.value)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_a_file_says_what_it_is_checked_against():
    file = HubFile(path="a", size=1, sha256=None, git_sha1="b" * 40)
    assert file.digest == "b" * 40
