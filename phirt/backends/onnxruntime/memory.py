"""Tensors in host memory and in a device's, and float32 copies of either."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phirt.backends.onnxruntime.proto import identity_model
from phirt.types import FloatArray

__all__ = ["ELEMENTS", "FLOAT32", "INT8", "DeviceMemory", "Element", "HostMemory", "Memory"]


@dataclass(frozen=True, slots=True)
class Element:
    """A type of tensor elements.

    Attributes:
        number: ONNX's number for it.
        storage: NumPy's type of the same size; for bfloat16, which NumPy lacks, its bits.
    """

    number: int
    storage: np.dtype[Any]

    @property
    def is_bfloat16(self) -> bool:
        """Whether `storage` holds the upper halves of float32 values."""
        return self.number == 16

    def to_float32(self, stored: NDArray[Any]) -> FloatArray:
        """The values; ``stored`` itself where it is float32 already."""
        if self.is_bfloat16:
            return (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.astype(np.float32, copy=False)

    def from_float32(self, values: FloatArray) -> NDArray[Any]:
        """The stored form of values, rounded to the nearest, ties to even."""
        if not self.is_bfloat16:
            return values.astype(self.storage, copy=False)
        bits = np.ascontiguousarray(values).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


FLOAT32 = Element(1, np.dtype(np.float32))

ELEMENTS = {
    "tensor(float)": FLOAT32,
    "tensor(float16)": Element(10, np.dtype(np.float16)),
    "tensor(bfloat16)": Element(16, np.dtype(np.uint16)),
}
"""The types of caches and logits that phirt drives, by onnxruntime's names."""

INT8 = Element(3, np.dtype(np.int8))
"""The type of a cache whose integers stand for so many times a scale."""


class HostMemory:
    """The host's memory, which tensors share with NumPy arrays."""

    on_host = True
    device_type = "cpu"
    device_id = 0
    # Whether a part of a tensor can be bound, by its address.
    has_addresses = True

    def __init__(self, ort: Any) -> None:
        self._ort = ort

    @property
    def host(self) -> HostMemory:
        """The host's memory."""
        return self

    def zeros(self, shape: Sequence[int], element: Element) -> NDArray[Any]:
        """Zeros in pages of their own, each of which the system gives once it is written to.

        NumPy asks the system for huge pages: of a buffer for 8,192 tokens, a hundred tokens
        would take most. And what it allocates may come from the heap, where zeros are written,
        and which keeps it when it is freed.

        Raises:
            MemoryError: The system does not give as much.
        """
        count = math.prod(shape)
        pages = _new_pages(max(1, count * element.storage.itemsize))
        return np.frombuffer(pages, element.storage, count).reshape(shape)

    def place(self, array: NDArray[Any], element: Element) -> Any:
        """A tensor on the array's own memory, which must be contiguous."""
        if element.is_bfloat16:
            return self._ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, element.number)
        return self._ort.OrtValue.ortvalue_from_numpy(array)

    def read(self, value: Any, element: Element) -> NDArray[Any]:
        """A copy of a tensor, in its storage type."""
        if not element.is_bfloat16:
            return np.array(value.numpy())
        count = int(np.prod(value.shape()))
        bits = (ctypes.c_uint16 * count).from_address(value.data_ptr())
        return np.array(bits, element.storage).reshape(value.shape())


class DeviceMemory:
    """Memory of one device of an execution provider, filled and read by the provider.

    Copies are runs of a graph of one ``Identity`` on that provider: the one way that every
    provider has, with every element type.

    Args:
        ort: The onnxruntime module.
        open_session: Opens a session on the provider from a serialized model.
        device_type: onnxruntime's name of the device's memory, such as ``"cuda"``.
        device_id: Which of several.
    """

    on_host = False

    def __init__(self, ort: Any, open_session: Any, device_type: str, device_id: int) -> None:
        self.host = HostMemory(ort)
        self._open_session = open_session
        self._sessions: dict[int, Any] = {}
        self.device_type = device_type
        self.device_id = device_id
        # WebGPU and DirectML hand out handles, from which no other part can be reckoned.
        self.has_addresses = device_type == "cuda"

    def zeros(self, shape: Sequence[int], element: Element) -> NDArray[Any]:
        """Zeros on the host, on their way to the device."""
        return np.zeros(shape, element.storage)

    def place(self, array: NDArray[Any], element: Element) -> Any:
        """A new tensor on the device, with the array's values."""
        binding = self._bind(self.host.place(np.ascontiguousarray(array), element), element)
        binding.bind_output("y", self.device_type, self.device_id)
        return self._copy(binding, element)

    def read(self, value: Any, element: Element) -> NDArray[Any]:
        """A copy of a tensor on the host, in its storage type."""
        stored = np.empty(value.shape(), element.storage)
        binding = self._bind(value, element)
        binding.bind_ortvalue_output("y", self.host.place(stored, element))
        self._copy(binding, element)
        return stored

    def _bind(self, value: Any, element: Element) -> Any:
        if element.number not in self._sessions:
            self._sessions[element.number] = self._open_session(identity_model(element.number))
        binding = self._sessions[element.number].io_binding()
        binding.bind_ortvalue_input("x", value)
        return binding

    def _copy(self, binding: Any, element: Element) -> Any:
        self._sessions[element.number].run_with_iobinding(binding)
        binding.synchronize_outputs()
        return binding.get_outputs()[0]


def _new_pages(size: int) -> mmap.mmap:
    """Memory that goes back to the system when it is let go of."""
    try:
        if sys.platform == "win32":
            pages = mmap.mmap(-1, size)
        else:
            # Shared is the default, and a forked child would write into its parent's cache.
            pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"the system does not give {size:,} bytes") from error
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_NOHUGEPAGE)  # which some systems give unasked
    return pages


Memory = HostMemory | DeviceMemory
