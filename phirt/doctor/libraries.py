"""Which library of the system an import or a device lacks, told from the error's message.

What brings each library was read in these documents:

* onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html (CUDA, cuDNN, and the
  extras ``cuda`` and ``cudnn`` of onnxruntime-gpu) and onnxruntime.ai/docs/install (the Visual
  C++ redistributable on Windows)
* onnxruntime-ep-webgpu's page on the package index (``libvulkan.so.1``)
* docs.openvino.ai, "Configurations for Intel GPU" (Level Zero, OpenCL)
* packages.debian.org and packages.fedoraproject.org, for the names of packages
"""

from __future__ import annotations

import re
import shutil
import sys
from dataclasses import dataclass

from phirt.doctor.commands import install, reinstall

__all__ = ["MissingLibrary", "recognise"]


@dataclass(frozen=True, slots=True)
class MissingLibrary:
    """A library that is not there, or is too old.

    Attributes:
        name: Its file, or the name of the version that is wanted of it.
        why: What it is and what brings it, in a sentence.
        command: What installs it, or None where it depends on the system.
    """

    name: str
    why: str
    command: str | None


@dataclass(frozen=True, slots=True)
class _Known:
    """A row of the table: libraries, what they are, and what installs them."""

    pattern: str
    what: str
    debian: str | None = None
    fedora: str | None = None
    homebrew: str | None = None
    windows: str | None = None
    pip: str | None = None


_TABLE = (
    _Known(
        r"(lib)?(cudnn|cublas|cublasLt|cudart|cufft|curand|nvrtc|nvJitLink)\w*[._\d-]*(so|dll)",
        "It is part of CUDA or cuDNN, which the wheel for GPUs does not hold.",
        pip="onnxruntime-gpu[cuda,cudnn]",
    ),
    _Known(
        r"libcuda\.so|nvcuda\.dll",
        "It comes with NVIDIA's driver: install the one for this GPU from your system's packages "
        "or nvidia.com/drivers.",
    ),
    _Known(
        r"lib(amdhip64|hsa-runtime64|rocblas|MIOpen|migraphx\w*)\.so",
        "It is part of ROCm: install it as rocm.docs.amd.com says for this system.",
    ),
    _Known(
        r"libvulkan\.(so|dylib)|vulkan-1\.dll",
        "It is the Vulkan loader, through which WebGPU reaches a GPU.",
        debian="libvulkan1",
        fedora="vulkan-loader",
        homebrew="vulkan-loader",
    ),
    _Known(
        r"libze_loader\.so|ze_loader\.dll",
        "It is the loader of Level Zero, through which Intel's GPUs and NPUs are reached.",
        debian="libze1",
        fedora="oneapi-level-zero",
    ),
    _Known(
        r"libOpenCL\.so|OpenCL\.dll",
        "It is the OpenCL loader, through which OpenVINO reaches a GPU.",
        debian="ocl-icd-libopencl1",
        fedora="ocl-icd",
    ),
    _Known(r"libgomp\.so", "It is GCC's OpenMP.", debian="libgomp1", fedora="libgomp"),
    _Known(
        r"lib(i?omp|iomp5)\.(dylib|so)|lib(i?omp5?)md\.dll",
        "It is LLVM's OpenMP.",
        debian="libomp5",
        fedora="libomp",
        homebrew="libomp",
    ),
    _Known(r"libstdc\+\+\.so", "It is GCC's C++ library.", debian="libstdc++6", fedora="libstdc++"),
    _Known(
        r"lib(openblas|lapacke?|blas)\.so",
        "It is the system's linear algebra.",
        debian="libopenblas0 liblapacke",
        fedora="openblas lapack",
    ),
    _Known(
        r"(msvcp|vcruntime|concrt)\d+(_\d)?\.dll",
        "It is part of Microsoft's Visual C++ redistributable.",
        windows="Microsoft.VCRedist.2015+.x64",
    ),
    _Known(
        r"(lib)?(openvino|tbb)\w*[.\d]*(so|dll|dylib)",
        "It is part of OpenVINO, or comes with it.",
        pip="openvino",
    ),
)

_OPENING = re.compile(
    r"(?P<name>[\w.+-]+\.(?:so|dll|dylib)[.\d]*): cannot open shared object file"  # glibc
    r"|Library not loaded: (?:\S*/)?(?P<mac>[\w.+-]+\.dylib)"  # dyld
    r"|dlopen\((?:\S*/)?(?P<dlopen>[\w.+-]+\.dylib)"
    r"|Error loading shared library (?P<musl>[\w.+-]+\.so[.\d]*)"  # musl
    r"|(?:Could not find module|Could not (?:locate|load)(?: library)?) '?\"?(?:\S*[/\\])?"
    r"(?P<windows>[\w.+-]+\.(?:dll|so|dylib)[.\d]*)"
)
_TOO_OLD = re.compile(
    r"version [`'](?P<version>(?P<library>GLIBC|GLIBCXX|CXXABI)_[\d.]+)' not found"
)
_NO_DLL = re.compile(
    r"DLL load failed while importing (?P<module>\w+)|LoadLibrary failed with error 126"
)
_OTHER_PROCESSOR = re.compile(r"incompatible architecture|wrong ELF class|is not a valid Win32 app")


def recognise(message: str) -> MissingLibrary | None:
    """What a message says is missing, or None where it says nothing of the kind.

    Args:
        message: Of the exception, or the lines that a runtime wrote.
    """
    found = _TOO_OLD.search(message)
    if found is not None:
        return _too_old(found["library"], found["version"])
    opened = _OPENING.search(message)
    if opened is not None:
        return _look_up(next(filter(None, opened.groups())))
    if _NO_DLL.search(message):
        return MissingLibrary(
            "a DLL that Windows does not name",
            "Most often it is Microsoft's Visual C++ redistributable, of 2019 or later; for a GPU, "
            "CUDA or cuDNN (phirt[cuda] with onnxruntime-gpu[cuda,cudnn]).",
            _winget("Microsoft.VCRedist.2015+.x64"),
        )
    if _OTHER_PROCESSOR.search(message):
        return MissingLibrary(
            "a library for this processor",
            "What is installed was made for another architecture: Python and its packages must "
            "all be of one. Make a new environment with a native Python.",
            None,
        )
    return None


def _look_up(name: str) -> MissingLibrary:
    for known in _TABLE:
        if re.match(known.pattern, name, re.IGNORECASE):
            return MissingLibrary(name, known.what, _command(known))
    return MissingLibrary(
        name,
        "phirt does not know what brings it: look it up with your system's packages (apt-file "
        "search, dnf provides).",
        None,
    )


def _command(known: _Known) -> str | None:
    if known.pip is not None:
        return reinstall(known.pip) if known.pip == "openvino" else install(known.pip)
    system: str = sys.platform  # as a str: mypy would check one system only
    if system == "win32":
        return _winget(known.windows) if known.windows else None
    if system == "darwin":
        return f"brew install {known.homebrew}" if known.homebrew else None
    if known.debian and shutil.which("apt-get"):
        return f"sudo apt-get install {known.debian}"
    if known.fedora and shutil.which("dnf"):
        return f"sudo dnf install {known.fedora}"
    return None


def _winget(package: str) -> str:
    return f"winget install --id {package}"


def _too_old(library: str, version: str) -> MissingLibrary:
    if library == "GLIBC":
        return MissingLibrary(
            version,
            "The C library of this system is older than what the wheel was built for. Update the "
            "system, or install an older version of the package.",
            None,
        )
    return MissingLibrary(
        version,
        "The C++ library that was found is older than what the wheel was built for; with conda, "
        "its own is found before the system's.",
        "conda install -c conda-forge libstdcxx-ng" if shutil.which("conda") else None,
    )
