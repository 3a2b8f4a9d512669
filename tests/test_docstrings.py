"""Every public name says what it is, and what it raises."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any, get_type_hints

import pytest

import phirt

# __main__ runs the command line when it is imported.
MODULES = ["phirt"] + [
    info.name
    for info in pkgutil.walk_packages(phirt.__path__, "phirt.")
    if not info.name.endswith("__main__")
]


def public_objects(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """The classes and functions of `__all__`, and the public methods of the classes."""
    for name in getattr(module, "__all__", []):
        value = getattr(module, name)
        if not inspect.isclass(value) and not inspect.isfunction(value):
            continue  # a constant or a type alias: it has no docstring to ask for
        yield name, value
        if inspect.isclass(value):
            for key, member in inspect.getmembers(value, is_documentable):
                if key in vars(value) and not key.startswith("_"):
                    yield f"{name}.{key}", member


def is_documentable(member: object) -> bool:
    return inspect.isroutine(member) or isinstance(member, property)


@pytest.mark.parametrize("name", MODULES)
def test_public_things_are_documented(name):
    module = importlib.import_module(name)
    assert module.__doc__
    assert [name for name, value in public_objects(module) if not inspect.getdoc(value)] == []


FACE = ["bench", "devices", "load", "plan", "pull", "tune"]


@pytest.mark.parametrize("name", FACE)
def test_the_types_of_the_face_can_be_looked_up(name):
    # As documentation and tools do it, which know no `if TYPE_CHECKING`.
    assert "return" in get_type_hints(getattr(phirt, name))


@pytest.mark.parametrize("name", ["bench", "load", "plan", "pull", "tune"])
def test_the_face_of_the_library_says_what_it_raises(name):
    assert "Raises:" in (inspect.getdoc(getattr(phirt, name)) or "")


@pytest.mark.parametrize("name", ["generate", "encode", "score"])
def test_generation_says_what_it_raises(name):
    assert "Raises:" in (inspect.getdoc(getattr(phirt.Model, name)) or "")
