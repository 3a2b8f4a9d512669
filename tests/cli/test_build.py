"""``phirt build``: what it passes on, what it prints, its exit status, and what it refuses."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from phirt import building
from phirt.build.engines import environments
from phirt.build.recipe import DEFAULT_INT8_LAYERS, Quantization
from phirt.building import BuildReport
from phirt.cli import main
from phirt.errors import (
    DeviceNotAvailableError,
    EngineFailedError,
    EngineNotInstalledError,
    QualityCheckError,
    StoreError,
)
from phirt.models.manifest import read_manifest
from phirt.models.store import Store
from phirt.testing import write_tiny_checkpoint
from phirt.types import Progress
from tests.cli.conftest import Outcome
from tests.cli.test_quality import report as quality_report
from tests.installed import require
from tests.tiny_gguf import write_tiny_llama_gguf

Run = Callable[..., Outcome]


def report(out: Path, *, checked: bool = False, own_kl: float | None = 0.0123) -> BuildReport:
    return BuildReport(
        path=out,
        format="onnx",
        device="cuda",
        precision="int4",
        engine="phirt",
        architecture="phi3",
        source="tiny\x1b[2J.gguf",
        source_id="sha256:abc",
        bytes=1_234_567_890,
        seconds=65.43,
        own_kl=own_kl,
        quality=quality_report() if checked else None,
    )


@pytest.fixture
def asked() -> dict[str, Any]:
    """What `build_model` was given."""
    return {}


@pytest.fixture(autouse=True)
def _log_of_before() -> Iterator[None]:
    yield
    logger = logging.getLogger("phirt")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)


@pytest.fixture
def real(capsys: pytest.CaptureFixture[str]) -> Run:
    """As ``phirt build ...``."""

    def run(*arguments: object) -> Outcome:
        try:
            status = main(["build", *map(str, arguments)])
        except SystemExit as end:
            status = int(end.code or 0)
        return Outcome(status, *capsys.readouterr())

    return run


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, real: Run, asked: dict[str, Any]) -> Run:
    """Likewise, with `build_model` replaced by one that finds ``found``."""

    def run(*arguments: object, found: BuildReport | Exception | None = None) -> Outcome:
        def build_model(source: object, out: Path, **options: Any) -> BuildReport:
            asked.update(options, source=source, out=out)
            if isinstance(found, Exception):
                raise found
            options["progress"](Progress("convert", 1, 1, "tensors"))
            return found or report(out)

        monkeypatch.setattr(building, "build_model", build_model)
        return real(*arguments)

    return run


# What is printed.


def test_what_a_pipe_gets(run):
    done = run("tiny.gguf", "-o", "out", found=report(Path("some", "out")))
    assert done.status == 0
    assert "\x1b" not in done.out + done.err
    lines = done.out.splitlines()
    assert lines[0] == str(Path("some", "out"))
    assert max(map(len, lines)) <= 80
    text = " ".join(lines)
    assert "phi3 as onnx, int4 for cuda, built by phirt from tiny\\u001b[2J.gguf: " in text
    assert "1,234.6 MB in 65.4 s" in text
    assert "Rounding moved the canary by 0.0123 nats" in text
    assert "Mean KL" not in text
    assert lines[-1] == f'Run it: phirt run -m {Path("some", "out")} "Hello"'


def test_what_nobody_measured_is_not_printed(run):
    done = run("tiny.gguf", "-o", "out", found=report(Path("out"), own_kl=None))
    assert "canary" not in done.out


def test_what_the_check_found(run):
    done = run("tiny.gguf", "-o", "out", found=report(Path("out"), checked=True))
    text = " ".join(done.out.split())
    assert "Mean KL from fp32 on text: 0.0061 (many-row kernels), 0.0061 (one-row kernels)." in text


@pytest.mark.skipif(sys.platform == "win32", reason="its shells quote in another way")
@pytest.mark.parametrize("name", ["my models", "a&b", "$HOME"])
def test_a_command_that_can_be_copied(run, name):
    done = run("tiny.gguf", "-o", "out", found=report(Path(name)))
    assert done.out.splitlines()[-1] == f"Run it: phirt run -m '{name}' \"Hello\""


@pytest.mark.parametrize("checked", [False, True])
def test_json_is_one_object(run, checked):
    done = run("tiny.gguf", "-o", "out", "--json", found=report(Path("out"), checked=checked))
    document = json.loads(done.out)
    assert document["path"] == "out"
    assert document["own_kl"] == 0.0123
    assert (document["bytes"], document["engine"]) == (1_234_567_890, "phirt")
    assert (document["quality"] is not None) == checked


# What is passed on.


def test_what_is_not_asked_for_is_left_to_the_library(run, asked):
    run("tiny.gguf", "-o", "out")
    assert asked.pop("progress")
    assert asked.pop("announce")
    assert asked == {
        "source": "tiny.gguf",
        "out": Path("out"),
        "format": "onnx",
        "precision": "auto",
        "device": "cpu",
        "engine": "auto",
        "quantization": None,
        "options": {},
        "max_kl": None,
        "check_tokens": 2048,
        "overwrite": False,
        "offline": False,
    }


def test_what_was_asked_for_is_passed_on(run, asked):
    run(
        *("org/name", "--out", "a/b", "--format", "openvino", "--precision", "int4"),
        *("--device", "gpu:1", "--engine", "phirt", "--check", "0.05", "--check-tokens", "999"),
        *("--overwrite", "--offline", "--extra", "a=1", "--extra", "b=x=y"),
    )
    expected = {
        "source": "org/name",
        "out": Path("a/b"),
        "format": "openvino",
        "precision": "int4",
        "device": "gpu:1",
        "engine": "phirt",
        "options": {"a": "1", "b": "x=y"},
        "max_kl": 0.05,
        "check_tokens": 999,
        "overwrite": True,
        "offline": True,
    }
    assert {name: asked[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--symmetric"], Quantization(symmetric=True)),
        (["--block-size", "128"], Quantization(block_size=128)),
        (["--calibrate"], Quantization(calibrate=True)),
        (["--int8-layers", "none"], Quantization(int8_layers=())),
        (
            ["--int8-layers", "lm_head", "--int8-layers", "layers.0.*"],
            Quantization(int8_layers=("lm_head", "layers.0.*")),
        ),
        (["--block-size", "32"], Quantization(int8_layers=DEFAULT_INT8_LAYERS)),
    ],
)
def test_how_int4_rounds(run, asked, arguments, expected):
    run("tiny.gguf", "-o", "out", "--precision", "int4", *arguments)
    assert asked["quantization"] == expected


# What goes wrong.


@pytest.mark.parametrize(
    "error",
    [
        QualityCheckError("It is worse than asked."),
        EngineNotInstalledError("Run: phirt build --prepare-engine mlx"),
        EngineFailedError("The engine failed."),
        StoreError("The disk is full."),
        DeviceNotAvailableError("There is no such device."),
    ],
)
def test_a_failure_is_one_line_and_status_1(run, error):
    done = run("tiny.gguf", "-o", "out", found=error)
    assert (done.status, done.out) == (1, "")
    assert done.err == f"phirt: {error}\n"


def test_an_argument_out_of_range_is_wrong_usage(run):
    done = run("tiny.gguf", "-o", "out", found=ValueError("max_kl=-1 must be\nabove 0"))
    assert (done.status, done.out) == (2, "")
    assert done.err == "phirt: max_kl=-1 must be above 0 (phirt build --help lists the options)\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "SOURCE and -o OUT are needed: phirt build SOURCE -o OUT"),
        (["tiny.gguf"], "SOURCE and -o OUT are needed"),
        (["-o", "out"], "SOURCE and -o OUT are needed"),
        (["tiny.gguf", "-o"], "expected one argument"),
        (["tiny.gguf", "-o", "out", "--extra", "rtn"], "--extra rtn: an option reads like name="),
        (["tiny.gguf", "-o", "out", "--colour", "red"], "--colour"),
        (["tiny.gguf", "-o", "out", "--precision", "int3"], "'int3'"),
        (["tiny.gguf", "-o", "out", "--format", "gguf"], "'gguf'"),
        (["tiny.gguf", "-o", "out", "--engine", "olive"], "'olive'"),
        (["tiny.gguf", "-o", "out", "--block-size", "many"], "'many'"),
        (["tiny.gguf", "-o", "out", "--block-size", "33"], "block_size=33 is not one of 16, 32,"),
        (["tiny.gguf", "-o", "out", "--with", "torch"], "--with and --force go with --prepare-eng"),
        (["tiny.gguf", "-o", "out", "--force"], "--with and --force go with --prepare-engine"),
        (["tiny.gguf", "--prepare-engine", "mlx"], "--prepare-engine builds nothing"),
        (["-o", "out", "--prepare-engine", "mlx"], "--prepare-engine builds nothing"),
        (["--force", "--remove-engine", "mlx"], "--remove-engine does nothing else"),
        (["tiny.gguf", "--remove-engine", "mlx"], "--remove-engine does nothing else"),
        (["--prepare-engine", "mlx", "--remove-engine", "mlx"], "--remove-engine does nothing els"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(run, asked, arguments, said):
    done = run(*arguments)
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("phirt: ")
    assert said in done.err
    assert done.err.count("\n") == 1
    assert "--help lists the options" in done.err
    assert not asked


# Engines are prepared.


def test_an_engine_is_prepared_and_nothing_built(run, asked, monkeypatch):
    given: dict[str, Any] = {}

    def prepare_engine(name: str, **options: Any) -> Path:
        given.update(options, name=name)
        return Path("engines", name)

    monkeypatch.setattr(environments, "prepare_engine", prepare_engine)
    done = run("--prepare-engine", "mlx", "--with", "torch==2.13.0", "--with", "a>=1", "--force")
    assert done.out == f"The engine mlx is ready in {Path('engines', 'mlx')}\n"
    assert given.pop("progress")
    assert given == {"name": "mlx", "requirements": ["torch==2.13.0", "a>=1"], "force": True}
    assert not asked
    document = json.loads(run("--prepare-engine", "mlx", "--json").out)
    assert document == {"engine": "mlx", "path": str(Path("engines", "mlx"))}
    assert (given["requirements"], given["force"]) == (None, False)


def test_an_engine_is_removed(real, tmp_path, monkeypatch):
    monkeypatch.setenv("PHIRT_HOME", str(tmp_path / "home"))
    folder = Store().root / "engines" / "mlx"
    folder.mkdir(parents=True)
    (folder / "pyvenv.cfg").write_text("")
    assert real("--remove-engine", "mlx").out == "The environment of mlx is removed\n"
    assert not folder.exists()
    assert real("--remove-engine", "mlx").out == "There is no environment of mlx\n"
    done = real("--remove-engine", "mlx", "--json")
    assert json.loads(done.out) == {"engine": "mlx", "removed": False}
    assert "olive" in real("--remove-engine", "olive").err


def test_an_engine_that_there_is_not(real):
    done = real("--prepare-engine", "olive")
    assert done.status == 2
    assert "'olive'" in done.err
    assert done.err.count("\n") == 1


# The real thing.


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty folder."""
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("llama") / "tiny", "llama")


def test_a_model_is_built(real, tmp_path, place):
    require("onnx")
    source = write_tiny_llama_gguf(tmp_path / "tiny.gguf")
    out = place / "a" / "out"
    done = real(source, "-o", out, "--precision", "int4", "--symmetric", "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out)["path"] == str(out)
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.precision == "int4"
    assert "-sym-" in manifest.build["recipe"]
    again = real(source, "-o", out)
    assert (again.status, again.out) == (1, "")
    assert "is a model already" in again.err
    assert real(source, "-o", out, "--overwrite").status == 0
    assert [path.name for path in place.rglob("*") if path.is_dir()] == ["a", "out"]


def _without_weights(source: Path) -> None:
    (source / "model.safetensors").unlink()


def _with_pickles(source: Path) -> None:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")


def _of_no_architecture(source: Path) -> None:
    text = (source / "config.json").read_text()
    (source / "config.json").write_text(text.replace('"llama"', '"nonesuch"'))


def _as_onnx(source: Path) -> None:
    (source / "model.safetensors").unlink()
    (source / "genai_config.json").write_text("{}")


@pytest.fixture
def refused(real: Run, llama: Path, place: Path) -> Callable[..., str]:
    """What is said where a copy of the model cannot be built: one line, and nothing is left."""
    require("onnx")

    def refused(*arguments: str, status: int, spoil: Callable[[Path], None] | None = None) -> str:
        source = shutil.copytree(llama, place.parent / "source")
        if spoil is not None:
            spoil(source)
        done = real(source, "-o", place / "a" / "out", *arguments)
        assert (done.status, done.out) == (status, "")
        assert done.err.startswith("phirt: ")
        assert done.err.count("\n") == 1
        assert not any(place.iterdir())
        return done.err

    return refused


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_without_weights, "safetensors"),
        (_with_pickles, "pickle"),
        (_of_no_architecture, "it knows the architectures"),
        (_as_onnx, "Name the checkpoint that it was made from"),
    ],
)
def test_a_source_that_cannot_be_built(refused, spoil, words):
    assert words in refused("--format", "openvino", status=1, spoil=spoil)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "npu"], "it writes onnx for cpu, cuda, directml, webgpu"),
        (["--precision", "bf16"], "it writes onnx in fp32, fp16, exact, int8, int4"),
        (["--device", "cuda", "--check", "1"], "cuda"),
        (["--precision", "int4", "--block-size", "256"], "smaller block size"),
    ],
)
def test_what_nobody_builds(refused, arguments, words):
    assert words in refused(*arguments, status=1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "auto"], "a device that is named, such as 'cpu'"),
        (["--symmetric"], "pass precision='int4'"),
        (["--extra", "a=1"], "are for the engines 'model-builder' and 'mlx'"),
        (["--check", "nan"], "max_kl=nan must be a number of nats above 0"),
        (["--check", "1", "--check-tokens", "9"], "tokens=9 is too few"),
        (["--precision", "int4", "--int8-layers", "x"], "matches no matrix"),
        (
            ["--precision", "int4", "--engine", "model-builder", "--calibrate"],
            "quantization is for the engine 'phirt'",
        ),
    ],
)
def test_options_that_mean_nothing(refused, arguments, words):
    assert words in refused(*arguments, status=2)
