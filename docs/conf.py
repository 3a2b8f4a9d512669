"""Sphinx configuration: markdown sources, nitpicky, warnings as errors (see noxfile.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import phirt

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "phirt"
author = "The phirt authors"
copyright = author
version = release = phirt.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"phirt {version}"

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

nitpicky = True
# Other projects' names: their indexes are on the network, and a build must not need it.
# Nor has a type variable of a module's own (_T) a page.
nitpick_ignore_regex = [
    ("py:.*", r"(collections|numpy|pathlib|types)\..*"),
    ("py:class", r"phirt\.(\w+\.)*_[A-Z]\w*"),
    ("py:class", r"Path"),  # as short type hints have it
]

# Single backquotes in docstrings are code; they may name things that have no page.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
# Signatures stand on functions; classes that `load` and `stream` make have none to show.
autodoc_class_signature = "separated"


def keep_first_line(_app: Sphinx, what: str, *rest: Any) -> None:
    """Shield "A prompt: text, or a chat." from napoleon, which takes "A prompt" for its type."""
    if what in {"attribute", "data", "property"}:
        lines: list[str] = rest[-1]
        lines[:0] = ["..", ""]  # an empty comment


def setup(app: Sphinx) -> None:
    """Hook in before napoleon, whose priority is 500."""
    app.connect("autodoc-process-docstring", keep_first_line, priority=400)
