"""A process that may allocate little: ``python -m phirt.testing.memory_limit TASK``.

``TASK`` is a file with a pickled (backend class, folder, device, options). What becomes of a large
session and of a small one after it is printed, a line each.
"""

from __future__ import annotations

import mmap
import pickle
import sys
from pathlib import Path

from phirt.errors import OutOfMemoryError
from phirt.protocols import LoadedModel
from phirt.testing.subject import random_ids, read_artifact

__all__ = ["main"]

_HEADROOM = 100_000_000  # bytes beyond what the process has once the model is loaded
_LARGE = 1 << 20  # tokens; their cache takes 512 MB in a tiny model
_PROMPT = 8192  # tokens; their attention scores take 1 GB where they are all computed at once


def main(task: str) -> None:
    """Load the model, lower the limit, and try. Linux only."""
    # Written a moment ago by the test that started this process.
    kind, folder, device, options = pickle.loads(Path(task).read_bytes())  # noqa: S301
    backend = kind()
    model = backend.load(read_artifact(backend, Path(folder)), device, options)
    _run(model, 64, 8)  # What is allocated once is allocated now.
    _limit_memory()
    print("large:", _run(model, _LARGE, _PROMPT), flush=True)  # noqa: T201 - what it is for
    print("small:", _run(model, 64, 8), flush=True)  # noqa: T201


def _limit_memory() -> None:
    if sys.platform == "linux":
        import resource  # Windows has none, and this module is imported there all the same.

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * mmap.PAGESIZE + _HEADROOM
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def _run(model: LoadedModel, length: int, prompt: int) -> str:
    try:
        session = model.new_session(max_length=length, expected_length=length)
        try:
            session.prefill(random_ids(prompt))
        finally:
            session.close()
    except OutOfMemoryError:
        return "OutOfMemoryError"
    return "it fits"


if __name__ == "__main__":
    main(sys.argv[1])
