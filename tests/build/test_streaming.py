"""A model far larger than the memory is built: what is in memory is a tensor, and not a layer more.

Real widths, and files with nothing in them: a Phi-3.5-mini has 32 such layers.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.build.streamed_build import LARGEST_TENSOR_BYTES, write_phi3_shaped
from tests.installed import require

require("onnx")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory: Linux only"),
]

# The longest rotary tables, the packages, and what the allocator keeps.
_BESIDE_BYTES = 500 << 20
_NOISE_BYTES = 32 << 20
_LAYER_BYTES = 113_000_000  # of a layer in int8: what would show if one stayed


def peak(folder: Path, *, layers: int, kind: str, precision: str) -> int:
    """The most memory that a process had which built a model of so many layers."""
    source, out = folder / f"{layers}-layers", folder / "out"
    if not source.exists():
        write_phi3_shaped(source, layers=layers)
    command = [sys.executable, "-m", "tests.build.streamed_build", source, out, kind, precision]
    try:
        done = subprocess.run(
            list(map(str, command)), check=False, capture_output=True, text=True, timeout=550
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout.splitlines()[-1])
    finally:
        shutil.rmtree(out, ignore_errors=True)


@pytest.mark.parametrize(
    ("kind", "precision"), [("onnx", "int4"), ("onnx", "fp16"), ("safetensors", "fp16")]
)
def test_the_peak_is_that_of_the_largest_tensor_whatever_the_layers(tmp_path, kind, precision):
    assert LARGEST_TENSOR_BYTES == 197_001_216
    few, many = (peak(tmp_path, layers=layers, kind=kind, precision=precision) for layers in (1, 4))
    assert many < 3 * LARGEST_TENSOR_BYTES + _BESIDE_BYTES
    assert many - few < _NOISE_BYTES < 3 * _LAYER_BYTES / 10
