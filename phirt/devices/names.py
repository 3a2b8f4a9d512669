"""Device names: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``directml``, ``npu``, ``metal`` …."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["DeviceName"]

_SYNTAX = re.compile(r"([a-z][a-z0-9_-]*)(?::(\d{1,3}))?")


@dataclass(frozen=True, slots=True)
class DeviceName:
    """A device as users name it: a kind, and an index where a machine has several.

    Attributes:
        kind: ``"cpu"``, ``"cuda"``, or ``"auto"`` for "choose one".
        index: Which of several, from 0, or None for "whichever".
    """

    kind: str
    index: int | None = None

    @classmethod
    def parse(cls, text: str) -> DeviceName:
        """Read ``kind`` or ``kind:index``.

        Only the form is judged: which kinds exist is for the backends to say, and a
        plugin may add its own.

        Raises:
            TypeError: ``text`` is not a string.
            ValueError: ``text`` is not of that form.
        """
        if not isinstance(text, str):
            raise TypeError(f"device must be a string, not {type(text).__name__}")
        match = _SYNTAX.fullmatch(text.strip().lower())
        if match is None:
            raise ValueError(
                f"device={text!r} is not a device name. Use a name such as 'auto' or 'cpu', "
                "with an index where a machine has several: 'cuda:1'."
            )
        kind, index = match.groups()
        if kind == "auto" and index is not None:
            raise ValueError(
                f"device={text!r} is not a device name: 'auto' chooses by itself and has no "
                "index. Name the kind of device as well: 'cuda:1'."
            )
        return cls(kind, None if index is None else int(index))

    def is_one_of(self, offered: Iterable[str]) -> bool:
        """Whether this name means one of the devices offered.

        ``cuda`` and ``cuda:0`` mean each other; so does ``cuda`` any ``cuda:n``.

        Args:
            offered: Names of devices, as a backend offers them.
        """
        for text in offered:
            other = DeviceName.parse(text)
            same = self.index is None or (other.index or 0) == self.index
            if other.kind == self.kind and same:
                return True
        return False

    def __str__(self) -> str:
        return self.kind if self.index is None else f"{self.kind}:{self.index}"
