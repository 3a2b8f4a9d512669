"""Commands are for the environment that runs the doctor, by the installer that it has."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

from phirt.doctor import commands


@pytest.fixture
def python(monkeypatch):
    """What ``python`` means to the shell."""

    def set_python(path: Path | None) -> None:
        found = {"python": path and str(path), "uv": None}
        monkeypatch.setattr(shutil, "which", found.get)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)

    return set_python


def test_python_is_called_python_where_that_is_it(python):
    python(Path(sys.executable).with_name("python"))
    assert commands.install("openvino") == "python -m pip install openvino"


@pytest.mark.parametrize("other", [Path("/elsewhere/bin/python"), None])
def test_another_environments_python_is_not_meant(python, other):
    python(other)
    assert commands.install("openvino").startswith(commands.quote(sys.executable))


def test_an_environment_without_pip(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    here = f"--python {commands.quote(sys.executable)}"
    assert commands.replace(["a", "b"], "b>=2") == (
        f'uv pip uninstall {here} a b && uv pip install {here} "b>=2"'
    )


def test_what_a_shell_would_take_for_its_own_is_quoted(python):
    python(Path(sys.executable).with_name("python"))
    assert commands.install("a[x]>=1", "b") == 'python -m pip install "a[x]>=1" b'
    assert commands.uninstall(["a", "b"]) == "python -m pip uninstall -y a b"
    assert commands.reinstall("a==1") == (
        'python -m pip install --force-reinstall --no-deps "a==1"'
    )
