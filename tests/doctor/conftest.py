"""Made-up installations for the doctor to look at."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from phirt.doctor import commands
from tests.doctor.environments import Environment, metadata


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """A virtual environment that may be broken and mended."""
    return Environment(tmp_path)


class Site:
    """The only folder on the path: what is installed there is all that is installed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def install(self, name, version, *files, requires=(), extras=()):
        info = self.path / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(metadata(name, version, requires, extras))
        files = files or (f"{name.replace('-', '_')}/__init__.py",)
        (info / "RECORD").write_text("".join(f"{file},sha256=x,0\n" for file in files))
        for file in files:
            (self.path / file).parent.mkdir(parents=True, exist_ok=True)
            (self.path / file).write_text("")


@pytest.fixture
def site(tmp_path, monkeypatch) -> Site:
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setattr(sys, "path", [str(folder)])
    monkeypatch.setattr(commands, "_uses_uv", lambda: False)
    return Site(folder)
