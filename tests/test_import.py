"""`import phirt` is light, and its public names are exactly what it says."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

import phirt

HEAVY = {
    "gguf",
    "huggingface_hub",
    "jinja2",
    "matplotlib",
    "mlx",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxruntime_genai",
    "openvino",
    "rich",
    "tokenizers",
    "torch",
    "transformers",
}

PUBLIC = [
    "BackendBrokenError",
    "BackendError",
    "BackendNotInstalledError",
    "BackendRuntimeError",
    "BenchReport",
    "BuildError",
    "BuildReport",
    "ContextLengthError",
    "Device",
    "DeviceBackend",
    "DeviceError",
    "DeviceNotAvailableError",
    "DevicePlacementError",
    "EngineFailedError",
    "EngineNotInstalledError",
    "Failover",
    "Generation",
    "GenerationError",
    "GenerationParams",
    "Model",
    "ModelError",
    "ModelFormatError",
    "ModelNotFoundError",
    "NonFiniteLogitsError",
    "OutOfMemoryError",
    "PhirtError",
    "Plan",
    "Progress",
    "PullPlan",
    "QualityCheckError",
    "QualityReport",
    "Quantization",
    "SessionClosedError",
    "StoreError",
    "Timings",
    "Token",
    "TokenLogprobs",
    "TokenStream",
    "Tuning",
    "TuningFailure",
    "UnknownBackendError",
    "UnsafeModelError",
    "UnsupportedModelError",
    "UnsupportedParameterError",
    "Usage",
    "__version__",
    "bench",
    "build_model",
    "compare_quality",
    "devices",
    "load",
    "plan",
    "pull",
    "tune",
]


@pytest.mark.parametrize("statement", ["import phirt", "import phirt.cli"])
def test_import_is_light(statement):
    program = f"import sys; {statement}; print(*sys.modules)"
    command = [sys.executable, "-c", program]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert {name.split(".")[0] for name in loaded}.isdisjoint(HEAVY)
    assert "phirt" in loaded


def test_the_public_names_are_these():
    assert sorted(phirt.__all__) == PUBLIC
    assert [name for name in phirt.__all__ if not hasattr(phirt, name)] == []


def test_the_version_is_that_of_the_distribution():
    assert phirt.__version__ == importlib.metadata.version("phirt")
