"""The memory that a process may take: the machine's, its control groups', its address space's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from phirt.devices.machine import Memory
from phirt.devices.memory import peak_rss, read_memory

GB = 1_000_000_000
PAGES_OF_NO_LIMIT = str((1 << 63) - 4096)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A file system in which this process is in no control group."""
    return tmp_path


def member(root: Path, text: str) -> None:
    """What the system says this process is in."""
    path = root / "proc/self/cgroup"
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="ascii")


def group(root: Path, path: str, version: int, *, most: str, used: int, cached: int = 0) -> None:
    """A control group of either version."""
    prefix = "sys/fs/cgroup" if version == 2 else "sys/fs/cgroup/memory"
    folder = root / prefix / path
    folder.mkdir(parents=True, exist_ok=True)
    if version == 2:
        names, fields = ("memory.max", "memory.current"), ("active_file", "inactive_file")
    else:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        fields = ("total_active_file", "total_inactive_file")
    (folder / names[0]).write_text(f"{most}\n", encoding="ascii")
    (folder / names[1]).write_text(f"{used}\n", encoding="ascii")
    stat = f"anon 1\n{fields[0]} {cached // 2}\n{fields[1]} {cached - cached // 2}\nfile 9\n"
    (folder / "memory.stat").write_text(stat, encoding="ascii")


def test_without_a_limit_it_is_the_systems(root: Path) -> None:
    found = read_memory(root=root)
    assert found.total == psutil.virtual_memory().total
    assert 0 < found.available <= found.total
    assert (found.limit, found.limit_left) == (None, None)
    assert found.free == found.available


def test_a_limit_of_version_2_and_the_page_cache_that_it_can_have_back(root: Path) -> None:
    member(root, "0::/app\n")
    group(root, "app", 2, most=str(4 * GB), used=3 * GB, cached=2 * GB)
    found = read_memory(root=root)
    assert (found.limit, found.limit_left) == (4 * GB, 3 * GB)


def test_a_group_without_a_limit_inside_one_that_has(root: Path) -> None:
    member(root, "0::/slice/app\n")
    group(root, "slice/app", 2, most="max", used=1 * GB)
    group(root, "slice", 2, most=str(2 * GB), used=1 * GB)
    assert read_memory(root=root).limit == 2 * GB


def test_of_several_limits_the_one_that_leaves_least(root: Path) -> None:
    member(root, "0::/slice/app\n")
    group(root, "slice/app", 2, most=str(2 * GB), used=1 * GB)
    group(root, "slice", 2, most=str(8 * GB), used=7 * GB + GB // 2)
    found = read_memory(root=root)
    assert (found.limit, found.limit_left) == (8 * GB, GB // 2)


def test_a_limit_of_version_1(root: Path) -> None:
    member(root, "5:cpu,cpuacct:/x\n4:memory:/docker/1\n0::/\n")
    group(root, "docker/1", 1, most=str(3 * GB), used=1 * GB, cached=GB // 2)
    group(root, "", 1, most=PAGES_OF_NO_LIMIT, used=9 * GB)
    found = read_memory(root=root)
    assert (found.limit, found.limit_left) == (3 * GB, 2 * GB + GB // 2)


def test_version_1_says_no_limit_by_a_large_number(root: Path) -> None:
    member(root, "4:memory:/\n")
    group(root, "", 1, most=PAGES_OF_NO_LIMIT, used=GB)
    assert read_memory(root=root).limit is None


@pytest.mark.parametrize("path", ["/system.slice/docker-1.scope", "/../../host"])
def test_inside_a_container_its_own_group_is_the_root(root: Path, path: str) -> None:
    member(root, f"0::{path}\n")
    group(root, "", 2, most=str(GB), used=GB // 4)
    assert read_memory(root=root).limit == GB


def test_more_used_than_allowed_leaves_nothing(root: Path) -> None:
    member(root, "0::/app\n")
    group(root, "app", 2, most=str(GB), used=2 * GB)
    assert read_memory(root=root).limit_left == 0


def test_damaged_files_are_no_limit(root: Path) -> None:
    member(root, "0::/app\nnonsense\n4:memory\n")
    group(root, "app", 2, most="-5", used=GB)
    assert read_memory(root=root).limit is None


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it is not enforced")
def test_a_limit_of_the_address_space() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (3 * 10**9, 3 * 10**9));"
        "from phirt.devices.memory import peak_rss, read_memory; m = read_memory();"
        "print(m.limit, m.limit_left)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    limit, left = map(int, done.stdout.split())
    assert limit == 3 * GB
    assert 2 * GB < left < 3 * GB


def test_free_is_the_smaller_of_what_is_available_and_what_is_left() -> None:
    assert Memory(total=8, available=5).free == 5
    assert Memory(total=8, available=5, limit=4, limit_left=2).free == 2
    assert Memory(total=8, available=1, limit=4, limit_left=2).free == 1


def test_the_peak_stays_when_memory_is_given_back():
    before = peak_rss()
    assert before >= 10_000_000
    block = b"x" * (before + 50_000_000)
    del block
    assert peak_rss() >= before + 45_000_000
