"""Programs that stand for an engine, found on sys.path by whoever runs on this Python."""

from __future__ import annotations

import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

from phirt.build.engines.environments import EnginePython

__all__ = ["ARGUMENTS", "this_python", "wait_for", "write_module"]

ARGUMENTS = """
import os, signal, subprocess, sys, time
from pathlib import Path
given = dict(zip(sys.argv[1:-1], sys.argv[2:]))
out = Path(given.get("-o", "."))
"""
"""What the module of a fake builder begins with."""


def write_module(folder: Path, name: str, source: str) -> None:
    """Write a module and the packages around it, the source after `ARGUMENTS`."""
    *packages, module = name.split(".")
    for package in packages:
        folder /= package
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").touch()
    text = ARGUMENTS + textwrap.dedent(source)
    (folder / f"{module}.py").write_text(text, encoding="utf-8")


def this_python(folder: Path | None = None) -> EnginePython:
    """This interpreter, with the fake's folder as that of its packages."""
    return EnginePython(python=Path(sys.executable), versions={"fake": "1"}, folder=folder)


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until something is so, and fail where it never is."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
