"""The keys of one architecture in GGUF metadata, checked."""

from __future__ import annotations

from math import isfinite
from typing import NoReturn

from phirt.build.gguf.file import GgufFile
from phirt.build.gguf.header import ArraySpan
from phirt.errors import ModelFormatError, UnsupportedModelError

__all__ = ["MAX_CONTEXT", "MAX_WIDTH", "ArchitectureFields"]

# Budgets: several times what any published dense decoder has. A tensor's bytes bound most
# sizes already; the context is bounded by nothing else, and rotary tables are as long as it.
MAX_WIDTH = 1 << 20
"""The widest that a model or a head may be."""
MAX_CONTEXT = 1 << 22
"""The longest context, in tokens."""


class ArchitectureFields:
    """Reads the keys of one architecture and checks what they say.

    Args:
        file: The file.
        architecture: What the keys begin with: ``general.architecture``.

    Attributes:
        file: The file.
        architecture: The same.
    """

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self.file = file
        self.architecture = architecture

    def key(self, name: str) -> str:
        """The whole key: ``"llama.context_length"``."""
        return f"{self.architecture}.{name}"

    def fail(self, problem: str) -> NoReturn:
        """Raise for a number that cannot be right."""
        raise ModelFormatError(f"{self.file.path.name}: {problem}. Use another file.")

    def refuse(self, feature: str) -> NoReturn:
        """Raise for a sound model that needs what phirt cannot do."""
        raise UnsupportedModelError(f"{self.file.path.name}: {feature} is not supported.")

    def size(self, name: str, *, most: int, default: int | None = None) -> int:
        """A positive integer of at most ``most``."""
        key = self.key(name)
        if isinstance(self.file.header.metadata.get(key), ArraySpan):
            self.refuse(f"a {key} that differs between layers")
        value = self.file.integer(key)
        if value is None:
            value = default
        if value is None:
            self.fail(f"{key} is missing")
        if not 1 <= value <= most:
            self.fail(f"{key} is {value:,}, and must be from 1 to {most:,}")
        return value

    def positive(
        self,
        name: str,
        *,
        default: float | None = None,
        least: float = 0.0,
        most: float = float("inf"),
    ) -> float:
        """A positive, finite number, from ``least`` to ``most``."""
        key = self.key(name)
        value = self.file.real(key)
        if value is None:
            value = default
        if value is None:
            self.fail(f"{key} is missing")
        if not (isfinite(value) and value > 0):
            self.fail(f"{key} is {value}, and must be positive and finite")
        if not least <= value <= most:
            self.fail(f"{key} is {value}, and must be from {least:g} to {most:g}")
        return value
