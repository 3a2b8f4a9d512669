"""What a backend's own test class says about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

from phirt.protocols import Backend, Lack, LoadOptions
from phirt.testing.checkpoints import TINY_ARCHITECTURES
from phirt.testing.subject import Oracle

__all__ = ["DENSE_ARCHITECTURES", "LONG_ROPE_ARCHITECTURES", "ConformanceSettings"]

DENSE_ARCHITECTURES = tuple(name for name in TINY_ARCHITECTURES if name != "phimoe")
"""What the suite can judge: the reference backend, which is its oracle, computes these."""

LONG_ROPE_ARCHITECTURES = ("phi3",)
"""Those of them that have LongRoPE."""


class ConformanceSettings:
    """The attributes and the hooks that a test class overrides.

    Attributes:
        backend: The adapter's class.
        device: Where to run.
        architectures: Those of `DENSE_ARCHITECTURES` that the backend runs.
        rejected: Those of `TINY_ARCHITECTURES` that it refuses, and why; loading one fails
            the suite.
        kv_partners: Names of backends to exchange KV caches with. The reference reads the
            checkpoint itself; for another, phirt's converter writes what it reads. One that
            is not installed, rejects the model or does not declare ``kv`` is left out.
        tolerance: Most that a logit may differ from the oracle's.
        options: How to load.
    """

    backend: ClassVar[type[Backend]]
    device: ClassVar[str] = "cpu"
    architectures: ClassVar[Sequence[str]] = DENSE_ARCHITECTURES
    rejected: ClassVar[Mapping[str, Lack]] = MappingProxyType({})
    kv_partners: ClassVar[Sequence[str]] = ("reference",)
    tolerance: ClassVar[float] = 1e-3
    options: ClassVar[LoadOptions] = LoadOptions()

    def prepare(self, checkpoint: Path, out: Path) -> Path:
        """Turn a checkpoint into what the backend reads.

        Args:
            checkpoint: A Hugging Face folder; not to be changed.
            out: An empty folder to write to.

        Returns:
            The folder to load: ``checkpoint`` itself, unless overridden.
        """
        del out
        return checkpoint

    @classmethod
    def oracle_of(cls, checkpoint: Path) -> Oracle:
        """What the answers of a checkpoint should be; to be overridden where they are rounded.

        Args:
            checkpoint: A Hugging Face folder.
        """
        return Oracle(checkpoint)
