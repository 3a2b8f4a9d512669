"""What phirt asks of Model Builder, what it keeps from it, and what it makes of its answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phirt.build.engines.model_builder import (
    MODEL_BUILDER_PRECISIONS,
    BuildProgress,
    build_with_model_builder,
    builder_arguments,
    check_options,
    check_pair,
    corrected_config,
    supported_architectures,
)
from phirt.errors import (
    EngineFailedError,
    ModelFormatError,
    ModelNotFoundError,
    UnsafeModelError,
    UnsupportedModelError,
)
from phirt.testing import write_tiny_checkpoint
from phirt.types import Progress
from tests.build.engines.fake import this_python, write_module
from tests.tiny_gguf import write_tiny_llama_gguf

MODULE = "onnxruntime_genai.models.builder"
# What the real one leaves, and how it says what it does.
BUILDS = """
    print("Reading embedding layer")
    print("Reading layer 0")
    print("Reading layer 1")
    print("Reading final norm")
    (out / "genai_config.json").write_text("{}")
    (out / "model.onnx").touch()
    (out / "tokenizer.json").write_text("rewritten")
    (out / "tokenizer_config.json").write_text("{}")
"""


@pytest.fixture
def source(tmp_path):
    return write_tiny_checkpoint(tmp_path / "source", "llama")


@pytest.fixture
def out_dir(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture
def build(tmp_path, monkeypatch, out_dir):
    """Builds with a fake of the builder, whose source is given."""
    packages = tmp_path / "packages"
    packages.mkdir()
    monkeypatch.syspath_prepend(str(packages))

    def build_source(source: Path, program: str = BUILDS, **arguments):
        write_module(packages, MODULE, program)
        arguments = {"precision": "int4", "python": this_python(packages), **arguments}
        return build_with_model_builder(source, out_dir, **arguments)

    return build_source


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class TestCommand:
    @pytest.mark.parametrize(
        ("device", "provider"),
        [
            ("cpu", "cpu"),
            ("cuda", "cuda"),
            ("cuda:1", "cuda"),
            ("directml", "dml"),
            ("webgpu", "webgpu"),
            ("trtrtx", "NvTensorRtRtx"),
        ],
    )
    def test_a_device_is_a_provider(self, device, provider):
        precision = MODEL_BUILDER_PRECISIONS[device.partition(":")[0]][0]
        assert (
            builder_arguments(
                Path("in"),
                Path("out"),
                precision=precision,
                device=device,
                cache=Path("c"),
                options={},
            )
            == f"-m phirt -i in -o out -p {precision} -e {provider} -c c".split()
        )

    def test_options_come_last(self):
        arguments = builder_arguments(
            Path("in"),
            Path("out"),
            precision="int4",
            device="cpu",
            cache=Path("c"),
            options={"block_size": "64", "is_symmetric": "false"},
        )
        assert arguments[-3:] == ["--extra_options", "block_size=64", "is_symmetric=false"]


class TestPairs:
    @pytest.mark.parametrize(
        ("device", "precision", "said"),
        [
            ("cpu", "fp16", "there the engine 'model-builder' builds fp32, int8, int4; fp16 it"),
            ("directml", "fp32", "builds fp16, int4; fp32 it builds for cpu, cuda"),
            ("webgpu", "fp16", "builds int8, int4"),
            ("trtrtx", "int4", "builds fp16, bf16"),
            ("cpu", "exact", "builds fp32, int8, int4."),
        ],
    )
    def test_what_is_not_supported_is_refused_with_what_is(self, device, precision, said):
        with pytest.raises(UnsupportedModelError, match=said):
            check_pair(device, precision)

    def test_an_unknown_device(self):
        with pytest.raises(ValueError, match="builds for cpu, cuda, directml, webgpu, trtrtx"):
            check_pair("npu", "int4")

    def test_it_is_refused_before_anything_starts(self, source, out_dir, build):
        with pytest.raises(UnsupportedModelError):
            build(source, "raise SystemExit('started')", precision="fp16")
        assert list(out_dir.iterdir()) == []


class TestOptions:
    def test_those_of_the_builder_pass(self):
        options = {
            "block_size": "64",
            "nodes_to_exclude": "/lm_head/MatMul,/x",
            "filename": "a.onnx",
        }
        assert check_options(options) == options

    @pytest.mark.parametrize(
        "name", ["hf_remote", "hf_token", "adapter_path", "dflash2_path", "dspark_path"]
    )
    def test_those_that_run_or_read_what_is_not_trusted_do_not(self, name):
        with pytest.raises(UnsafeModelError, match=name):
            check_options({name: "true"})

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("--output", "/elsewhere"),
            ("-o", "x"),
            ("hf_remote ", "true"),
            ("HF_REMOTE", "true"),
            ("_quant_config", "{}"),
            ("hf_remote=true block_size", "32"),
            ("", "x"),
            ("block_size", "32\n"),
            ("block_size", "32\0"),
            ("filename", "../model.onnx"),
            ("filename", "/model.onnx"),
            ("filename", "config.json"),
            ("config_only", "true"),
        ],
    )
    def test_what_would_become_another_argument_is_refused(self, name, value):
        with pytest.raises(ValueError, match=r"option|name for a graph"):
            check_options({name: value})

    def test_a_file_of_the_user_is_found_from_elsewhere(self, tmp_path, monkeypatch):
        (tmp_path / "scales.json").touch()
        monkeypatch.chdir(tmp_path)
        options = check_options({"kv_cache_scale_file": "scales.json"})
        assert options == {"kv_cache_scale_file": str(tmp_path / "scales.json")}


class TestProgress:
    LINES = (
        "Valid precision + execution provider combinations are: FP32 CPU",
        "Reading embedding layer",
        "Reading layer 0",
        "Reading layer 1",
        "Reading final norm",
        "Reading LM head",
        "Saving ONNX model in /out",
        "0it [00:00, ?it/s]",
        "Saving lm_head.MatMul.weight_Q4 (u8, [320,2,16]):  97%|███▋| 29/30 [00:00<00:00, 2it/s]",
    )

    def test_layers_are_read_and_tensors_written(self):
        seen: list[Progress] = []
        watch = BuildProgress({"num_hidden_layers": 2}, seen.append)
        for line in self.LINES:
            watch(line)
        assert seen == [
            Progress("convert", 0, 2, "layers"),
            Progress("convert", 1, 2, "layers"),
            Progress("convert", 2, 2, "layers"),
            Progress("write", 29, 30, "tensors"),
        ]

    def test_a_configuration_that_does_not_count_its_layers(self):
        seen: list[Progress] = []
        watch = BuildProgress({"num_hidden_layers": "two"}, seen.append)
        for line in self.LINES[:6]:
            watch(line)
        assert [each.total for each in seen] == [None, None]

    def test_nobody_need_listen(self):
        BuildProgress({}, None)("Reading layer 0")


class TestBuild:
    def test_the_folder_is_complete_and_holds_nothing_else(self, source, out_dir, build):
        seen: list[Progress] = []
        built = build(source, progress=seen.append)
        assert (built.architecture, built.versions) == ("llama", {"fake": "1"})
        assert built.log.endswith("Reading final norm")
        assert [each.completed for each in seen] == [0, 1, 2]
        assert {path.name for path in out_dir.iterdir()} == {
            *("config.json", "genai_config.json", "generation_config.json", "model.onnx"),
            *("tokenizer.json", "tokenizer_config.json"),
        }

    def test_the_tokenizer_is_that_of_the_source(self, source, out_dir, build):
        build(source)
        name = "tokenizer.json"
        assert (out_dir / name).read_bytes() == (source / name).read_bytes()

    def test_the_last_line_of_a_traceback_is_the_message(self, source, out_dir, build):
        with pytest.raises(EngineFailedError, match=r"'model-builder' failed: KeyError: 'w1'"):
            build(source, "raise KeyError('w1')")
        assert list(out_dir.iterdir()) == []

    def test_an_end_without_a_model_is_a_failure(self, source, out_dir, build):
        with pytest.raises(EngineFailedError, match=r"wrote no genai_config\.json"):
            build(source, "print('done')")

    def test_what_listens_may_end_it(self, source, out_dir, build):
        def interrupt(_: Progress) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            build(source, BUILDS + "\n    time.sleep(600)", progress=interrupt)
        assert not (out_dir / ".build").exists()

    def test_a_folder_that_is_not_empty(self, source, out_dir, build):
        (out_dir / "x").touch()
        with pytest.raises(FileExistsError, match="is not empty"):
            build(source)

    def test_a_gguf_file_is_written_as_a_checkpoint_first(self, tmp_path, build):
        seen: list[Progress] = []
        gguf = write_tiny_llama_gguf(tmp_path / "a.gguf", encoding="Q4_1")
        build(gguf, BUILDS + PRINTS_INPUT, progress=seen.append)
        assert seen[0].unit == "tensors"
        assert seen[-1].unit == "layers"


PRINTS_INPUT = """
    folder = Path(given["-i"])
    print("INPUT", sorted(each.name for each in folder.iterdir()))
    print("CONFIG", (folder / "config.json").read_text().replace("\\n", " "))
"""


class TestInput:
    """What the builder gets of a folder that nobody trusts."""

    def test_no_code_reaches_it(self, source, build):
        (source / "modeling.py").write_text("raise SystemExit('run')")
        (source / "pytorch_model.bin").write_bytes(b"pickle")
        edit(source / "config.json", auto_map={"AutoModel": "modeling.M"}, _attn_implementation="x")
        edit(source / "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling.T", None]})
        program = (
            BUILDS + PRINTS_INPUT + "\n    print((folder / 'tokenizer_config.json').read_text())"
        )
        log = build(source, program).log
        assert (
            "INPUT ['config.json', 'generation_config.json', 'model.safetensors', "
            "'tokenizer.json', 'tokenizer_config.json']" in log
        )
        assert "auto_map" not in log
        assert "_attn_implementation" not in log

    def test_a_model_that_is_code(self, source, build):
        edit(source / "config.json", model_file="model.py")
        with pytest.raises(UnsafeModelError, match="runs no code"):
            build(source)

    def test_pickles_alone_are_not_opened(self, source, build):
        (source / "model.safetensors").rename(source / "pytorch_model.bin")
        with pytest.raises(UnsafeModelError, match="as a pickle"):
            build(source)

    def test_a_link_out_of_the_folder(self, source, tmp_path, build):
        (source / "model.safetensors").rename(tmp_path / "secret")
        (source / "model.safetensors").symlink_to(tmp_path / "secret")
        with pytest.raises(UnsafeModelError, match="leads out of the model folder"):
            build(source)

    def test_damaged_weights(self, source, build):
        (source / "model.safetensors").write_bytes(b"\xff" * 100)
        with pytest.raises(ModelFormatError):
            build(source)

    def test_a_configuration_that_names_no_class(self, source, build):
        edit(source / "config.json", architectures=[])
        with pytest.raises(ModelFormatError, match="does not say what the model is"):
            build(source)

    def test_nothing_there(self, tmp_path, build):
        with pytest.raises(ModelNotFoundError):
            build(tmp_path / "absent")


class TestArchitectures:
    KNOWS = (
        '"""config.architectures[0] == "LlamaForCausalLM" or config.architectures[0] == "X"."""\n'
    )

    def test_what_the_installed_builder_names_is_read_from_its_source(self, tmp_path):
        write_module(tmp_path, MODULE, self.KNOWS)
        assert supported_architectures(this_python(tmp_path)) == ("LlamaForCausalLM", "X")

    def test_one_that_hides_them_is_left_to_say_so_itself(self, tmp_path):
        assert supported_architectures(this_python(tmp_path)) == ()
        assert supported_architectures(this_python()) == ()

    def test_another_is_refused_with_those_that_there_are(self, source, build):
        edit(source / "config.json", architectures=["MambaForCausalLM"])
        with pytest.raises(UnsupportedModelError, match="It builds LlamaForCausalLM, X"):
            build(source, self.KNOWS)

    def test_the_moe_goes_by_the_name_that_the_builder_knows(self):
        config = {"architectures": ["PhimoeForCausalLM"], "model_type": "phimoe"}
        assert corrected_config(config) == {**config, "architectures": ["PhiMoEForCausalLM"]}

    @pytest.mark.parametrize(("device", "precision"), [("cpu", "int4"), ("cuda", "fp16")])
    def test_the_moe_is_not_quietly_built_for_something_else(
        self, source, build, device, precision
    ):
        edit(source / "config.json", architectures=["PhimoeForCausalLM"])
        with pytest.raises(UnsupportedModelError, match="for cuda in int4 alone"):
            build(source, device=device, precision=precision)

    def test_of_phi_3_vision_there_is_the_language_model(self):
        config = {
            "architectures": ["Phi3VForCausalLM"],
            "model_type": "phi3_v",
            "img_processor": {"name": "clip"},
            "embd_layer": {},
            "hidden_size": 64,
        }
        assert corrected_config(config) == {
            "architectures": ["Phi3ForCausalLM"],
            "model_type": "phi3",
            "hidden_size": 64,
        }
