"""Which backend can serve which device, and what must be installed for it.

The rows are what `pyproject.toml` has as extras and what docs/devices.md says; a backend's row
for a device is the first one that fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["CHOOSERS", "CPU_NAMES", "VENDORS", "Serving", "find_serving", "is_known", "ways_of"]

CPU_NAMES = ("cpu", "openvino-cpu")
"""Kinds of device names that mean the processor."""

CHOOSERS = ("openvino-auto",)
"""Kinds of device names that are no device: behind them the runtime chooses one."""

VENDORS: Mapping[str, tuple[str, ...]] = {
    "cuda": ("nvidia", "amd"),  # AMD's GPUs are "cuda" to torch
    "tensorrt-rtx": ("nvidia",),
    "metal": ("apple", "amd", "intel"),
    "coreml": ("apple",),
    "gpu": ("intel", "qualcomm"),
    "npu": ("intel", "qualcomm", "amd"),
}
"""Whose devices a kind of device name can mean, likeliest first; a kind that is not here: any."""

# Wheels that install one package over each other.
_ONNXRUNTIME = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-webgpu",
    "onnxruntime-openvino",
    "onnxruntime-rocm",
    "onnxruntime-migraphx",
)
_GENAI = ("onnxruntime-genai", "onnxruntime-genai-cuda", "onnxruntime-genai-directml")
_MLX_CUDA = ("mlx-cuda", "mlx-cuda-12", "mlx-cuda-13")

_ANYWHERE = ("linux", "windows", "macos")
_NVIDIA_DRIVER = (
    "Check that `nvidia-smi` lists it. If it does not, install NVIDIA's driver, or pass the "
    "device into the container."
)
_INTEL_GPU_DRIVER = (
    "Install Intel's compute runtime (on Debian and Ubuntu: the package intel-opencl-icd), and "
    "give your user access to /dev/dri (group render)."
)
_INTEL_NPU_DRIVER = (
    "Install Intel's NPU driver (on Linux: linux-npu-driver, with access to /dev/accel)."
)
_WINDOWS_DRIVER = "Install the driver that the maker of the device offers."
_TORCH_BUILD = (
    "Install a build of torch for it: https://pytorch.org/get-started/locally has the command."
)
# The one that pip takes by itself is for NVIDIA's GPUs, or for none.
_TORCH_FIRST = (
    "Install a build of torch for it (https://pytorch.org/get-started/locally has the command), "
    'then: python -m pip install "phirt[torch]"'
)
_TORCH_INTEL = (
    "Install Intel's driver and a build of torch for it, if it is one of the GPUs of "
    "https://docs.pytorch.org/docs/stable/notes/get_start_xpu.html."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """A way of a backend's to a kind of device.

    Attributes:
        backend: Name of the backend.
        device: Kind of the device's name.
        kind: Kind of the device.
        vendors: Whose devices; empty for anybody's.
        systems: On which systems.
        architectures: On which processors; empty for any.
        extra: The extra of phirt's that brings it, or None.
        install: What brings it where no extra of phirt's does.
        brings: Distributions that bring it; with none of them installed, it is missing.
        rivals: Distributions that would overwrite them, or be overwritten.
        build: What to do where the runtime is there in a build that does not serve it, and
            installing the extra would leave it as it is.
        driver: What to do where it is installed and finds no device.
    """

    backend: str
    device: str
    kind: Literal["cpu", "gpu", "npu"]
    vendors: tuple[str, ...] = ()
    systems: tuple[str, ...] = _ANYWHERE
    architectures: tuple[str, ...] = ()
    extra: str | None = None
    install: str | None = None
    brings: tuple[str, ...]
    rivals: tuple[str, ...] = ()
    build: str | None = None
    driver: str | None = None

    def is_installed(self, distributions: Mapping[str, str]) -> bool:
        """Whether one of the distributions that bring it is there."""
        here = [distributions[name] for name in self.brings if name in distributions]
        # A build of torch's for the CPU calls itself "2.13.0+cpu".
        return any(self.kind == "cpu" or not version.endswith("+cpu") for version in here)

    def fix(self, distributions: Mapping[str, str]) -> str | None:
        """The command that installs it, next to what is installed already."""
        if self.extra is None:
            return self.install
        command = f'python -m pip install "phirt[{self.extra}]"'
        others = [name for name in self.rivals if name in distributions]
        if others:
            command = f"python -m pip uninstall -y {' '.join(others)} && {command}"
        return command


def find_serving(
    backend: str, *, kind: str, vendor: str | None = None, system: str, architecture: str
) -> Serving | None:
    """The way of a backend to a device, or None where there is none."""
    for row in ways_of(backend, system=system, architecture=architecture):
        if row.kind == kind and (not row.vendors or vendor in row.vendors):
            return row
    return None


def ways_of(backend: str, *, system: str, architecture: str) -> list[Serving]:
    """The ways of a backend to any device of a machine like that."""
    return [
        row
        for row in _TABLE
        if row.backend == backend
        and system in row.systems
        and (not row.architectures or architecture in row.architectures)
    ]


def is_known(backend: str) -> bool:
    """Whether the table has rows for the backend; a plugin has none."""
    return any(row.backend == backend for row in _TABLE)


_TABLE = (
    Serving(backend="onnxruntime", device="cpu", kind="cpu", extra="cpu", brings=_ONNXRUNTIME),
    Serving(
        backend="onnxruntime",
        device="cuda",
        kind="gpu",
        vendors=("nvidia",),
        systems=("linux", "windows"),
        extra="cuda",
        brings=("onnxruntime-gpu",),
        rivals=_ONNXRUNTIME,
        driver=_NVIDIA_DRIVER,
    ),
    Serving(
        backend="onnxruntime",
        device="directml",
        kind="gpu",
        systems=("windows",),
        extra="directml",
        brings=("onnxruntime-directml",),
        rivals=_ONNXRUNTIME,
        driver=_WINDOWS_DRIVER,
    ),
    Serving(
        backend="onnxruntime",
        device="webgpu",
        kind="gpu",
        extra="webgpu",
        brings=("onnxruntime-webgpu", "onnxruntime-ep-webgpu"),
        rivals=_ONNXRUNTIME,
        driver="Install a Vulkan driver for it; `vulkaninfo --summary` lists those there are.",
    ),
    Serving(
        backend="onnxruntime",
        device="npu",
        kind="npu",
        vendors=("qualcomm",),
        systems=("windows", "linux"),
        install="python -m pip install onnxruntime-qnn",
        brings=("onnxruntime-qnn",),
        driver=_WINDOWS_DRIVER,
    ),
    Serving(
        backend="openvino",
        device="cpu",
        kind="cpu",
        systems=("linux", "macos"),
        extra="openvino",
        brings=("openvino",),
    ),
    Serving(
        backend="openvino",
        device="cpu",
        kind="cpu",
        systems=("windows",),
        architectures=("x86_64",),
        extra="openvino",
        brings=("openvino",),
    ),
    Serving(
        backend="openvino",
        device="gpu",
        kind="gpu",
        vendors=("intel",),
        systems=("linux",),
        extra="openvino",
        brings=("openvino",),
        driver=_INTEL_GPU_DRIVER,
    ),
    Serving(
        backend="openvino",
        device="npu",
        kind="npu",
        vendors=("intel",),
        systems=("linux", "windows"),
        extra="openvino",
        brings=("openvino",),
        driver=_INTEL_NPU_DRIVER,
    ),
    Serving(
        backend="openvino",
        device="gpu",
        kind="gpu",
        vendors=("intel",),
        systems=("windows",),
        extra="openvino",
        brings=("openvino",),
        driver=_WINDOWS_DRIVER,
    ),
    Serving(backend="onnxruntime-genai", device="cpu", kind="cpu", extra="genai", brings=_GENAI),
    Serving(
        backend="onnxruntime-genai",
        device="cuda",
        kind="gpu",
        vendors=("nvidia",),
        systems=("linux", "windows"),
        extra="genai-cuda",
        brings=("onnxruntime-genai-cuda",),
        rivals=_GENAI,
        driver=_NVIDIA_DRIVER,
    ),
    Serving(
        backend="onnxruntime-genai",
        device="directml",
        kind="gpu",
        systems=("windows",),
        extra="genai-directml",
        brings=("onnxruntime-genai-directml",),
        rivals=_GENAI,
        driver=_WINDOWS_DRIVER,
    ),
    Serving(
        backend="mlx", device="cpu", kind="cpu", systems=("linux",), extra="mlx", brings=("mlx",)
    ),
    Serving(
        backend="mlx",
        device="cpu",
        kind="cpu",
        systems=("macos",),
        architectures=("arm64",),
        extra="mlx",
        brings=("mlx",),
    ),
    Serving(
        backend="mlx",
        device="metal",
        kind="gpu",
        vendors=("apple",),
        systems=("macos",),
        extra="mlx",
        brings=("mlx-metal", "mlx"),
        driver="Run it in a session on the Mac itself: virtual machines have no Metal device.",
    ),
    Serving(
        backend="mlx",
        device="cuda",
        kind="gpu",
        vendors=("nvidia",),
        systems=("linux",),
        install='python -m pip install "mlx[cuda13]" mlx-lm',
        brings=_MLX_CUDA,
        driver=_NVIDIA_DRIVER,
    ),
    Serving(backend="transformers", device="cpu", kind="cpu", extra="torch", brings=("torch",)),
    Serving(
        backend="transformers",
        device="cuda",
        kind="gpu",
        vendors=("nvidia",),
        systems=("linux", "windows"),
        extra="torch",
        brings=("torch",),
        build=_TORCH_BUILD,
        driver=_NVIDIA_DRIVER,
    ),
    Serving(
        backend="transformers",
        device="cuda",
        kind="gpu",
        vendors=("amd",),
        systems=("linux",),
        install=_TORCH_FIRST,
        brings=("torch",),
        build=_TORCH_BUILD,
        driver=_TORCH_BUILD,
    ),
    Serving(
        backend="transformers",
        device="gpu",
        kind="gpu",
        vendors=("intel",),
        systems=("linux", "windows"),
        install=_TORCH_FIRST,
        brings=("torch",),
        build=_TORCH_BUILD,
        driver=_TORCH_INTEL,
    ),
    Serving(
        backend="transformers",
        device="metal",
        kind="gpu",
        vendors=("apple", "amd"),
        systems=("macos",),
        extra="torch",
        brings=("torch",),
        build=_TORCH_BUILD,
        driver="torch needs macOS 14 or later for it.",
    ),
    Serving(backend="reference", device="cpu", kind="cpu", brings=("numpy",)),
)
