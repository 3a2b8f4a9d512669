"""Fixtures of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_gguf import write_tiny_llama_gguf


@pytest.fixture(scope="session")
def tiny_q4_1_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama whose matrices are Q4_1."""
    path = tmp_path_factory.mktemp("tiny-q4") / "tiny-q4_1.gguf"
    return write_tiny_llama_gguf(path, encoding="Q4_1")
