"""Which process a temporary file belongs to, written in its name.

A file that its owner can no longer finish may be removed, or gone on with. Locks would say
so too, but not on file systems where locking does nothing.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from pathlib import Path

__all__ = ["is_dead", "is_here", "owner_tag"]


def owner_tag() -> str:
    """This process, as ``HOST.PID``: letters, digits and one dot."""
    return f"{_host()}.{os.getpid()}"


def is_dead(tag: str) -> bool:
    """Whether the process of a tag has surely ended.

    False where it runs, where another process of this machine has got its number, and for a
    process of another machine or container, of which nothing is known.

    Args:
        tag: What `owner_tag` returned, and after a further dot, anything.
    """
    pid = tag.partition(".")[2].partition(".")[0]
    return is_here(tag) and pid.isdecimal() and not _process_exists(int(pid))


def is_here(tag: str) -> bool:
    """Whether the process of a tag is, or was, one of this machine or container.

    Args:
        tag: What `owner_tag` returned, and after a further dot, anything.
    """
    return tag.partition(".")[0] == _host()


def _host() -> str:
    """Identifies the space in which a process number means something.

    Two machines may share a store on a network, and two containers a store on one machine.
    """
    try:
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        namespace = ""
    return hashlib.sha256(f"{platform.node()}\0{namespace}".encode()).hexdigest()[:12]


if sys.platform == "win32":

    def _process_exists(pid: int) -> bool:
        # os.kill(pid, 0) would be a Ctrl-C to the process here.
        import ctypes

        synchronize, invalid_parameter = 0x0010_0000, 87
        kernel = ctypes.WinDLL("kernel32", use_last_error=True)
        kernel.OpenProcess.restype = ctypes.c_void_p
        handle = kernel.OpenProcess(synchronize, False, pid)
        if not handle:
            return ctypes.get_last_error() != invalid_parameter
        still_running = bool(kernel.WaitForSingleObject(ctypes.c_void_p(handle), 0) != 0)
        kernel.CloseHandle(ctypes.c_void_p(handle))
        return still_running

else:

    def _process_exists(pid: int) -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except (PermissionError, OverflowError):
            return True
        return True
