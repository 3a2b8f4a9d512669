"""The host's memory: what the machine has, and what of it this process may take.

A container or a service manager limits a group of processes, and ``ulimit -v`` the address
space of one. Neither shows in what the system calls available, and both end a load that
trusts it. `peak_rss` is what this process has taken at most.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from phirt.devices.machine import Memory

__all__ = ["peak_rss", "read_memory"]

# No limit, in control groups of version 1, is the largest count of pages, in bytes: 2**63
# less a page. More than this is no limit of anybody's.
_UNLIMITED = 1 << 60


@dataclass(frozen=True, slots=True)
class _Limit:
    """A limit on memory.

    Attributes:
        most: What may be used in all, in bytes.
        used: What is used already and cannot be taken back.
    """

    most: int
    used: int

    @property
    def left(self) -> int:
        return max(self.most - self.used, 0)


@dataclass(frozen=True, slots=True)
class _Files:
    """What a version of control groups calls its files.

    Attributes:
        folders: Where it is mounted, from the file system's root.
        most: The limit.
        used: What counts against it, the page cache included.
        reclaimable: Fields of ``memory.stat``: cached pages of files, which the system gives up
            before it runs out, as it does with those that it counts as available.
    """

    folders: tuple[str, ...]
    most: str
    used: str
    reclaimable: tuple[str, ...]


# https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files and
# https://docs.kernel.org/admin-guide/cgroup-v1/memory.html. Where both are there (systemd's
# "hybrid"), one of them has the memory, and the other's folder lacks these files.
_V2 = _Files(
    folders=("sys/fs/cgroup", "sys/fs/cgroup/unified"),
    most="memory.max",
    used="memory.current",
    reclaimable=("active_file", "inactive_file"),
)
_V1 = _Files(
    folders=("sys/fs/cgroup/memory",),
    most="memory.limit_in_bytes",
    used="memory.usage_in_bytes",
    reclaimable=("total_active_file", "total_inactive_file"),
)


def read_memory(*, root: Path = Path("/")) -> Memory:
    """The host's memory now.

    Of several limits, the one that leaves least counts: that of the process's control group
    or of any group around it, or of its address space. A Windows job object's is not read.

    Args:
        root: What ``proc`` and ``sys`` are under.
    """
    import psutil

    whole = psutil.virtual_memory()
    limits = [*_group_limits(root), *_address_space()]
    least = min(limits, key=lambda limit: limit.left, default=None)
    return Memory(
        total=whole.total,
        available=whole.available,
        limit=None if least is None else least.most,
        limit_left=None if least is None else least.left,
    )


def peak_rss() -> int:
    """The most memory that this process has had resident, in bytes.

    Pages of mapped files count, as the system counts them; memory of a device's own does not.
    """
    if sys.platform == "win32":
        import psutil

        peak: int = psutil.Process().memory_info().peak_wset
    elif sys.platform == "linux":
        # What getrusage tells is also that of the process which this one was started from.
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    else:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak


def _group_limits(root: Path) -> Iterator[_Limit]:
    """The limits of the control groups that this process is in; none but on Linux."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        # "4:memory:/a/b" in version 1, "0::/a/b" in version 2.
        _, _, controllers_and_path = line.partition(":")
        controllers, _, path = controllers_and_path.partition(":")
        if not controllers:
            yield from _limits_of(root, _V2, path)
        elif "memory" in controllers.split(","):
            yield from _limits_of(root, _V1, path)


def _limits_of(root: Path, files: _Files, path: str) -> Iterator[_Limit]:
    """The limits of a group and of those around it."""
    # Seen from inside a container the path may be the host's, and its own group is then the
    # one that is mounted: what does not exist says nothing, and the folder's root always may.
    inner = PurePosixPath(path.lstrip("/"))
    groups = [] if ".." in inner.parts else [inner, *inner.parents]
    for folder in files.folders:
        for group in dict.fromkeys([*groups, PurePosixPath()]):
            place = root / folder / group
            most, used = _read(place / files.most).strip(), _read(place / files.used).strip()
            # Version 2 says "max" where there is no limit.
            if most.isdecimal() and used.isdecimal() and int(most) < _UNLIMITED:
                cached = _reclaimable(_read(place / "memory.stat"), files.reclaimable)
                yield _Limit(int(most), max(int(used) - cached, 0))


def _reclaimable(stat: str, fields: tuple[str, ...]) -> int:
    pairs = (line.split() for line in stat.splitlines())
    return sum(int(pair[1]) for pair in pairs if len(pair) == 2 and pair[0] in fields)


def _address_space() -> list[_Limit]:
    """The limit of this process's address space (``ulimit -v``), if it has one."""
    limits: list[_Limit] = []
    # macOS has one number for this limit and that of resident memory, and enforces neither.
    if sys.platform == "linux":
        import resource

        import psutil

        most = resource.getrlimit(resource.RLIMIT_AS)[0]
        if most != resource.RLIM_INFINITY:
            limits.append(_Limit(most, psutil.Process().memory_info().vms))
    return limits


def _read(path: Path) -> str:
    """The text of a small file; empty where there is none, or none to be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
