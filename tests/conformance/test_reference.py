"""The reference backend under the suite whose oracle it is: its steps against its whole passes."""

from __future__ import annotations

from typing import ClassVar

from phirt.backends.reference import ReferenceBackend
from phirt.protocols import Lack
from phirt.testing import BackendConformance


class TestReference(BackendConformance):
    backend = ReferenceBackend
    rejected: ClassVar = {"phimoe": Lack("not yet", "the reference computes dense decoders")}
