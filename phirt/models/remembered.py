"""Results of reading a file that are kept for as long as the process lives, by its content.

The second load of a model in one process need not walk its graph or judge its manifest again.
Neither a path nor a time of modification is trusted with that: the file is read, and its bytes
are hashed. Whoever is given a result leaves it as it is.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import Generic, TypeVar

from phirt.models.protobuf import Buffer

__all__ = ["Remembered"]

_T = TypeVar("_T")

_MOST = 256


class Remembered(Generic[_T]):
    """Results by the content that they are of. Safe to use from many threads at once."""

    def __init__(self) -> None:
        self._results: OrderedDict[bytes, _T] = OrderedDict()
        self._lock = Lock()

    def of(self, data: Buffer, make: Callable[[], _T]) -> _T:
        """The result of a content.

        Args:
            data: The content. What is mapped because it is large is not hashed, and not kept.
            make: Gives the result where it is not known. What it raises is not kept.
        """
        found = self.known(data)
        if found is None:
            found = make()
            self.keep(data, found)
        return found

    def known(self, data: Buffer) -> _T | None:
        """The result of a content, or None where there is none."""
        if not isinstance(data, bytes):
            return None
        key = _key(data)
        with self._lock:
            if key not in self._results:
                return None
            self._results.move_to_end(key)
            return self._results[key]

    def keep(self, data: Buffer, result: _T) -> None:
        """Keep a result; of too many, the one that was not used for longest goes."""
        if not isinstance(data, bytes):
            return
        key = _key(data)
        with self._lock:
            self._results[key] = result
            self._results.move_to_end(key)
            if len(self._results) > _MOST:
                self._results.popitem(last=False)


def _key(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()
