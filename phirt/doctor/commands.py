"""Commands that mend, as the shell of this machine takes them."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

__all__ = [
    "install",
    "quote",
    "reinstall",
    "replace",
    "set_variable",
    "uninstall",
    "unset_variable",
]


def install(*requirements: str) -> str:
    """Install or update distributions, in the environment that runs this."""
    return f"{_pip('install')} {' '.join(map(_quoted, requirements))}"


def reinstall(*requirements: str) -> str:
    """Install what is installed already once more, and nothing that it depends on."""
    return install("--force-reinstall", "--no-deps", *requirements)


def uninstall(names: Iterable[str]) -> str:
    """Uninstall distributions."""
    # uv asks nothing, and knows no such option.
    sure = "" if _uses_uv() else " -y"
    return f"{_pip('uninstall')}{sure} {' '.join(names)}"


def replace(names: Iterable[str], *requirements: str) -> str:
    """Uninstall distributions, then install others (or one of them) in their place."""
    return f"{uninstall(names)} && {install(*requirements)}"


def set_variable(name: str, value: str) -> str:
    """Set an environment variable in the shell."""
    return f"setx {name} {value}" if sys.platform == "win32" else f"export {name}={value}"


def unset_variable(name: str) -> str:
    """Take an environment variable away."""
    return f"Remove-Item Env:{name}" if sys.platform == "win32" else f"unset {name}"


def quote(text: str) -> str:
    """One argument, such as a path."""
    return subprocess.list2cmdline([text]) if sys.platform == "win32" else shlex.quote(text)


def _quoted(requirement: str) -> str:
    """A requirement, whose ``>`` and ``[`` mean something to a shell."""
    return f'"{requirement}"' if set(requirement) & set("<>=![]~;*") else requirement


def _pip(verb: str) -> str:
    if _uses_uv():
        return f"uv pip {verb} --python {quote(sys.executable)}"
    return f"{_python()} -m pip {verb}"


def _uses_uv() -> bool:
    """Whether the environment has no pip of its own, as uv makes them."""
    return importlib.util.find_spec("pip") is None and shutil.which("uv") is not None


def _python() -> str:
    """What to call this environment's Python: ``python``, where that is it."""
    found = shutil.which("python")
    # Not resolved: a virtual environment's Python is a link to another's.
    if found is not None and os.path.normcase(Path(found).parent) == os.path.normcase(
        Path(sys.executable).parent
    ):
        return "python"
    return quote(sys.executable)
