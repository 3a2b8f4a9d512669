"""What an engine tells of what it built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Built"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """What an engine left in the folder that it was given.

    Attributes:
        architecture: ``model_type`` of what was built.
        versions: Versions of what built it, by distribution.
        log: The last that the engine wrote.
    """

    architecture: str
    versions: Mapping[str, str] = field(default_factory=dict)
    log: str = ""
