"""Importing OpenVINO without its telemetry, and its errors in phirt's words."""

from __future__ import annotations

import re
import sys
import threading
from typing import Any

from phirt.backends.importing import import_runtime
from phirt.errors import BackendRuntimeError, OutOfMemoryError

__all__ = ["EXTRA", "NAME", "import_openvino", "reason_of", "translate"]

NAME = "openvino"
EXTRA = "openvino"

_OUT_OF_MEMORY = re.compile(
    r"bad.?alloc|memalign failed|(failed|unable|could not) to (mm)?allocate"
    r"|(out of|not enough) memory|OUT_OF_RESOURCES|MEM_OBJECT_ALLOCATION_FAILURE"
    r"|exceeded max size of memory",
    re.IGNORECASE,
)
# OpenVINO puts where in its source an exception was raised before what it says.
_WHERE = re.compile(r"^(Exception from |Check '|.*\.(cpp|hpp|h):\d+:?$|\s*$)")
_lock = threading.Lock()


def import_openvino() -> Any:
    """The module ``openvino``, imported without sending anything anywhere.

    Its import reports itself through the package ``openvino-telemetry``, unless that cannot
    be imported (`phirt.silence`): then a stub inside OpenVINO takes its place, for good.

    Raises:
        BackendNotInstalledError: It is not installed.
        BackendBrokenError: It is installed and does not import.
    """
    with _lock:
        if NAME in sys.modules:
            return sys.modules[NAME]
        return import_runtime(NAME, backend=NAME, extra=EXTRA)


def translate(error: Exception, doing: str) -> BackendRuntimeError | OutOfMemoryError:
    """Say in phirt's words what OpenVINO raised; the caller chains the original."""
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
        return OutOfMemoryError(
            f"Out of memory while {doing}: {reason_of(error)}. Ask for fewer tokens, "
            "or load the model in a smaller precision."
        )
    return BackendRuntimeError(f"OpenVINO failed while {doing}: {reason_of(error)}")


def reason_of(error: Exception) -> str:
    """The line of a message that says what went wrong: that of the innermost exception."""
    lines = str(error).strip().splitlines()
    telling = [line.strip() for line in lines if not _WHERE.match(line)]
    return (telling or lines or [type(error).__name__])[-1]
