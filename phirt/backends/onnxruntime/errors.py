"""What onnxruntime raises, in phirt's words."""

from __future__ import annotations

import re

from phirt.backends.native_errors import first_line
from phirt.errors import BackendRuntimeError, ModelFormatError, OutOfMemoryError

__all__ = ["translate", "translate_load"]

_OUT_OF_MEMORY = re.compile(
    r"bad.?alloc|failed to allocate|not enough memory|out of memory", re.IGNORECASE
)
_DAMAGED = re.compile(r"InvalidProtobuf|InvalidGraph|InvalidArgument")


def translate(error: Exception, doing: str) -> BackendRuntimeError | OutOfMemoryError:
    """Say in phirt's words what the runtime raised; the caller chains the original."""
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
        return OutOfMemoryError(
            f"Out of memory while {doing}: {first_line(error)}. Ask for fewer tokens, "
            "or load the model in a smaller precision."
        )
    return BackendRuntimeError(f"onnxruntime failed while {doing}: {first_line(error)}")


def translate_load(
    error: Exception, path: object
) -> BackendRuntimeError | OutOfMemoryError | ModelFormatError:
    """The same for an error while a graph was opened, which may be the graph's own fault."""
    if _DAMAGED.search(type(error).__name__):
        return ModelFormatError(f"onnxruntime cannot read {path}: {first_line(error)}")
    return translate(error, f"loading {path}")
