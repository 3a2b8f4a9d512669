"""The libraries that a provider inside onnxruntime's wheel needs, and that the wheel lacks.

CUDA and cuDNN are no part of it. NVIDIA's wheels hold them in folders that no loader searches:
``preload_dlls`` opens them there. Which library is missing onnxruntime writes to stderr only,
and opens the session on the CPU:
https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import re
import sys
import threading
from pathlib import Path
from typing import Any

from phirt.backends.onnxruntime.providers import Provider
from phirt.errors import DevicePlacementError

__all__ = ["check_opened", "open_libraries"]

# Of the providers that are libraries of their own, beside onnxruntime's.
_STEMS = {
    "CUDAExecutionProvider": "onnxruntime_providers_cuda",
    "NvTensorRTRTXExecutionProvider": "onnxruntime_providers_nv_tensorrt_rtx",
}
_DRIVER = re.compile(r"libcuda\.so|nvcuda\.dll")
_lock = threading.Lock()


def open_libraries(ort: Any, provider: Provider) -> None:
    """Open the libraries of CUDA that NVIDIA's wheels hold, for a provider that needs them.

    Args:
        ort: The onnxruntime module.
        provider: The provider.
    """
    preload = getattr(ort, "preload_dlls", None)
    wheels = Path(ort.__file__ or "").parent.parent / "nvidia"
    if provider.memory != "cuda" or preload is None or not wheels.is_dir():
        return
    # It prints what it does not find, which may be where the system's loader does.
    with _lock, contextlib.redirect_stdout(io.StringIO()):
        preload()


def check_opened(ort: Any, inference: Any, provider: Provider, device: str) -> None:
    """Refuse a session that onnxruntime has opened without its provider.

    Args:
        ort: The onnxruntime module.
        inference: The session.
        provider: What it was to be opened on.
        device: What that was asked for as.

    Raises:
        DevicePlacementError: It was; the message names the library that is missing, where one is.
    """
    if provider.module is not None or provider.name in inference.get_providers():
        return
    missing = _missing_library(ort, provider.name)
    if missing is None:
        why = "it writes the reason to stderr."
    elif _DRIVER.search(missing):
        why = f"{missing}. Install NVIDIA's driver, or pass the GPU into the container."
    else:
        cuda = str(getattr(ort, "cuda_version", "")).partition(".")[0]
        why = (
            f"{missing}. Install CUDA{f' {cuda}' if cuda else ''} and cuDNN 9, which this "
            'onnxruntime was built for: python -m pip install "onnxruntime-gpu[cuda,cudnn]"'
        )
    raise DevicePlacementError(
        f"Device {device!r} was asked for, which is {provider.name}, but onnxruntime cannot open "
        f"it, and runs all nodes (100.0%) elsewhere, on the CPU: {why}"
    )


def _missing_library(ort: Any, name: str) -> str | None:
    """What the loader says of a provider's library, or None where nothing is missing."""
    stem = _STEMS.get(name)
    file = f"{stem}.dll" if sys.platform == "win32" else f"lib{stem}.so"
    path = Path(ort.__file__ or "").parent / "capi" / file
    if stem is None or not path.is_file():
        return None
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        if "cannot open shared object file" in str(error):
            return str(error)
        # Windows does not say which. Elsewhere, what is left is symbols that onnxruntime brings.
        return f"a library that {file} needs is not found" if sys.platform == "win32" else None
    return None
