"""`phirt.build_model`: a model appears in its place whole, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phirt.build.onnx_external import ExternalData
from phirt.build.recipe import Quantization
from phirt.building import build_model
from phirt.errors import (
    ModelFormatError,
    StoreError,
    UnsupportedModelError,
)
from phirt.models.manifest import read_manifest, seal_manifest
from tests.building.folders import content, initializers, is_whole, raising
from tests.installed import require

for package in ("onnxruntime", "openvino", "onnx"):
    require(package)

# The place.


def test_a_model_that_is_there_stays_unless_it_is_to_be_replaced(llama, qwen, place):
    out = place / "out"
    build_model(llama, out, precision="fp32")
    before = content(out)
    with pytest.raises(StoreError, match=r"is a model already.*--overwrite \(overwrite=True\)"):
        build_model(qwen, out)
    assert content(out) == before
    build_model(qwen, out, precision="int4", overwrite=True)
    manifest = read_manifest(out)
    assert manifest is not None
    assert (manifest.architecture, manifest.precision) == ("qwen2", "int4")
    assert is_whole(out)
    assert [path.name for path in place.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_phirt_has_not_built_is_never_replaced(llama, place, overwrite):
    folder, file = place / "folder", place / "file"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    file.write_text("years of work")
    for out in (folder, file):
        with pytest.raises(StoreError, match=r"no model that phirt built.*another folder"):
            build_model(llama, out, overwrite=overwrite)
    assert (folder / "thesis.tex").read_text() == file.read_text() == "years of work"
    assert sorted(path.name for path in place.iterdir()) == ["file", "folder"]


@pytest.mark.skipif(sys.platform == "win32", reason="only administrators make links there")
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("there", ["a model", "an empty folder", "nothing"])
def test_m10_a_link_is_neither_followed_nor_replaced(llama, place, there, overwrite):
    elsewhere, out = place / "elsewhere", place / "out"
    if there == "a model":
        build_model(llama, elsewhere)
    elif there == "an empty folder":
        elsewhere.mkdir()
    before = content(elsewhere) if elsewhere.exists() else None
    out.symlink_to(elsewhere)
    with pytest.raises(StoreError, match=r"is a link.*Name the folder that it leads to"):
        build_model(llama, out, overwrite=overwrite)
    assert out.is_symlink()
    assert (content(elsewhere) if elsewhere.exists() else None) == before


def test_an_empty_folder_is_filled(llama, place):
    (place / "out").mkdir()
    build_model(llama, place / "out")
    assert is_whole(place / "out")


def test_parents_are_made_and_removed_again_where_nothing_came_of_it(llama, place, monkeypatch):
    out = place / "a" / "b" / "out"
    with monkeypatch.context() as patch:
        patch.setattr(ExternalData, "append", raising(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            build_model(llama, out)
    assert not any(place.iterdir())
    (place / "a").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(ExternalData, "append", raising(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            build_model(llama, out)
    assert [path.name for path in place.rglob("*")] == ["a"], "which was there before"
    build_model(llama, out)
    assert is_whole(out)


@pytest.mark.parametrize("below", ["out", "a/out", "a/b/out"])
def test_a_file_where_a_parent_would_be(llama, place, below):
    (place / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written: Not a directory"):
        build_model(llama, place / "file" / below)
    assert [path.name for path in place.rglob("*")] == ["file"]


@pytest.mark.parametrize("below", ["out", "a/b/out"])
def test_a_folder_that_may_not_be_written_to(llama, place, monkeypatch, below):
    def denied(path: Path, *args: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    out = place / below
    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(StoreError, match=r"cannot be written: Permission denied.*may write to"):
        build_model(llama, out)
    assert not any(place.iterdir())


def test_what_cannot_be_read_beside_it_is_not_said_of_the_folder(llama, place, monkeypatch):
    source = shutil.copytree(llama, place / "source")

    def denied(*_: object, **__: object) -> None:
        name = str(source / "model.safetensors")
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)

    monkeypatch.setattr(ExternalData, "append", denied)
    with pytest.raises(PermissionError, match=r"source.model\.safetensors"):
        build_model(source, place / "out")
    assert [path.name for path in place.iterdir()] == ["source"]


def test_the_source_is_not_replaced_by_what_is_made_of_it(llama, place):
    build_model(llama, place / "out", format="safetensors", precision="fp32")
    before = content(place / "out")
    for out in (place / "out", place / "out" / ".." / "out"):
        with pytest.raises(ValueError, match="holds the source"):
            build_model(place / "out", out, overwrite=True)
    assert content(place / "out") == before


def test_somebody_elses_model_that_appears_meanwhile_stays(llama, qwen, place, monkeypatch):
    out = place / "out"

    seal = seal_manifest

    def overtaken(folder: Path, **options: Any) -> None:
        seal(folder, **options)
        if not out.exists():
            with monkeypatch.context() as patch:
                patch.setattr("phirt.building.seal_manifest", seal)
                build_model(qwen, out)

    monkeypatch.setattr("phirt.building.seal_manifest", overtaken)
    with pytest.raises(StoreError, match="is a model already"):
        build_model(llama, out)
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.architecture == "qwen2"
    assert [path.name for path in place.iterdir()] == ["out"]


def test_what_appears_in_the_last_moment_stays_too(llama, place, monkeypatch):
    """Between the last look and the rename, which then fails."""
    out = place / "out"

    def appears(name: str) -> None:
        if name == "publish" and not out.exists():
            out.mkdir()
            (out / "thesis.tex").write_text("years of work")

    monkeypatch.setattr("phirt.models.staging.kill_point", appears)
    with pytest.raises(StoreError, match="no model that phirt built"):
        build_model(llama, out)
    assert (out / "thesis.tex").read_text() == "years of work"
    assert [path.name for path in place.iterdir()] == ["out"]


# While it is built.


def test_blocks_that_do_not_divide_a_matrix(llama, place):
    for calibrate in (False, True):
        chosen = Quantization(block_size=256, calibrate=calibrate)
        for kind in ("onnx", "openvino"):
            with pytest.raises(UnsupportedModelError, match=r"64 columns, which blocks of 256"):
                build_model(
                    llama, place / "out", format=kind, precision="int4", quantization=chosen
                )
    assert not any(place.iterdir())


def test_a_pattern_that_is_of_no_matrix(llama, place):
    with pytest.raises(ValueError, match="'dwon_proj', which matches no matrix"):
        build_model(
            llama,
            place / "a" / "out",
            precision="int4",
            quantization=Quantization(int8_layers=("lm_head", "dwon_proj")),
        )
    assert not any(place.iterdir())


@pytest.mark.parametrize("overwrite", [False, True])
def test_s9_a_disk_that_fills_up(llama, place, monkeypatch, overwrite):
    out = place / "out"
    if overwrite:
        build_model(llama, out, precision="fp32")
    before = content(out) if overwrite else {}
    written = []
    append = ExternalData.append

    def full(data: ExternalData, array: Any) -> Any:
        written.append(array)
        if len(written) == 7:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return append(data, array)

    with monkeypatch.context() as patch:
        patch.setattr(ExternalData, "append", full)
        with pytest.raises(StoreError, match=r"disk space; there are .* MB free. Nothing was left"):
            build_model(llama, out, precision="int4", overwrite=overwrite)
    assert len(written) == 7
    assert [path.name for path in place.iterdir()] == (["out"] if overwrite else [])
    assert (content(out) if overwrite else {}) == before
    build_model(llama, out, precision="int4", overwrite=overwrite)
    assert is_whole(out)


@pytest.mark.parametrize(
    ("kind", "precision"), [("onnx", "fp32"), ("onnx", "int4"), ("openvino", "int4")]
)
def test_m10_nothing_is_written_outside_of_the_folder(llama, place, monkeypatch, kind, precision):
    cwd, temporary = (place.parent / name for name in ("cwd", "temporary"))
    cwd.mkdir()
    temporary.mkdir()
    monkeypatch.chdir(cwd)
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr("tempfile.tempdir", None)
    before = content(llama)
    build_model(llama, Path("../place/out"), format=kind, precision=precision)
    assert not any(cwd.iterdir())
    assert not any(temporary.iterdir())
    assert content(llama) == before
    assert [path.name for path in place.iterdir()] == ["out"]
    assert not any(path.is_symlink() or path.is_dir() for path in (place / "out").iterdir())
    if kind == "onnx":
        locations = {
            entry.value
            for tensor in initializers(place / "out").values()
            for entry in tensor.external_data
            if entry.key == "location"
        }
        assert locations == {"model.onnx.data"}


def test_a_damaged_checkpoint_leaves_nothing(llama, place, tmp_path):
    source = shutil.copytree(llama, tmp_path / "source")
    data = bytearray((source / "model.safetensors").read_bytes())
    data[-4:] = np.float32("nan").tobytes()
    (source / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelFormatError, match="NaN or infinity"):
        build_model(source, place / "a" / "out")
    assert not any(place.iterdir())
