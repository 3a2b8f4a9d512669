"""What phirt asks of mlx-lm, and what it takes from its answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phirt.build.engines.mlx import build_with_mlx, check_mlx_options, mlx_arguments
from phirt.errors import EngineFailedError, UnsafeModelError, UnsupportedModelError
from phirt.testing import write_tiny_checkpoint
from tests.build.engines.fake import this_python, write_module

BUILDS = """
    given = dict(zip(sys.argv[2:], sys.argv[3:]))
    source, out = Path(given["--hf-path"]), Path(given["--mlx-path"])
    print("INPUT", sorted(each.name for each in source.iterdir()), out.exists())
    out.mkdir()
    for name in ("config.json", "model.safetensors", "model.safetensors.index.json", "README.md"):
        (out / name).touch()
    (out / "tokenizer.json").write_text("rewritten")
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
    """Builds with a fake of mlx-lm, whose source is given."""
    packages = tmp_path / "packages"
    packages.mkdir()
    monkeypatch.syspath_prepend(str(packages))

    def build_source(source: Path, program: str = BUILDS, **arguments):
        write_module(packages, "mlx_lm.__main__", program)
        arguments = {"precision": "int4", "python": this_python(packages), **arguments}
        return build_with_mlx(source, out_dir, **arguments)

    return build_source


@pytest.mark.parametrize(
    ("precision", "architecture", "options", "end"),
    [
        ("int4", "llama", {}, "--q-bits 4 --q-group-size 64 --dtype float16"),
        ("int8", "gemma3_text", {}, "--q-bits 8 --q-group-size 64 --dtype bfloat16"),
        (
            "int8",
            "gemma3_text",
            {"group_size": "32", "dtype": "float32"},
            "--q-bits 8 --q-group-size 32 --dtype float32",
        ),
    ],
)
def test_the_command(precision, architecture, options, end):
    arguments = mlx_arguments(
        Path("in"), Path("out"), precision=precision, architecture=architecture, options=options
    )
    assert " ".join(arguments) == f"convert --hf-path in --mlx-path out --quantize {end}"


class TestOptions:
    @pytest.mark.parametrize(
        ("precision", "options", "said"),
        [
            ("int4", {"group_size": "48"}, "is not one of 32, 64, 128"),
            ("int4", {"dtype": "int8"}, "is not one of float16"),
            ("int4", {"trust_remote_code": "true"}, "known: group_size, dtype"),
            ("int4", {"--upload-repo": "x"}, "known: group_size, dtype"),
            ("fp16", {"group_size": "32"}, "known: none"),
        ],
    )
    def test_there_are_two(self, precision, options, said):
        with pytest.raises(ValueError, match=said):
            check_mlx_options(precision, options)

    def test_a_precision_of_another_format(self):
        with pytest.raises(UnsupportedModelError, match="fp32, fp16, bf16, int8, int4"):
            check_mlx_options("exact", {})


def test_it_reads_what_phirt_wrote_and_nothing_of_the_source(source, out_dir, build):
    (source / "modeling.py").touch()
    built = build(source)
    assert built.architecture == "llama"
    assert built.log == (
        "INPUT ['config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json', "
        "'tokenizer_config.json'] False"
    )
    assert {path.name for path in out_dir.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"),
    }
    assert (out_dir / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("program", ["raise ValueError('Model type x not supported.')", "pass"])
def test_a_failure_leaves_nothing(source, out_dir, build, program):
    with pytest.raises(EngineFailedError, match=r"ValueError: Model type x|wrote no model"):
        build(source, program)
    assert list(out_dir.iterdir()) == []


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16")]
)
def test_what_is_not_quantized_needs_no_engine(source, out_dir, build, precision, dtype):
    build(source, "raise SystemExit('started')", precision=precision)
    assert json.loads((out_dir / "config.json").read_text())["torch_dtype"] == dtype


def test_pickles_are_not_opened(source, build):
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(UnsafeModelError, match="as a pickle"):
        build(source)


def test_a_folder_that_is_not_empty(source, out_dir, build):
    (out_dir / "x").touch()
    with pytest.raises(FileExistsError, match="is not empty"):
        build(source)
