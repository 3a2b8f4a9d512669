"""phirt.testing itself: light, and clear about what it needs."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_checkpoints_need_neither_pytest_nor_a_runtime(tmp_path):
    code = f"""
import sys
from pathlib import Path
from phirt.testing import write_tiny_checkpoint
write_tiny_checkpoint(Path({str(tmp_path / "tiny")!r}), "llama")
print(sorted({{"pytest", "torch", "onnxruntime", "safetensors"}} & sys.modules.keys()))
"""
    assert run(code) == "[]\n"


def test_the_suite_imports_no_runtime():
    code = """
import sys
from phirt.testing import BackendConformance
print(sorted({"torch", "transformers", "onnxruntime", "openvino", "mlx"} & sys.modules.keys()))
"""
    assert run(code) == "[]\n"


def test_without_pytest_the_suite_says_what_to_install():
    code = """
import sys
sys.modules["pytest"] = None
try:
    from phirt.testing import BackendConformance
except ImportError as error:
    print(error)
"""
    assert "python -m pip install pytest" in run(code)


def test_other_names():
    import phirt.testing

    with pytest.raises(AttributeError, match="Conformity"):
        _ = phirt.testing.Conformity
