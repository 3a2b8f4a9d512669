"""The class that docs/conformance.md shows is a whole test file, and a short one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"

MY_RUNTIME = """
import shutil

from phirt.backends.reference import ReferenceBackend


class MyBackend(ReferenceBackend):
    pass


def convert_checkpoint(checkpoint, out):
    shutil.copytree(checkpoint, out, dirs_exist_ok=True)
"""


def test_the_example_runs(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for line in example.splitlines() if line]
    assert len(lines) <= 15
    (tmp_path / "my_runtime.py").write_text(MY_RUNTIME, encoding="utf-8")
    (tmp_path / "test_mine.py").write_text(example, encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "."],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    summary = run.stdout.splitlines()[-1]
    assert run.returncode == 0, run.stdout + run.stderr
    passed = re.search(r"(\d+) passed", summary)
    assert passed
    assert int(passed[1]) > 150, summary
