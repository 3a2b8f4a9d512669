"""Memory of a KV cache on the host: taken as it is used, given back when it is let go of."""

from __future__ import annotations

import numpy as np
import psutil
import pytest

from phirt.backends.onnxruntime.memory import ELEMENTS, HostMemory

FLOAT = ELEMENTS["tensor(float)"]
MIB = 1 << 20


def resident() -> int:
    found: int = psutil.Process().memory_info().rss
    return found


def test_zeros_are_taken_as_they_are_written() -> None:
    before = resident()
    # The cache of one layer: 4 heads, a quarter of a GiB in all, one position of which is used.
    buffer = HostMemory(None).zeros((1, 4, 1 << 18, 64), FLOAT)
    buffer[:, :, 0] = 1.0
    assert resident() - before < 8 * MIB
    buffer[:, :, : 1 << 15] = 1.0
    assert 24 * MIB < resident() - before < 48 * MIB
    del buffer
    assert resident() - before < 8 * MIB


def test_zeros_are_zeros_and_can_be_written() -> None:
    buffer = HostMemory(None).zeros((2, 3), FLOAT)
    assert (buffer == np.zeros((2, 3), np.float32)).all()
    buffer[1, 2] = 5.0
    assert buffer.sum() == 5.0


def test_a_buffer_of_no_elements_can_be_made() -> None:
    assert HostMemory(None).zeros((1, 3, 0, 64), FLOAT).shape == (1, 3, 0, 64)


def test_more_than_the_system_has_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="bytes"):
        HostMemory(None).zeros((1 << 30, 1 << 30), FLOAT)
