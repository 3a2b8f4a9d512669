"""Every test file is run: none may be left out by its folder's name."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def test_no_folder_of_tests_is_passed_over(request: pytest.FixtureRequest) -> None:
    patterns: list[str] = request.config.getini("norecursedirs")
    folders = {path.parent for path in TESTS.rglob("test_*.py")}
    names = {part for folder in folders for part in folder.relative_to(TESTS).parts}
    passed_over = [
        name for name in sorted(names) if any(Path(name).match(pattern) for pattern in patterns)
    ]
    assert "build" in names
    assert passed_over == []
