"""Who may import whom, read from the syntax tree of every module of phirt.

The tables say it all; the rest finds the imports (relative, lazy and by
`importlib.import_module` too) and holds them against the tables.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import phirt

PACKAGE = Path(phirt.__file__).parent

# From the bottom up: a room may import itself and the rows above its own, never its own row.
LEVELS = [
    ["_version"],
    ["silence"],
    ["errors"],
    ["types"],
    ["protocols"],
    ["text", "generation", "devices", "models"],
    ["backends"],
    ["build"],
    ["dispatch"],
    ["model"],  # with the files of SAME_ROOM: one room
    ["quality"],
    ["benchmark"],
    ["building"],
    ["doctor"],
    ["phirt"],  # phirt/__init__.py, the public names
    ["testing", "cli"],
]
SAME_ROOM = {
    "alternatives": "model",
    "stream": "model",
    "failover": "model",
    "loading": "model",
    "many": "model",
    "prefix_files": "model",
    "prefixes": "model",
    "locate": "model",
    "remote": "model",
    "conversion": "model",
    "forms": "model",
    "pairing": "model",
    "planning": "model",
    "tuning": "model",
    "__main__": "cli",
}

# Beside the standard library: what any room may import, and the rooms of all the rest.
LIGHT = {"filelock", "numpy", "platformdirs", "psutil"}
HOMES = {
    "gguf": {"build"},
    "httpx2": {"models"},  # huggingface_hub's client, whose errors are told apart
    "huggingface_hub": {"models"},
    "jinja2": {"text"},
    "matplotlib": {"benchmark", "quality"},
    "mlx": {"backends", "build"},
    "onnx": {"build"},
    "onnx_ir": {"build"},
    "onnxruntime": {"backends", "build", "devices"},
    "onnxruntime_genai": {"backends", "devices"},
    "openvino": {"backends", "build", "devices"},
    "openvino_genai": {"backends", "build"},
    "packaging": {"doctor"},
    "pytest": {"testing"},
    "rich": {"cli"},
    "tokenizers": {"text", "build"},
    "torch": {"backends", "quality"},
    "transformers": {"backends", "quality"},
}
# The runtimes: inside functions only, except in build/, whose modules are imported lazily.
RUNTIMES = set(HOMES) - {"jinja2", "packaging", "pytest", "rich", "tokenizers"}
# The one file that renders templates, so that there is one sandbox to judge.
JINJA2_FILE = "phirt/text/sandbox.py"

MOST_LINES = 450  # "about 400": a file that needs more has two reasons to change

RANK = {room: rank for rank, row in enumerate(LEVELS) for room in row}


@dataclass(frozen=True)
class Import:
    """One imported module, and whether it is imported when the importer is."""

    module: str
    line: int
    eager: bool


def imports(tree: ast.Module, package: str) -> Iterator[Import]:
    """Every module that a module of `package` imports, with `from x import y` as x.y."""
    pending: list[tuple[ast.AST, bool]] = [(tree, True)]
    while pending:
        node, eager = pending.pop()
        for name in imported_names(node, package):
            yield Import(name, getattr(node, "lineno", 0), eager)
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or typing_only
        pending += [(child, eager and not inside) for child in ast.iter_child_nodes(node)]


def imported_names(node: ast.AST, package: str) -> list[str]:
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=module, names=names, level=level):
            base = package.split(".")[: len(package.split(".")) - level + 1] if level else []
            stem = ".".join([*base, module] if module else base)
            return [f"{stem}.{alias.name}" for alias in names]
        case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]) if ast.unparse(func) in {
            "importlib.import_module",
            "import_module",
            "__import__",
        }:
            return [name]
    return []


def room_of(module: str, root: Path) -> str:
    """The room of ``phirt.<name>...``; ``phirt.load`` and the like belong to phirt itself."""
    name = [*module.split("."), "phirt"][1]
    name = SAME_ROOM.get(name, name)
    is_module = (root / name).is_dir() or (root / f"{name}.py").is_file() or name in RANK
    return name if is_module else "phirt"


def violations(root: Path) -> list[str]:
    """Everything in the package at `root` that breaks a rule of this file."""
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root.parent)
        module = ".".join(relative.with_suffix("").parts)
        package = module.rpartition(".")[0]
        room = room_of(module.removesuffix(".__init__"), root)
        source = path.read_text(encoding="utf-8")
        if room not in RANK:
            found.append(f"{relative.as_posix()}: {room!r} is no room of LEVELS")
            continue
        if len(source.splitlines()) > MOST_LINES:
            found.append(f"{relative.as_posix()}: over {MOST_LINES} lines")
        for item in imports(ast.parse(source), package):
            reason = objection(item, room, relative.as_posix(), root)
            if reason:
                found.append(f"{relative.as_posix()}:{item.line}: {reason}")
    return found


def objection(item: Import, room: str, path: str, root: Path) -> str | None:
    """Why this import is not allowed, or None."""
    top = item.module.split(".")[0]
    if top == "phirt":
        return room_objection(item, room, root)
    if top in HOMES:
        return home_objection(item, top, room, path)
    if top not in LIGHT | sys.stdlib_module_names:
        return f"{top} is neither in LIGHT nor in HOMES"
    return None


def room_objection(item: Import, room: str, root: Path) -> str | None:
    target = room_of(item.module, root)
    if target not in RANK:
        return f"{item.module} is in no room of LEVELS"
    if target != room and RANK[target] >= RANK[room]:
        return f"{room} may not import {target}"
    return None


def home_objection(item: Import, top: str, room: str, path: str) -> str | None:
    if room not in HOMES[top]:
        return f"{room} may not import {top}"
    if top == "jinja2" and path != JINJA2_FILE:
        return f"only {JINJA2_FILE} may import jinja2"
    if top in RUNTIMES and item.eager and room != "build":
        return f"{top} may be imported inside functions only"
    return None


def test_every_import_is_allowed():
    assert violations(PACKAGE) == []


def test_every_room_of_the_package_is_in_the_table():
    names = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert {SAME_ROOM.get(name, name) for name in names} - {"__init__"} <= set(RANK)


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("text/a.py", "from phirt.generation import loop", "text may not import generation"),
        ("text/a.py", "from ..dispatch import plan", "text may not import dispatch"),
        ("text/a.py", "def f():\n    import phirt.model", "text may not import model"),
        ("text/a.py", "from phirt import load", "text may not import phirt"),
        ("text/a.py", "from .. import stream", "text may not import model"),
        ("errors.py", "import phirt.types", "errors may not import types"),
        ("cli/a.py", "import_module('phirt.testing.fake')", "cli may not import testing"),
        ("dispatch/a.py", "import onnxruntime", "dispatch may not import onnxruntime"),
        ("backends/a.py", "import torch", "torch may be imported inside functions only"),
        ("backends/a.py", "if x:\n    from torch import nn", "torch may be imported inside"),
        ("text/a.py", "def f():\n    from jinja2 import sandbox", "only phirt/text/sandbox.py"),
        ("text/a.py", "def f():\n    import requests", "requests is neither in LIGHT"),
        ("model.py", "def f():\n    import rich.console", "model may not import rich"),
        ("attic/a.py", "", "'attic' is no room of LEVELS"),
        ("text/a.py", "from phirt.attic import a", "in no room"),
        ("text/a.py", "\n" * (MOST_LINES + 1), f"over {MOST_LINES} lines"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, path, source, complaint):
    root = planted(tmp_path, {"attic/__init__.py": "", path: source})
    assert any(complaint in line for line in violations(root))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("text/a.py", "from phirt.types import TopK\nfrom .b import c\nimport re"),
        ("text/sandbox.py", "import jinja2"),
        ("stream.py", "from phirt.generation import loop\nfrom . import model"),
        ("backends/a.py", "def f():\n    import onnxruntime"),
        ("backends/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("build/a.py", "import onnx\nfrom phirt.models import store"),
        ("cli/a.py", "import phirt\nfrom phirt import load\nfrom phirt.build import gguf"),
    ],
)
def test_what_is_allowed_is_not_found(tmp_path, path, source):
    assert violations(planted(tmp_path, {path: source})) == []


def planted(tmp_path: Path, files: dict[str, str]) -> Path:
    root = tmp_path / "phirt"
    for name, source in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source, encoding="utf-8")
    return root
