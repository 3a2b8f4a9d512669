"""Freed memory goes back to the system, where the C library can be told to."""

from __future__ import annotations

import ctypes
import sys

import psutil
import pytest

from phirt.devices.heap import trim_heap

MIB = 1 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc can be told to")
def test_what_is_freed_below_a_block_in_use_goes_back() -> None:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        pytest.skip("the C library is not glibc")
    libc.malloc.restype = ctypes.c_void_p
    # Of less than 128 KiB each, which the heap has and no mapping of its own.
    blocks = [libc.malloc(ctypes.c_size_t(100_000)) for _ in range(640)]
    for block in blocks:
        ctypes.memset(block, 1, 100_000)
    for block in blocks[:-1]:
        libc.free(ctypes.c_void_p(block))
    before = psutil.Process().memory_info().rss
    trim_heap()
    assert before - psutil.Process().memory_info().rss > 32 * MIB
    libc.free(ctypes.c_void_p(blocks[-1]))


def test_elsewhere_it_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", pytest.fail)
    trim_heap()
