"""What MLX does when memory runs out, in phirt's words."""

from __future__ import annotations

import mmap
import re

from phirt.backends.native_errors import first_line
from phirt.errors import BackendRuntimeError, OutOfMemoryError

__all__ = ["check_host_memory", "translate"]

_OUT_OF_MEMORY = re.compile(
    r"unable to allocate|attempting to allocate|failed to allocate|out of memory|"
    r"insufficient memory|bad.?alloc",
    re.IGNORECASE,
)
_ADVICE = "Ask for fewer tokens, or load a smaller model."


def translate(error: BaseException, doing: str) -> BackendRuntimeError | OutOfMemoryError:
    """Say what MLX raised; the caller chains the original."""
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
        return OutOfMemoryError(f"Out of memory while {doing}: {first_line(error)}. {_ADVICE}")
    return BackendRuntimeError(
        f"MLX failed while {doing}: {type(error).__name__}: {first_line(error):.500}"
    )


def check_host_memory(size: int, doing: str) -> None:
    """Reserve as much memory as is about to be needed, and let go of it.

    MLX's allocator for the CPU does not look whether it got what it asked the system for, and
    the process dies of a segmentation fault (0.32 on Linux). So the question is asked before,
    by a mapping that is never touched: it costs microseconds, and a limit on address space or
    a size beyond the machine's memory is found. Memory that others take in between, or pages
    that the system promised and does not have, are not.

    Args:
        size: Bytes.
        doing: What for, for the message.

    Raises:
        OutOfMemoryError: The system does not give as much.
    """
    try:
        with mmap.mmap(-1, max(1, size)):
            pass
    except (OSError, OverflowError, ValueError, MemoryError) as error:
        raise OutOfMemoryError(
            f"Out of memory while {doing}: the system does not give {size:,} bytes. {_ADVICE}"
        ) from error
