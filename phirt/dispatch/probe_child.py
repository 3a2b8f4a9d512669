"""What a child process does: list a backend's devices, or try one of them.

``python -m phirt.dispatch.probe_child list BACKEND FILE`` and
``python -m phirt.dispatch.probe_child try BACKEND DEVICE SECONDS FILE`` write one JSON object to
FILE. Runtimes print what they like to stdout.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
from pathlib import Path

from phirt.backends.probing import disposable_process
from phirt.devices.child import PASSING
from phirt.devices.machine import BackendRecord, Trial
from phirt.devices.record_json import to_json
from phirt.dispatch.probing import list_backend, try_device
from phirt.errors import OutOfMemoryError

__all__ = ["main"]


def main(arguments: list[str]) -> None:
    """Carry out what the arguments say, and end the process at once."""
    task, name, *rest, seconds, file = arguments
    # Of a parent that was killed, nobody is left to end a child that hangs.
    faulthandler.dump_traceback_later(float(seconds), exit=True)
    _leave_no_dumps()
    status = 0
    record: BackendRecord | Trial
    with disposable_process():
        try:
            record = list_backend(name) if task == "list" else try_device(name, rest[0])
        except OutOfMemoryError as error:
            record, status = Trial(device=rest[0], outcome="not run", reason=str(error)), PASSING
    partial = Path(f"{file}.partial")
    partial.write_text(json.dumps(to_json(record), allow_nan=False), encoding="utf-8")
    partial.replace(file)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    # Some runtimes hang or crash while the interpreter ends, which is not what was asked.
    os._exit(status)


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
