"""Fixtures of this folder: checkpoints, and a place to build in."""

from __future__ import annotations

from pathlib import Path

import pytest

from phirt.testing import write_tiny_checkpoint


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("llama") / "tiny", "llama")


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose LM head is its embedding."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("qwen") / "tiny", "qwen2")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty folder, in which a build leaves what it was asked for and nothing else."""
    folder = tmp_path / "place"
    folder.mkdir()
    return folder
