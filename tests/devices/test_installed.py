"""Which packages are installed, by the names of their folders."""

from __future__ import annotations

import os

from phirt.devices.installed import runtime_versions, scan_installed


def test_names_and_versions(tmp_path):
    for name in ("onnxruntime_gpu-1.31.1.dist-info", "Old.Style-2.0.egg-info", "onnxruntime"):
        (tmp_path / name).mkdir()
    found = scan_installed([str(tmp_path), "", str(tmp_path), str(tmp_path / "none.zip")])
    assert [(each.name, each.version) for each in found if each.folder == str(tmp_path)] == [
        ("old-style", "2.0"),
        ("onnxruntime-gpu", "1.31.1"),
    ]


def test_installing_a_version_again_is_a_change(tmp_path):
    folder = tmp_path / "openvino-2026.4.1.dist-info"
    folder.mkdir()
    before = scan_installed([str(tmp_path)])
    os.utime(folder, (1, 1))
    assert scan_installed([str(tmp_path)]) != before


def test_of_two_versions_the_one_that_is_imported_counts(tmp_path):
    path = []
    for version in ("2.13.0", "2.9.0"):
        folder = tmp_path / version
        (folder / f"torch-{version}.dist-info").mkdir(parents=True)
        (folder / "requests-1.0.dist-info").mkdir()
        path.append(str(folder))
    assert runtime_versions(scan_installed(path)) == {"torch": "2.13.0"}
