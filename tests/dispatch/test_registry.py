import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from phirt.dispatch import registry
from phirt.errors import BackendBrokenError, UnknownBackendError


@pytest.fixture
def plugin(monkeypatch):
    def install(name, value):
        point = EntryPoint(name, value, registry.ENTRY_POINT_GROUP)
        monkeypatch.setattr(registry, "entry_points", lambda *, group: [point])
        registry._plugins_of.cache_clear()

    yield install
    registry._plugins_of.cache_clear()


BUILT_IN = [
    "onnxruntime",
    "openvino",
    "onnxruntime-genai",
    "mlx",
    "transformers",
    "reference",
]


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_backend_by_name(name):
    assert registry.get_backend(name).name == name


def test_the_reference_is_never_chosen_for_the_user():
    assert [name for name in BUILT_IN if registry.is_automatic(name)] == BUILT_IN[:-1]


@pytest.mark.parametrize("name", BUILT_IN)
def test_what_a_backend_reads_is_known_without_its_adapter(name):
    assert registry.formats_of(name) == registry.get_backend(name).formats


@pytest.mark.parametrize("name", BUILT_IN)
def test_what_a_cache_may_be_kept_in_is_known_without_its_adapter(name):
    assert registry.kv_precisions_of(name) == registry.get_backend(name).kv_precisions


def test_a_plugin_may_know_nothing_of_precisions_of_a_cache(plugin):
    plugin("mine", "tests.dispatch.fake_backend:FakeBackend")
    assert registry.kv_precisions_of("mine") == {}
    assert registry.kv_precisions_of("mine", imports=False) == {}
    plugin("mine", "no.such.module:Thing")
    assert registry.kv_precisions_of("mine") == {}
    with pytest.raises(UnknownBackendError):
        registry.kv_precisions_of("yours")


def test_what_a_plugin_reads_its_adapter_says(plugin):
    plugin("mine", "tests.dispatch.fake_backend:FakeBackend")
    assert registry.formats_of("mine") == ("onnx-genai", "onnx")
    plugin("mine", "no.such.module:Thing")
    assert registry.formats_of("mine") == ()


def test_an_unknown_name_lists_the_known_and_suggests_the_nearest():
    with pytest.raises(UnknownBackendError, match=r"registered are.*Did you mean 'onnxruntime'"):
        registry.get_backend("onnxruntim")


def test_an_unknown_backend_is_a_value_error_too():
    with pytest.raises(ValueError, match="not registered"):
        registry.get_backend("nothing like it")


def test_a_plugin_comes_after_the_built_in(plugin):
    plugin("mine", "tests.dispatch.fake_backend:FakeBackend")
    assert registry.backend_names() == [*BUILT_IN, "mine"]
    assert registry.get_backend("mine").name == "fake"


def test_a_plugin_cannot_replace_a_built_in_backend(plugin):
    plugin("onnxruntime", "tests.dispatch.fake_backend:FakeBackend")
    assert registry.backend_names() == BUILT_IN
    assert registry.get_backend("onnxruntime").name == "onnxruntime"


@pytest.mark.parametrize("value", ["no.such.module:Thing", "phirt.errors:NoSuchClass"])
def test_a_plugin_that_does_not_import_is_broken_and_named(plugin, value):
    plugin("mine", value)
    with pytest.raises(BackendBrokenError, match="'mine'") as caught:
        registry.get_backend("mine")
    assert caught.value.__cause__ is not None


def test_asking_for_a_backend_imports_no_runtime():
    program = """
import sys
from phirt.dispatch.registry import backend_names, get_backend
for name in backend_names():
    get_backend(name)
print(sorted({"onnxruntime", "onnxruntime_genai", "openvino", "mlx", "torch"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_plugins_are_looked_for_again_once_something_is_installed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    assert "mine" not in registry.backend_names()
    metadata = tmp_path / "mine-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        f"[{registry.ENTRY_POINT_GROUP}]\nmine = tests.dispatch.fake_backend:FakeBackend\n"
    )
    assert "mine" in registry.backend_names()
