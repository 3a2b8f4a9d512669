"""From names to folders: what a name means, which form is chosen, and when a hub is asked."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

import phirt
from phirt.conversion import Wanted
from phirt.locate import locate
from phirt.models.catalog import HubSource, get_entry
from phirt.models.folder import ModelFolder
from phirt.models.hub_names import HubName
from phirt.models.store import Store
from phirt.remote import options_of
from tests.hub.fake_hub import FakeHub

NAME = "org/tiny"
ONNX = ("onnx-genai", "onnx")


def wanted(*formats: str, device: str = "cpu", precision: str = "auto") -> Wanted:
    return Wanted(formats=formats, precision=precision, device=device)


def find(
    name: str,
    *formats: str,
    precision: str = "auto",
    offline: bool = False,
    device: str = "cpu",
) -> ModelFolder:
    return locate(
        name, formats=formats, precision=precision, offline=offline, progress=None, device=device
    )


@pytest.fixture(scope="module")
def files(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The tiny model in every form: ONNX for two devices, safetensors and GGUF."""
    from phirt.build.convert import convert

    found = {"gguf/Tiny-F32.gguf": tiny_gguf.read_bytes(), "pytorch_model.bin": b"pickle"}
    for layout, places in (("onnx-genai", ("cpu/int8", "cuda/int8")), ("safetensors", ("",))):
        folder = tmp_path_factory.mktemp(layout)
        precision = "int8" if layout == "onnx-genai" else "fp32"
        convert(tiny_gguf, folder, layout=layout, precision=precision)
        for place in places:
            for path in folder.iterdir():
                if path.name != "phirt.json":
                    found[f"{place}/{path.name}".lstrip("/")] = path.read_bytes()
    return found


@pytest.fixture
def hub(
    files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[FakeHub]:
    with FakeHub() as hub:
        hub.add_repo(NAME, files)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))
        yield hub


class TestCatalog:
    """Which source of a model fits."""

    @pytest.mark.parametrize(
        ("formats", "device", "chosen"),
        [
            (ONNX, "cpu", ("onnx-genai", "cpu")),
            (ONNX, "cuda", ("onnx-genai", "cuda")),
            (ONNX, "directml", ("onnx-genai", "directml")),
            (("openvino", *ONNX), "cpu", ("openvino", None)),
            (("mlx", "safetensors"), "metal", ("mlx", None)),
            (("safetensors",), "cpu", ("safetensors", None)),
        ],
    )
    def test_the_source_in_the_layout_that_the_backend_likes_best(self, formats, device, chosen):
        entry = get_entry("phi-3-mini-4k-instruct")
        options = options_of(entry, label=entry.name, wanted=wanted(*formats, device=device))
        source = next(
            source
            for source in entry.sources
            if isinstance(source, HubSource) and HubName.parse(source.name) == options[0].place
        )
        assert (source.format, source.device) == chosen

    def test_a_build_for_gpus_is_an_option_for_cuda(self):
        entry = get_entry("phi-4")
        (option,) = options_of(entry, label="phi-4", wanted=wanted(*ONNX, device="cuda"))
        assert str(option.place) == "microsoft/phi-4-onnx:gpu/gpu-int4-rtn-block-32"

    def test_another_precision_is_made_of_a_checkpoint(self):
        entry = get_entry("qwen2.5-0.5b-instruct")
        options = options_of(entry, label="q", wanted=wanted(*ONNX, precision="int4"))
        assert [option.formats for option in options] == [("gguf",), ("safetensors",)]

    def test_no_form_that_fits_says_which_there_are(self):
        entry = get_entry("phi-3-small-8k-instruct")
        with pytest.raises(phirt.UnsupportedModelError, match="onnx-genai for cuda; none of them"):
            options_of(entry, label="p", wanted=wanted(*ONNX))

    def test_a_name_of_the_catalog_goes_to_its_repository(self, hub, files):
        path = "cpu_and_mobile/cpu-int4-rtn-block-32-acc-level-4"
        build = {name: data for name, data in files.items() if name.startswith("cpu/")}
        repo = {f"{path}/{name.rpartition('/')[2]}": data for name, data in build.items()}
        hub.add_repo("microsoft/phi-4-onnx", repo)
        folder = find("phi-4", *ONNX)
        assert folder.artifact.name == "phi-4"
        (model,) = Store().installed()
        assert (model.name, model.source) == ("phi-4", "microsoft/phi-4-onnx")
        asked = len(hub.requests)
        assert find("phi-4", *ONNX).artifact.path == folder.artifact.path
        assert len(hub.requests) == asked


class TestHub:
    def test_each_backend_and_device_gets_its_own_build(self, hub):
        found = {
            find(NAME, *formats, device=device).artifact.path: formats[0]
            for formats, device in ((ONNX, "cpu"), (ONNX, "cuda"), (("safetensors",), "cpu"))
        }
        # Both graphs hold the same bytes, which are kept once.
        assert sorted(found.values()) == ["onnx-genai", "safetensors"]

    def test_no_pickle_and_no_other_build_is_fetched(self, hub):
        find(NAME, *ONNX)
        fetched = [r.path for r in hub.requests if "/resolve/" in r.path]
        assert fetched
        assert all("/cpu/int8/" in path for path in fetched)

    def test_a_part_of_a_repository(self, hub):
        folder = find(f"{NAME}:gguf/Tiny-F32.gguf", "safetensors")
        assert folder.artifact.format == "safetensors"
        assert folder.artifact.architecture == "llama"

    def test_what_the_backend_does_not_read_is_converted(self, hub):
        folder = find(NAME, "openvino")
        assert (folder.artifact.format, folder.artifact.name) == ("openvino", NAME)
        models = {model.format: model for model in Store().installed()}
        assert models["openvino"].source == NAME
        assert models["openvino"].revision == hub.repos[NAME].revisions["main"]

    def test_a_precision_that_was_asked_for_once_is_not_what_auto_means(self, hub):
        name = f"{NAME}:gguf"
        assert find(name, *ONNX, precision="int4").artifact.precision == "int4"
        assert find(name, *ONNX, precision="fp32").artifact.precision == "fp32"
        assert find(name, "openvino", *ONNX).artifact.precision == "int8"
        assert find(name, *ONNX, precision="int4", offline=True).artifact.precision == "int4"

    def test_a_name_is_pinned_to_its_commit(self, hub, files):
        first = find(NAME, *ONNX).artifact
        commit = hub.repos[NAME].revisions["main"]
        changed = files | {"cpu/int8/generation_config.json": b'{"temperature": 0.5}'}
        newer = hub.add_repo(NAME, changed)
        assert find(NAME, *ONNX).artifact == first
        assert find(f"{NAME}@{commit}", *ONNX).artifact.path == first.path
        other = find(f"{NAME}@{newer}", *ONNX).artifact
        assert other.path != first.path
        assert find(NAME, *ONNX).artifact == first

    def test_a_build_for_another_device_that_is_there_is_not_taken(self, hub):
        find(f"{NAME}:cuda", *ONNX, device="cuda")
        with pytest.raises(phirt.UnsupportedModelError, match="nothing that fits"):
            find(f"{NAME}:cuda", *ONNX)

    def test_a_folder_of_that_name_goes_first(self, hub, tmp_path, monkeypatch, files):
        folder = tmp_path / "org" / "tiny"
        folder.mkdir(parents=True)
        for name, data in files.items():
            if name.startswith("cpu/"):
                (folder / name.rpartition("/")[2]).write_bytes(data)
        monkeypatch.chdir(tmp_path)
        assert find(NAME, *ONNX).artifact.path == Path(NAME)
        assert hub.requests == []

    def test_a_missing_gguf_file_is_not_asked_for_at_a_hub(self, hub):
        with pytest.raises(phirt.ModelNotFoundError, match="no file or folder"):
            find("models/none.gguf", *ONNX)
        assert hub.requests == []

    def test_a_model_that_is_no_model_is_not_kept(self, hub, files):
        build = {name: data for name, data in files.items() if name.startswith("cpu/")}
        hub.add_repo("org/broken", build | {"cpu/int8/genai_config.json": b"{}"})
        with pytest.raises(phirt.ModelFormatError):
            find("org/broken", *ONNX)
        assert Store().installed() == []


class TestOffline:
    def test_a_model_in_the_store_loads_with_sockets_blocked(self, hub, monkeypatch):
        """Row S13."""
        phirt.pull(NAME)

        def blocked(*_, **__):
            pytest.fail("a socket was opened")

        monkeypatch.setattr(socket, "socket", blocked)
        monkeypatch.setattr(socket, "create_connection", blocked)
        for offline in (True, False):
            with phirt.load(NAME, offline=offline) as model:
                assert model.generate("hello", max_new_tokens=1).token_ids

    @pytest.mark.parametrize("by", ["argument", "variable"])
    def test_what_is_not_in_the_store_is_not_asked_for(self, hub, monkeypatch, by):
        if by == "variable":
            monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(phirt.ModelNotFoundError, match="offline mode forbids"):
            find(NAME, *ONNX, offline=by == "argument")
        assert hub.requests == []


class TestPackageIndex:
    def test_nothing_is_fetched_for_a_backend_that_reads_nothing_phirt_writes(self, monkeypatch):
        monkeypatch.setattr("phirt.models.pypi.fetch_member", lambda *_, **__: pytest.fail("asked"))
        for name in ("pypi:", "smollm2-135m-instruct"):
            with pytest.raises(phirt.UnsupportedModelError):
                find(name, "onnx")


class TestSettle:
    """With backend="auto", what is in the store for one backend is used through that one."""

    @pytest.fixture
    def openvino_only(self, hub, files):
        graph = {"config.json": files["config.json"], "tokenizer.json": files["tokenizer.json"]}
        graph |= {"openvino_model.xml": b"<net/>", "openvino_model.bin": b"weights"}
        build = {name: data for name, data in files.items() if name.startswith("cpu/")}
        hub.add_repo("org/both", build | {f"ov/{name}": data for name, data in graph.items()})
        find("org/both", "openvino")
        return len(hub.requests)

    def test_the_first_backend_refuses_rather_than_fetch_another_form(self, hub, openvino_only):
        with pytest.raises(phirt.UnsupportedModelError, match="is in the store as openvino"):
            locate(
                "org/both", formats=ONNX, precision="auto", offline=True, progress=None, settle=True
            )
        assert len(hub.requests) == openvino_only

    def test_a_named_backend_fetches_its_own(self, hub, openvino_only):
        assert find("org/both", *ONNX).artifact.format == "onnx-genai"
        assert len(hub.requests) > openvino_only


class TestPull:
    def test_the_first_backend_whose_layouts_are_there_is_served(self, hub, files):
        only = {name: data for name, data in files.items() if name.startswith("cuda/")}
        hub.add_repo("org/cuda", only)
        with pytest.raises(phirt.UnsupportedModelError, match="on cpu"):
            phirt.pull("org/cuda")
        assert not any("/resolve/" in request.path for request in hub.requests)

    def test_what_the_announcement_raises_ends_it(self, hub):
        def refuse(plan: phirt.PullPlan) -> None:
            raise RuntimeError(str(plan))

        with pytest.raises(RuntimeError, match=r"org/tiny: onnx-genai, int8, .* in cpu/int8 of"):
            phirt.pull(NAME, announce=refuse)
        assert hub.bytes_sent == 0
        assert Store().installed() == []

    def test_the_reason_is_said(self, hub):
        told: list[phirt.PullPlan] = []
        phirt.pull(NAME, precision="fp32", announce=told.append)
        phirt.pull(f"{NAME}:gguf", precision="auto", announce=told.append)
        assert told[0].reason == "It will be converted to onnx-genai, fp32, for cpu."
        assert "there is no build in onnx-genai or onnx for it" in told[1].reason
        assert [plan.converted_to for plan in told] == ["onnx-genai", "onnx-genai"]
