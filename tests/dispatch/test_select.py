from pathlib import Path

import pytest

from phirt.dispatch import select
from phirt.errors import (
    BackendBrokenError,
    BackendError,
    BackendNotInstalledError,
    DeviceNotAvailableError,
    ModelFormatError,
    OutOfMemoryError,
    UnknownBackendError,
    UnsupportedModelError,
)
from phirt.protocols import Accept, Availability, LoadOptions, Reject
from phirt.types import Artifact
from tests.fakes import FakeModel

ARTIFACT = Artifact(
    name="a-model",
    path=Path("somewhere"),
    format="onnx-genai",
    architecture="llama",
    precision="fp32",
    weights_id="x",
)


class FakeBackend:
    name = "fake"

    def __init__(self, *, devices=("cpu",), error=None, status="found"):
        self.status = status
        self.devices = devices
        self.error = error
        self.model = FakeModel()
        self.seen = []

    def probe(self):
        return [Availability(d, self.status, f"{d} is {self.status}") for d in self.devices]

    def accepts(self, artifact, device):
        return Accept() if device in self.devices else Reject(f"no {device} here", "Buy one.")

    def load(self, artifact, device, options):
        self.seen.append((artifact, device, options))
        if self.error:
            raise self.error
        return self.model


@pytest.fixture
def backends(monkeypatch):
    """Registers fake backends, in order, in place of the real ones."""

    def register(**adapters):
        def get(name):
            if name not in adapters:
                raise UnknownBackendError(name)
            return adapters[name]

        monkeypatch.setattr(select, "backend_names", lambda: list(adapters))
        monkeypatch.setattr(select, "get_backend", get)

    return register


def load(device="auto", backend="auto"):
    return select.load_artifact(ARTIFACT, device=device, backend=backend, options=LoadOptions())


def test_auto_takes_the_first_that_accepts(backends):
    first, second = FakeBackend(), FakeBackend()
    backends(first=first, second=second)
    selection = load()
    assert (selection.backend, selection.device) == ("first", "cpu")
    assert selection.loaded is first.model
    assert selection.reasons == ()
    assert second.seen == []


def test_auto_passes_over_what_fails_to_load_and_says_so(backends):
    backends(broken=FakeBackend(error=BackendNotInstalledError("not there")), good=FakeBackend())
    selection = load()
    assert selection.backend == "good"
    assert selection.reasons == ("not there",)


def test_auto_says_why_a_backend_was_rejected(backends):
    backends(picky=FakeBackend(devices=()), good=FakeBackend())
    (reason,) = load().reasons
    assert "picky" in reason
    assert "no cpu here" in reason
    assert "Buy one." in reason


def test_a_named_device_is_never_replaced(backends):
    """Strict devices: no silent fall back to the CPU."""
    backend = FakeBackend()
    backends(only=backend)
    with pytest.raises(DeviceNotAvailableError, match=r"'cuda:1'.*no cuda:1 here.*Buy one"):
        load(device="cuda:1")
    assert backend.seen == []


def test_a_named_backend_is_never_replaced(backends):
    other = FakeBackend()
    error = OutOfMemoryError("too big")
    backends(other=other, named=FakeBackend(error=error))
    with pytest.raises(OutOfMemoryError) as caught:
        load(backend="named")
    assert caught.value is error
    assert other.seen == []


def test_an_unknown_backend(backends):
    backends(known=FakeBackend())
    with pytest.raises(UnknownBackendError):
        load(backend="unknown")


def test_a_malformed_device(backends):
    backends(known=FakeBackend())
    with pytest.raises(ValueError, match="not a device name"):
        load(device="cuda:")


def test_all_fail_and_every_reason_is_told(backends):
    backends(
        first=FakeBackend(error=BackendNotInstalledError("first is missing")),
        second=FakeBackend(error=BackendNotInstalledError("second is missing")),
    )
    with pytest.raises(BackendError, match=r"first is missing.*second is missing"):
        load()


def test_nobody_reads_this_model(backends):
    backends(only=FakeBackend(devices=()))
    with pytest.raises(UnsupportedModelError, match="no cpu here"):
        load()


def test_a_damaged_model_is_nobodys_fallback(backends):
    second = FakeBackend()
    backends(first=FakeBackend(error=ModelFormatError("damaged")), second=second)
    with pytest.raises(ModelFormatError, match="damaged"):
        load()
    assert second.seen == []


class TestBeforeAModelIsFetched:
    def test_a_device_that_is_there(self, backends):
        backends(missing=FakeBackend(status="missing"), good=FakeBackend())
        select.check_available(device="auto", backend="auto")
        select.check_available(device="cpu", backend="good")

    def test_a_device_that_no_runtime_offers(self, backends):
        backends(only=FakeBackend(devices=("cpu", "npu")))
        with pytest.raises(DeviceNotAvailableError, match=r"'cuda'.*'only'.*offers: cpu, npu"):
            select.check_available(device="cuda", backend="auto")

    @pytest.mark.parametrize(
        ("status", "error"),
        [("missing", BackendNotInstalledError), ("broken", BackendBrokenError)],
    )
    def test_a_runtime_that_is_not_usable(self, backends, status, error):
        backends(only=FakeBackend(status=status))
        with pytest.raises(error, match=f"cpu is {status}"):
            select.check_available(device="cpu", backend="auto")

    def test_an_unknown_backend(self, backends):
        backends(known=FakeBackend())
        with pytest.raises(UnknownBackendError):
            select.check_available(device="auto", backend="unknown")
