"""The suite that every backend passes; see `BackendConformance`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from phirt.build.convert import convert
from phirt.dispatch.registry import get_backend
from phirt.errors import BackendBrokenError, BackendNotInstalledError
from phirt.protocols import Backend, LoadedModel, LoadOptions, Reject
from phirt.testing.checkpoints import write_tiny_checkpoint
from phirt.testing.conformance_cache import CacheConformance
from phirt.testing.conformance_lacks import LackConformance
from phirt.testing.conformance_loop import LoopConformance
from phirt.testing.conformance_pool import PoolConformance
from phirt.testing.conformance_prefix import PrefixConformance
from phirt.testing.conformance_rope import RopeConformance
from phirt.testing.conformance_safety import SafetyConformance
from phirt.testing.conformance_settings import DENSE_ARCHITECTURES, LONG_ROPE_ARCHITECTURES
from phirt.testing.conformance_sharing import SharingConformance
from phirt.testing.conformance_speculation import SpeculationConformance
from phirt.testing.conformance_steps import StepConformance
from phirt.testing.conformance_threads import LifetimeConformance, ThreadConformance
from phirt.testing.subject import Oracle, Subject, empty_folder, read_artifact

__all__ = ["DENSE_ARCHITECTURES", "BackendConformance"]


class BackendConformance(
    StepConformance,
    RopeConformance,
    CacheConformance,
    PoolConformance,
    PrefixConformance,
    SharingConformance,
    SpeculationConformance,
    ThreadConformance,
    LifetimeConformance,
    LoopConformance,
    LackConformance,
    SafetyConformance,
):
    """What a backend has to pass; inherit from it in a class whose name begins with ``Test``.

    Every test runs on tiny random checkpoints of every architecture (a few seconds for a
    backend that starts fast), and compares with the reference backend: NumPy, no torch.

    The attributes and the hook are those of `ConformanceSettings`.
    """

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run each test on every architecture, and caches with every partner."""
        if "architecture" in metafunc.fixturenames:
            names = self.architectures
            if "long_rope" in metafunc.fixturenames:
                names = [name for name in names if name in LONG_ROPE_ARCHITECTURES]
            metafunc.parametrize("architecture", names, scope="class")
        if "kv_partner_name" in metafunc.fixturenames:
            metafunc.parametrize("kv_partner_name", self.kv_partners, scope="class")

    @pytest.fixture(scope="class")
    @classmethod
    def checkpoint(cls, architecture: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """The tiny checkpoint of the architecture."""
        return write_tiny_checkpoint(tmp_path_factory.mktemp(architecture) / "hf", architecture)

    @pytest.fixture(scope="class")
    @classmethod
    def oracle(cls, checkpoint: Path) -> Oracle:
        """What the answers should be."""
        return cls.oracle_of(checkpoint)

    @pytest.fixture(scope="class")
    @classmethod
    def subject(cls, architecture: str, checkpoint: Path, oracle: Oracle) -> Iterator[Subject]:
        """The backend with the model of the architecture."""
        yield from cls._load(architecture, checkpoint, oracle)

    @pytest.fixture(scope="class")
    @classmethod
    def one_subject(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
        """The backend with its first architecture, for tests that load it anew."""
        name = cls.architectures[0]
        checkpoint = write_tiny_checkpoint(tmp_path_factory.mktemp(name) / "hf", name)
        yield from cls._load(name, checkpoint, cls.oracle_of(checkpoint))

    @pytest.fixture(scope="class")
    @classmethod
    def kv_partner(cls, kv_partner_name: str, checkpoint: Path) -> Iterator[LoadedModel]:
        """The same checkpoint on another backend."""
        partner = get_backend(kv_partner_name)
        try:
            model = _load_partner(partner, checkpoint)
        except (BackendNotInstalledError, BackendBrokenError) as error:
            pytest.skip(f"{kv_partner_name}: {error}")
        if not model.capabilities.kv:
            reason = model.capabilities.lacks["kv"].reason
            model.close()
            pytest.skip(f"{kv_partner_name} declares no kv: {reason}")
        yield model
        model.close()

    @classmethod
    def _load(cls, architecture: str, checkpoint: Path, oracle: Oracle) -> Iterator[Subject]:
        backend = cls.backend()
        folder = cls().prepare(checkpoint, empty_folder(checkpoint.with_name("prepared")))
        artifact = read_artifact(backend, folder)
        verdict = backend.accepts(artifact, cls.device)
        if isinstance(verdict, Reject):
            pytest.fail(f"{backend.name} rejects {architecture}: {verdict.reason}")
        model = backend.load(artifact, cls.device, cls.options)
        yield Subject(
            backend=backend,
            device=cls.device,
            architecture=architecture,
            artifact=artifact,
            model=model,
            oracle=oracle,
            tolerance=cls.tolerance,
            options=cls.options,
        )
        model.close()


def _load_partner(partner: Backend, checkpoint: Path) -> LoadedModel:
    """A checkpoint on a registered backend, converted once for each layout."""
    layout, folder = partner.formats[0], checkpoint
    if "safetensors" not in partner.formats:
        folder = checkpoint.with_name(f"partner-{layout}")
        if not folder.exists():
            convert(checkpoint, empty_folder(folder), layout=layout, precision="fp32")
    artifact = read_artifact(partner, folder)
    verdict = partner.accepts(artifact, "cpu")
    if isinstance(verdict, Reject):
        pytest.skip(f"{partner.name} rejects the model: {verdict.reason}")
    return partner.load(artifact, "cpu", LoadOptions())
