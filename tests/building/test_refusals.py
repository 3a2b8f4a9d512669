"""`phirt.build_model`: what is refused before anything is built, and what is worse than asked."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from phirt.build import convert as convert_module
from phirt.build.recipe import Quantization
from phirt.build.safetensors_checkpoint import SafetensorsCheckpoint
from phirt.building import build_model
from phirt.errors import (
    DeviceNotAvailableError,
    ModelError,
    ModelFormatError,
    ModelNotFoundError,
    PhirtError,
    QualityCheckError,
    StoreError,
    UnsafeModelError,
    UnsupportedModelError,
)
from phirt.testing import write_tiny_checkpoint
from tests.building.folders import content, edit, is_whole, raising
from tests.installed import require
from tests.tiny_gguf import write_tiny_llama_gguf

for package in ("onnxruntime", "openvino", "onnx"):
    require(package)

# The check.


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_a_build_that_is_close_enough_passes_its_check(llama, place, kind):
    report = build_model(
        llama, place / "out", format=kind, precision="fp32", max_kl=0.001, check_tokens=304
    )
    assert report.quality is not None
    assert report.quality.verdict.passed
    worst = max(each.figures.kl_mean for each in report.quality.kernels.values())
    assert worst < 1e-5
    document = json.loads(json.dumps(report.to_json()))
    assert document["quality"]["verdict"]["passed"]
    assert is_whole(place / "out")
    assert [path.name for path in place.iterdir()] == ["out"]


@pytest.mark.parametrize("there", ["nothing", "a model"])
def test_one_that_is_not_fails_and_leaves_what_was_there(llama, place, there):
    out = place / "a" / "out"
    if there == "a model":
        build_model(llama, out, precision="fp32")
        before = content(out)
    with pytest.raises(QualityCheckError, match=r"0\.\d{4} nats, and at most 1e-06 was asked"):
        build_model(llama, out, precision="int4", max_kl=1e-6, check_tokens=304, overwrite=True)
    if there == "a model":
        assert content(out) == before
        assert [path.name for path in out.parent.iterdir()] == ["out"]
    else:
        assert not any(place.iterdir())


@pytest.fixture
def no_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is built fails the test."""
    monkeypatch.setattr(convert_module, "convert", raising(AssertionError("it was built")))


@pytest.mark.usefixtures("no_conversion")
class TestRefusedBeforeAnythingIsBuilt:
    """What can be said of the arguments alone."""

    @pytest.fixture(autouse=True)
    def _nothing_is_left(self, place: Path) -> Iterator[None]:
        yield
        assert not any(place.iterdir())

    def test_a_check_on_a_device_that_is_not_here(self, llama, place):
        with pytest.raises(DeviceNotAvailableError, match="cuda"):
            build_model(llama, place / "a" / "out", device="cuda", max_kl=0.1)

    @pytest.mark.parametrize("max_kl", [0.0, -1.0, float("nan"), float("inf")])
    def test_a_bound_that_nothing_can_be_held_to(self, llama, place, max_kl):
        with pytest.raises(ValueError, match=r"max_kl=.* must be a number of nats above 0"):
            build_model(llama, place / "out", max_kl=max_kl)

    @pytest.mark.parametrize("tokens", [-1, 0, 100])
    def test_too_few_tokens_to_check_on(self, llama, place, tokens):
        with pytest.raises(ValueError, match=f"tokens={tokens} is too few"):
            build_model(llama, place / "out", max_kl=0.1, check_tokens=tokens)

    @pytest.mark.parametrize("tokens", [2.5, True, "many"])
    def test_no_number_of_tokens_to_check_on(self, llama, place, tokens):
        with pytest.raises(TypeError, match="check_tokens must be an int"):
            build_model(llama, place / "out", max_kl=0.1, check_tokens=tokens)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"format": "gguf"}, "format='gguf' is not one of onnx, openvino, mlx, safetensors"),
            ({"format": "gguf", "max_kl": 1.0}, "format='gguf' is not one of"),
            ({"precision": "int3"}, "precision='int3' is not one of fp32, fp16, bf16, exact,"),
            ({"engine": "olive"}, "engine='olive' is not one of auto, phirt, model-builder, mlx"),
            ({"device": "auto"}, "device='auto': a build is for a device that is named"),
            ({"device": "c p u"}, "c p u"),
            ({"options": {"int4_algo": "rtn"}}, "are for the engines 'model-builder' and 'mlx'"),
            (
                {"quantization": Quantization(symmetric=True)},
                "how 'int4' rounds, and precision='int8' is to be built; pass precision='int4'",
            ),
            (
                {
                    "precision": "int4",
                    "engine": "model-builder",
                    "quantization": Quantization(),
                },
                "quantization is for the engine 'phirt'; this is built by 'model-builder'",
            ),
            (
                {
                    "engine": "model-builder",
                    "precision": "int4",
                    "options": {"config_only": "1"},
                },
                "'config_only' leaves no model; leave it out",
            ),
        ],
    )
    def test_an_argument_that_means_nothing(self, llama, place, arguments, message):
        with pytest.raises(ValueError, match=message) as caught:
            build_model(llama, place / "out", **arguments)
        assert not isinstance(caught.value, PhirtError)

    @pytest.mark.parametrize(
        ("arguments", "hint"),
        [
            ({"precision": "bf16"}, "for cpu it writes onnx in fp32, fp16, exact, int8, int4"),
            ({"device": "npu"}, "it writes onnx for cpu, cuda, directml, webgpu"),
            (
                {"format": "openvino", "device": "npu", "precision": "fp32"},
                "for npu it writes openvino in fp16, int8, int4",
            ),
            ({"format": "openvino", "device": "cuda"}, "it writes openvino for cpu, gpu, npu"),
            ({"format": "mlx", "engine": "phirt"}, "it writes onnx, openvino, safetensors"),
            ({"device": "directml", "precision": "exact"}, "for directml it writes onnx in"),
        ],
    )
    def test_what_nobody_builds(self, place, arguments, hint):
        # Before the source is looked for: it may be gigabytes away.
        with pytest.raises(UnsupportedModelError, match=hint):
            build_model("nobody/nothing", place / "out", **arguments)

    def test_a_source_that_is_not_there(self, place):
        with pytest.raises(ModelNotFoundError, match=r"no-such.*phirt list --remote"):
            build_model(place / "no-such", place / "out")

    def test_a_folder_without_weights(self, llama, place, tmp_path):
        source = shutil.copytree(llama, tmp_path / "source")
        (source / "model.safetensors").unlink()
        with pytest.raises(ModelError, match=r"safetensors"):
            build_model(source, place / "out")

    def test_m3_a_folder_of_pickles(self, llama, place, tmp_path):
        source = shutil.copytree(llama, tmp_path / "source")
        (source / "model.safetensors").unlink()
        (source / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit'\ntR.")
        with pytest.raises(UnsafeModelError, match=r"pickle"):
            build_model(source, place / "out")

    @pytest.mark.parametrize("kind", ["onnx", "openvino"])
    def test_a_source_that_is_built_already(self, place, tmp_path, kind):
        source = tmp_path / "source"
        source.mkdir()
        name = {"onnx": "genai_config.json", "openvino": "openvino_model.xml"}[kind]
        (source / name).write_text("{}")
        with pytest.raises(UnsupportedModelError, match=r"rounded already. Name the checkpoint"):
            build_model(source, place / "out")

    def test_an_architecture_that_nobody_reads(self, llama, place, tmp_path):
        source = shutil.copytree(llama, tmp_path / "source")
        edit(source / "config.json", model_type="nonesuch")
        with pytest.raises(UnsupportedModelError, match=r"'nonesuch'. phirt: it knows the archit"):
            build_model(source, place / "out", format="openvino")

    def test_one_that_only_model_builder_knows(self, place, tmp_path):
        source = write_tiny_checkpoint(tmp_path / "source", "phimoe")
        for kind, engine in (("openvino", "auto"), ("onnx", "phirt")):
            with pytest.raises(UnsupportedModelError, match=r"'phimoe'. phirt: it knows"):
                build_model(source, place / "out", format=kind, engine=engine)

    def test_m10_weights_outside_of_the_folder(self, llama, place, tmp_path):
        source = shutil.copytree(llama, tmp_path / "source")
        with SafetensorsCheckpoint(llama) as names:
            weights = dict.fromkeys(names.names(), "../model.safetensors")
        shutil.move(source / "model.safetensors", tmp_path / "model.safetensors")
        text = json.dumps({"metadata": {}, "weight_map": weights})
        (source / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ModelError, match=r"'\.\./model\.safetensors'"):
            build_model(source, place / "out")

    @pytest.mark.skipif(sys.platform == "win32", reason="only administrators make links there")
    @pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
    def test_m10_a_link_out_of_the_folder(self, llama, place, tmp_path, name):
        source = shutil.copytree(llama, tmp_path / "source")
        shutil.move(source / name, tmp_path / name)
        (source / name).symlink_to(tmp_path / name)
        with pytest.raises(UnsafeModelError, match=name):
            build_model(source, place / "out")

    @pytest.mark.parametrize(
        "key", ["hidden_size", "vocab_size", "intermediate_size", "num_hidden_layers"]
    )
    def test_m12_sizes_beyond_any_file(self, llama, place, tmp_path, key):
        source = shutil.copytree(llama, tmp_path / "source")
        edit(source / "config.json", **{key: 10**12})
        with pytest.raises(ModelError, match=key):
            build_model(source, place / "out")

    @pytest.mark.parametrize("key", ["embedding_length", "feed_forward_length", "block_count"])
    def test_m12_sizes_beyond_any_gguf_file(self, place, tmp_path, key):
        source = write_tiny_llama_gguf(tmp_path / "tiny.gguf", metadata={f"llama.{key}": 10**12})
        with pytest.raises(ModelFormatError, match=key):
            build_model(source, place / "out")

    def test_s9_too_little_room(self, llama, place, monkeypatch):
        usage = shutil.disk_usage(place)._replace(free=10_000_000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(StoreError, match=r"about \d\d MB of disk space; there are 10 MB free"):
            build_model(llama, place / "a" / "out")
