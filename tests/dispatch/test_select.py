from pathlib import Path
from types import SimpleNamespace

import pytest

from phirt.dispatch import candidates
from phirt.dispatch.select import load_first
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


def folder_of(layout):
    """A model folder as `find_folder` returns it: only its artifact is looked at."""
    artifact = Artifact(
        name="a-model",
        path=Path("somewhere"),
        format=layout,
        architecture="llama",
        precision="fp32",
        weights_id="x",
    )
    return SimpleNamespace(artifact=artifact)


class FakeBackend:
    name = "fake"

    def __init__(self, *, devices=("cpu",), error=None, status="found", formats=("a", "b")):
        self.formats = formats
        self.probes = 0
        self.status = status
        self.devices = devices
        self.error = error
        self.model = FakeModel()
        self.seen = []

    def probe(self):
        self.probes += 1
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
            adapters[name].name = name
            return adapters[name]

        monkeypatch.setattr(candidates, "automatic_names", lambda: list(adapters))
        monkeypatch.setattr(candidates, "get_backend", get)

    return register


def find_first(candidate):
    return folder_of(candidate.backend.formats[0])


def load(device="auto", backend="auto", find=find_first):
    wanted = candidates.Candidates(device=device, backend=backend)
    wanted.check()
    return load_first(wanted, find, LoadOptions())


class Picky(FakeBackend):
    def accepts(self, artifact, device):
        return Reject(f"no {artifact.format} on {device} here", "Buy one.")


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
    assert selection.reasons == ("broken on cpu: not there",)


def test_auto_says_why_a_backend_was_rejected(backends):
    backends(picky=Picky(), good=FakeBackend())
    (reason,) = load().reasons
    assert "picky" in reason
    assert "no a on cpu here" in reason
    assert "Buy one." in reason


def test_auto_imports_no_more_runtimes_than_it_takes(backends):
    second = FakeBackend()
    backends(first=FakeBackend(), second=second)
    load()
    assert second.probes == 0


def test_auto_goes_on_where_a_backend_cannot_have_the_model(backends):
    def find(candidate):
        if candidate.backend.formats == ("onnx",):
            raise UnsupportedModelError("no such graph")
        return folder_of(candidate.backend.formats[0])

    backends(first=FakeBackend(formats=("onnx",)), second=FakeBackend(formats=("other",)))
    selection = load(find=find)
    assert selection.backend == "second"
    assert selection.folder.artifact.format == "other"
    assert selection.reasons == ("first on cpu: no such graph",)


def test_auto_takes_the_cpu_even_of_a_backend_that_has_more(backends):
    """Until a device can be proved to compute the right numbers, it is used by name."""
    backends(first=FakeBackend(devices=("cuda", "cpu")))
    assert load().device == "cpu"


def test_a_backend_without_the_cpu_is_used_by_name_only(backends):
    backends(gpu=FakeBackend(devices=("metal",)), cpu=FakeBackend())
    assert load().backend == "cpu"
    assert load(backend="gpu").device == "metal"


def test_a_named_device_is_never_replaced(backends):
    """Strict devices: no silent fall back to the CPU."""
    backend = FakeBackend()
    backends(only=backend)
    with pytest.raises(DeviceNotAvailableError, match=r"'cuda:1'.*offers: cpu"):
        load(device="cuda:1")
    assert backend.seen == []


def test_a_numbered_device_of_a_kind_that_a_probe_does_not_count(backends):
    """onnxruntime's probe says "cuda": whether there is a second one shows at the load."""

    class TakesAny(FakeBackend):
        def accepts(self, artifact, device):
            return Accept()

    backends(only=TakesAny(devices=("cpu", "cuda")))
    assert load(device="cuda:1").device == "cuda:1"


@pytest.mark.parametrize(
    ("device", "offered"), [("cpu:1", ("cpu",)), ("cuda:2", ("cuda", "cuda:0", "cuda:1"))]
)
def test_a_numbered_device_that_is_not_there(backends, device, offered):
    backends(only=FakeBackend(devices=offered))
    with pytest.raises(DeviceNotAvailableError, match=f"'{device}'.*offers: "):
        check(device=device, backend="auto")


def test_a_plugin_that_does_not_import_is_passed_over(backends, monkeypatch):
    good = FakeBackend(devices=("cuda",))
    backends(broken=FakeBackend(), good=good)
    get = vars(candidates)["get_backend"]

    def get_backend(name):
        if name == "broken":
            raise BackendBrokenError("The adapter of backend 'broken' cannot be imported")
        return get(name)

    monkeypatch.setattr(candidates, "get_backend", get_backend)
    assert load(device="cuda").backend == "good"
    with pytest.raises(DeviceNotAvailableError, match="offers: cuda"):
        check(device="npu", backend="auto")
    with pytest.raises(BackendBrokenError, match="cannot be imported"):
        load(backend="broken")


@pytest.mark.parametrize("backend", [None, 3, ["onnxruntime"]])
def test_a_backend_that_is_no_name(backend):
    with pytest.raises(TypeError, match="backend must be a string"):
        load(backend=backend)


def test_a_named_device_that_rejects_the_model(backends):
    backends(only=Picky(devices=("cuda:0", "cuda:1")))
    with pytest.raises(DeviceNotAvailableError, match=r"'cuda:1'.*no a on cuda:1 here.*Buy one"):
        load(device="cuda:1")


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


def test_a_fault_that_all_find_is_told_once(backends):
    def find(candidate):
        raise UnsupportedModelError("a kind that nobody converts")

    backends(first=FakeBackend(), second=FakeBackend())
    with pytest.raises(UnsupportedModelError, match=r"^a kind that nobody converts$"):
        load(find=find)


def test_nobody_reads_this_model(backends):
    backends(only=Picky())
    with pytest.raises(UnsupportedModelError, match="no a on cpu here"):
        load()


def test_a_damaged_model_is_nobodys_fallback(backends):
    second = FakeBackend()
    backends(first=FakeBackend(error=ModelFormatError("damaged")), second=second)
    with pytest.raises(ModelFormatError, match="damaged"):
        load()
    assert second.seen == []


def check(device, backend):
    candidates.Candidates(device=device, backend=backend).check()


class TestBeforeAModelIsFetched:
    def test_a_device_that_is_there(self, backends):
        backends(missing=FakeBackend(status="missing"), good=FakeBackend())
        check(device="auto", backend="auto")
        check(device="cpu", backend="good")

    def test_a_device_that_no_runtime_offers(self, backends):
        backends(only=FakeBackend(devices=("cpu", "npu")))
        with pytest.raises(DeviceNotAvailableError, match=r"'cuda'.*'only'.*offers: cpu, npu"):
            check(device="cuda", backend="auto")

    @pytest.mark.parametrize(
        ("status", "error"),
        [("missing", BackendNotInstalledError), ("broken", BackendBrokenError)],
    )
    def test_a_runtime_that_is_not_usable(self, backends, status, error):
        backends(only=FakeBackend(status=status))
        with pytest.raises(error, match=f"cpu is {status}"):
            check(device="cpu", backend="auto")

    def test_another_device_of_a_runtime_that_is_not_installed(self, backends):
        """Its probe names the CPU; that it is missing is what the user has to know."""
        backends(only=FakeBackend(status="missing"))
        with pytest.raises(BackendNotInstalledError, match="cpu is missing"):
            check(device="cuda", backend="only")

    def test_a_device_is_looked_for_in_what_is_installed(self, backends):
        gone = FakeBackend(status="missing", devices=("cpu", "npu"))
        backends(gone=gone, here=FakeBackend())
        with pytest.raises(DeviceNotAvailableError, match=r"'cuda'.*offers: cpu\."):
            check(device="cuda", backend="auto")

    def test_an_unknown_backend(self, backends):
        backends(known=FakeBackend())
        with pytest.raises(UnknownBackendError):
            check(device="auto", backend="unknown")
