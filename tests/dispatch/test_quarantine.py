"""A device that computed wrong numbers stays out until its runtime or driver changes."""

from __future__ import annotations

import re

import pytest

from phirt.dispatch import quarantine
from phirt.dispatch.machine_dir import machine_dir, write_record

NOW = {"version": "onnxruntime 1.31.1", "driver": "580.10"}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PHIRT_MACHINE_DIR", str(tmp_path / "machine"))


def add(device="cuda:0", backend="onnxruntime", **changes):
    return quarantine.add(
        backend=backend, device=device, **{**NOW, "reason": "wrong numbers", **changes}
    )


def held(device="cuda:0", backend="onnxruntime", **changes):
    return quarantine.in_force(
        quarantine.entries(), backend=backend, device=device, **{**NOW, **changes}
    )


def test_nobody_is_in_it_at_first():
    assert quarantine.entries() == ()
    assert held() is None


def test_an_entry_is_kept_and_says_why_and_when():
    entry = add()
    assert quarantine.entries() == (entry,)
    assert held() == entry
    assert entry.reason == "wrong numbers"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", entry.when)


@pytest.mark.parametrize(
    "change",
    [
        {"version": "onnxruntime 1.32.0"},
        {"version": None},
        {"driver": "581.0"},
        {"driver": None},
        {"device": "cuda:1"},
        {"backend": "openvino"},
    ],
)
def test_it_holds_for_the_same_versions_only(change):
    add()
    assert held(**change) is None


def test_what_is_found_again_takes_the_place_of_the_old():
    add(driver="580.1")
    second = add(driver="580.2")
    assert quarantine.entries() == (second,)


def test_release_lets_go_what_is_named_or_all():
    first, second = add(), add(device="cuda:1")
    assert quarantine.release("onnxruntime", "cuda:0") == (first,)
    assert quarantine.release("onnxruntime", "cuda:0") == ()
    assert quarantine.entries() == (second,)
    assert quarantine.release() == (second,)
    assert quarantine.entries() == ()


@pytest.mark.parametrize(
    "document",
    [{}, {"entries": 3}, {"entries": [3, {"backend": "x"}, {"backend": 1, "device": "cpu"}]}],
)
def test_what_is_damaged_is_left_out(document):
    path = machine_dir() / "quarantine.json"
    write_record(path, document)
    assert quarantine.entries() == ()
    entry = add()
    assert quarantine.entries() == (entry,)


def test_a_file_that_is_not_json_is_none():
    path = machine_dir() / "quarantine.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\0" * 100)
    assert quarantine.entries() == ()
