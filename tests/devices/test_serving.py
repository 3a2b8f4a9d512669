"""The table of what must be installed agrees with what phirt declares."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from phirt.devices import serving
from phirt.devices.serving import find_serving, is_known
from phirt.dispatch.registry import backend_names

PYPROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))
EXTRAS = {
    name: {re.split(r"[\[<>=;]", requirement)[0] for requirement in requirements}
    for name, requirements in PYPROJECT["project"]["optional-dependencies"].items()
}
ROWS = serving._TABLE


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.extra], ids=lambda row: f"{row.backend}-{row.device}"
)
def test_an_extra_installs_what_its_row_says(row):
    assert row.extra in EXTRAS
    assert EXTRAS[row.extra] & set(row.brings)


def test_every_built_in_backend_serves_a_cpu_somewhere():
    for name in backend_names():
        if is_known(name):
            assert find_serving(name, kind="cpu", system="linux", architecture="x86_64") is not None


@pytest.mark.parametrize(
    ("backend", "kind", "vendor", "system", "device"),
    [
        ("onnxruntime", "gpu", "nvidia", "linux", "cuda"),
        ("onnxruntime", "gpu", "amd", "windows", "directml"),
        ("onnxruntime", "gpu", "amd", "linux", "webgpu"),
        ("onnxruntime", "npu", "qualcomm", "windows", "npu"),
        ("openvino", "gpu", "intel", "linux", "gpu"),
        ("openvino", "gpu", "nvidia", "linux", None),
        ("mlx", "gpu", "apple", "macos", "metal"),
        ("mlx", "cpu", None, "windows", None),
        ("openvino", "cpu", None, "windows", "cpu"),
        ("transformers", "gpu", "amd", "linux", "cuda"),
        ("transformers", "gpu", "amd", "windows", None),
        ("nobody", "gpu", "nvidia", "linux", None),
    ],
)
def test_which_way_a_backend_has_to_a_device(backend, kind, vendor, system, device):
    architecture = "arm64" if system == "macos" else "x86_64"
    row = find_serving(backend, kind=kind, vendor=vendor, system=system, architecture=architecture)
    assert (None if row is None else row.device) == device


@pytest.mark.parametrize(
    ("backend", "system", "architecture"),
    [("openvino", "windows", "arm64"), ("mlx", "macos", "x86_64")],
)
def test_a_system_may_lack_a_build_for_its_processor(backend, system, architecture):
    assert find_serving(backend, kind="cpu", system=system, architecture=architecture) is None


def test_a_command_names_only_what_is_installed_to_be_removed():
    row = find_serving(
        "onnxruntime", kind="gpu", vendor="nvidia", system="linux", architecture="x86_64"
    )
    assert row is not None
    assert row.fix({}) == 'python -m pip install "phirt[cuda]"'
    both = {"onnxruntime": "1", "onnxruntime-directml": "1", "openvino": "1"}
    assert str(row.fix(both)).startswith(
        "python -m pip uninstall -y onnxruntime onnxruntime-directml && "
    )
