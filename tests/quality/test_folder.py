"""Reports as folders: what is in them, and what is never overwritten."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree as ET

import pytest

import phirt
from phirt.devices.record_json import from_json
from phirt.errors import BackendNotInstalledError
from phirt.quality import folder as folder_module
from phirt.quality.report import QualityReport
from tests.installed import require
from tests.quality.conftest import TEXTS

require("matplotlib")


@pytest.fixture(scope="module")
def report(exact, load, checkpoint, edited):
    def damage(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"][:] *= 30

    texts = {**TEXTS, "odd | name": TEXTS["prose"]}
    return phirt.compare_quality(
        exact, load(edited(damage), backend="reference"), text=texts, tokens=384
    )


def test_a_folder_has_a_page_plots_and_the_data(report, tmp_path):
    page = report.save(tmp_path / "deep" / "report")
    assert page == tmp_path / "deep" / "report" / "report.md"
    names = {file.name for file in page.parent.iterdir()}
    assert names == {
        "report.md",
        "report.json",
        "kl-histogram.svg",
        "kl-sections.svg",
        "kl-spans.svg",
    }
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"\]\((.*?)\)", text)) == names - {"report.md"}
    assert "**FAILED: broken" in text
    assert "| odd \\| name |" in text
    for name in names:
        if name.endswith(".svg"):
            assert ET.parse(page.parent / name).getroot().tag.endswith("svg")  # noqa: S314  ours


def test_the_data_are_the_report(report, tmp_path):
    data = json.loads((report.save(tmp_path / "report").parent / "report.json").read_bytes())
    assert data == json.loads(json.dumps(report.to_json()))
    del data["kind"], data["histogram_edges"]
    assert from_json(QualityReport, data, where="report") == report


def test_nothing_else_is_left_beside_it(report, tmp_path):
    report.save(tmp_path / "report")
    report.save(tmp_path / "report")
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_the_same_report_gives_the_same_bytes(report, tmp_path):
    one, other = (report.save(tmp_path / name).parent for name in ("one", "other"))
    for file in one.iterdir():
        assert file.read_bytes() == (other / file.name).read_bytes()


def test_an_empty_folder_and_an_earlier_report_are_replaced(report, tmp_path):
    folder = tmp_path / "report"
    folder.mkdir()
    report.save(folder)
    (folder / "kl-spans.svg").write_text("old")
    report.save(folder)
    assert (folder / "kl-spans.svg").read_text(encoding="utf-8") != "old"


@pytest.mark.parametrize("name", ["thesis.txt", "report.md", "report.json"])
def test_what_is_no_report_is_not_touched(report, tmp_path, name):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / name).write_text("{}")
    with pytest.raises(FileExistsError, match="Name a new or an empty folder"):
        report.save(folder)
    assert [file.read_text() for file in folder.iterdir()] == ["{}"]


def test_a_report_with_something_of_the_users_in_it_is_not_touched(report, tmp_path):
    folder = report.save(tmp_path / "report").parent
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"'notes.txt'"):
        report.save(folder)
    assert (folder / "notes.txt").read_text() == "mine"


def test_a_file_is_not_a_folder(report, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="it is a file"):
        report.save(tmp_path / "file")


def test_a_failure_leaves_the_earlier_report(report, tmp_path, monkeypatch):
    folder = report.save(tmp_path / "report").parent
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder_module, "page_of", fail)
    with pytest.raises(OSError, match="No space"):
        report.save(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_without_matplotlib_the_command_that_installs_it_is_told(report, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "find_spec", lambda name: None)
    with pytest.raises(BackendNotInstalledError, match=r'pip install "phirt\[report\]"'):
        report.save(tmp_path / "report")
    assert list(tmp_path.iterdir()) == []
