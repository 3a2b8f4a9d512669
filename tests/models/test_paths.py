from __future__ import annotations

import contextlib

import pytest

from phirt.errors import ModelFormatError, UnsafeModelError
from phirt.models.paths import check_links, plain_name_fault, resolve_inside

BAD_NAMES = [
    "",
    ".",
    "..",
    "../x",
    "/etc/passwd",
    "a/b",
    "..\\x",
    "C:",
    "C:\\x",
    "c:x",
    "\\\\host\\share",
    "//host/share",
    "x\0.onnx",
    "x\n",
    "model.onnx:stream",
    "NUL",
    "nul.onnx",
    "con",
    "COM1.data",
    "x?",
    "*/_ORT_MEM_ADDR_/*",
    " x",
    "x.",
    "x ",
    "\ud800",
    "x" * 201,
    "é" * 101,
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_names_that_are_not_plain_are_refused_on_every_system(name):
    assert plain_name_fault(name)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", ".hidden", "console", "modèle"])
def test_plain_names_are_taken(name):
    assert plain_name_fault(name) is None


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "a//x", "a/./x", "C:/x", "a\\..\\x"])
def test_paths_that_climb_are_refused(tmp_path, name):
    with pytest.raises(UnsafeModelError, match="inside its own folder"):
        resolve_inside(tmp_path, name)


def test_a_path_below_the_folder_is_resolved(tmp_path):
    assert resolve_inside(tmp_path, "a/b.bin") == tmp_path.resolve() / "a" / "b.bin"
    assert resolve_inside(tmp_path, "./b.bin") == tmp_path.resolve() / "b.bin"


def test_a_link_inside_the_folder_is_followed(tmp_path, link):
    (tmp_path / "real").write_text("x")
    link(tmp_path / "name", tmp_path / "real")
    assert resolve_inside(tmp_path, "name") == (tmp_path / "real").resolve()
    check_links(tmp_path)


def test_a_link_out_of_the_folder_is_refused(tmp_path, link):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_text("x")
    link(folder / "name", tmp_path / "secret")
    with pytest.raises(UnsafeModelError, match="leads out of the model folder"):
        resolve_inside(folder, "name")
    with pytest.raises(UnsafeModelError, match="leads out of the model folder"):
        check_links(folder)


def test_a_linked_folder_on_the_way_is_refused(tmp_path, link):
    folder, outside = tmp_path / "model", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    link(folder / "weights", outside)
    with pytest.raises(UnsafeModelError, match="leads out"):
        resolve_inside(folder, "weights/x.bin")


def test_a_loop_of_links_is_no_file(tmp_path, link):
    link(tmp_path / "a", tmp_path / "b")
    link(tmp_path / "b", tmp_path / "a")
    # Python 3.13 resolves a loop to itself, which is no file; earlier ones raise.
    with contextlib.suppress(ModelFormatError):
        assert not resolve_inside(tmp_path, "a").is_file()


def test_a_hugging_face_snapshot_may_lead_to_the_blobs_of_its_repository(tmp_path, link):
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "0123" / "onnx"
    snapshot.mkdir(parents=True)
    blob = repository / "blobs" / "abcd"
    blob.parent.mkdir()
    blob.write_text("x")
    link(snapshot / "model.onnx", blob)
    check_links(snapshot)
    assert resolve_inside(snapshot, "model.onnx") == blob.resolve()


def test_a_hugging_face_snapshot_may_not_lead_to_another_repository(tmp_path, link):
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    other = tmp_path / "models--org--other" / "blobs" / "abcd"
    other.parent.mkdir(parents=True)
    other.write_text("x")
    link(snapshot / "model.onnx", other)
    with pytest.raises(UnsafeModelError):
        resolve_inside(snapshot, "model.onnx")


def test_a_folder_that_is_itself_reached_through_a_link_is_taken(tmp_path, link):
    real = tmp_path / "real"
    real.mkdir()
    (real / "x").write_text("x")
    link(tmp_path / "name", real)
    check_links(tmp_path / "name")
    assert resolve_inside(tmp_path / "name", "x") == (real / "x").resolve()


@pytest.mark.parametrize("character", ["\x1b", "\x9b", "\u2028", "\u202e", "\u2066"])
def test_a_name_gives_a_terminal_no_orders(character):
    assert "forbidden" in str(plain_name_fault(f"model{character}.onnx"))
