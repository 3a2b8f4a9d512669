from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models.model_files import write_model_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A genai folder without fault."""
    return write_model_folder(tmp_path / "model")


@pytest.fixture
def link() -> Callable[[Path, Path], None]:
    """``link(name, target)`` makes a symbolic link; skips where the user may not (Windows)."""

    def make(name: Path, target: Path) -> None:
        try:
            name.symlink_to(target, target_is_directory=target.is_dir())
        except OSError as error:
            pytest.skip(f"symbolic links are not permitted here: {error}")

    return make
