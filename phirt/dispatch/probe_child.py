"""What a child process does: list a backend's devices, or try one of them.

``python -m phirt.dispatch.probe_child list BACKEND SECONDS FILE`` and
``python -m phirt.dispatch.probe_child try BACKEND DEVICE SECONDS FILE`` write one JSON object to
FILE. Runtimes print what they like to stdout.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import shutil
import signal
import sys
from pathlib import Path

from phirt.backends.probing import disposable_process
from phirt.devices.child import PASSING, end_with_parent
from phirt.devices.machine import BackendRecord, Trial
from phirt.devices.memory import read_memory
from phirt.devices.record_json import to_json
from phirt.dispatch.probing import list_backend, try_device
from phirt.errors import OutOfMemoryError

__all__ = ["main"]

# With less than this, a failure says nothing of the runtime.
_LEAST_DISK_BYTES = 16 << 20
_LEAST_MEMORY_BYTES = 512 << 20


def main(arguments: list[str]) -> None:
    """Carry out what the arguments say, and end the process at once."""
    task, name, *rest, seconds, file = arguments
    # Ctrl-C is for the parent, which ends its children.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(Path(file).parent)
    # One that hangs where Python does not run any more sees no parent go.
    faulthandler.dump_traceback_later(float(seconds), exit=True)
    _leave_no_dumps()
    status = 0
    record: BackendRecord | Trial
    with disposable_process():
        try:
            record = list_backend(name) if task == "list" else try_device(name, rest[0])
        except OutOfMemoryError as error:
            record, status = Trial(device=rest[0], outcome="not run", reason=str(error)), PASSING
    if _has_failed(record) and _is_short(Path(file).parent):
        status = PASSING
    partial = Path(f"{file}.partial")
    try:
        partial.write_text(json.dumps(to_json(record), allow_nan=False), encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        sys.stderr.write(f"Its answer cannot be written: {error}\n")
        status = PASSING
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    # Some runtimes hang or crash while the interpreter ends, which is not what was asked.
    os._exit(status)


def _has_failed(record: BackendRecord | Trial) -> bool:
    if isinstance(record, Trial):
        return record.outcome != "ran"
    return record.outcome != "listed" or any(each.status == "broken" for each in record.listing)


def _is_short(folder: Path) -> bool:
    """Whether the disk for temporary files, or what this process may have of memory, is used up."""
    memory = read_memory()
    return shutil.disk_usage(folder).free < _LEAST_DISK_BYTES or memory.free < _LEAST_MEMORY_BYTES


def _leave_no_dumps() -> None:
    """A crash here is an answer: no core file, and no window that waits for a click."""
    if sys.platform == "win32":
        import ctypes

        # SEM_FAILCRITICALERRORS | SEM_NOGPFAULTERRORBOX
        ctypes.windll.kernel32.SetErrorMode(0x0001 | 0x0002)
    else:
        import resource

        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main(sys.argv[1:])
