"""The reference backend under the suite whose oracle it is: its steps against its whole passes."""

from __future__ import annotations

from phirt.backends.reference import ReferenceBackend
from phirt.testing import BackendConformance


class TestReference(BackendConformance):
    backend = ReferenceBackend
