"""``phirt doctor``: what it prints and returns, and a model that it mends by its own command."""

from __future__ import annotations

import io
import json
import shlex
import sys
from collections.abc import Callable
from importlib import import_module

import pytest

from phirt import doctor
from phirt.build.convert import convert
from phirt.cli import main
from phirt.doctor import Finding
from phirt.models.store import Store
from tests.hub.fake_hub import FakeHub

BROKEN = Finding(
    severity="broken",
    area="packages",
    found="onnxruntime 1.31.1 and onnxruntime-webgpu 1.27.0 both installed the package "
    "'onnxruntime' into /home/somebody/project/.venv/lib/python3.11/site-packages, and overwrote "
    "each other's files.",
    why="What is left is a mixture, and uninstalling one takes files of the other. Keep one.",
    command="python -m pip uninstall -y onnxruntime onnxruntime-webgpu && python -m pip install "
    "onnxruntime-webgpu",
)
WARNING = Finding(severity="warning", area="store", found="The disk is \x1b[31mfull.", why="Alas.")
OK = Finding(severity="ok", area="versions", found="All is well.")


@pytest.fixture
def run(monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """``phirt doctor``, which finds what it is told."""

    def run(*arguments: str, findings: list[Finding]) -> tuple[int, str]:
        monkeypatch.setattr(doctor, "diagnose", lambda **_: findings)
        # In the package, the command's function has its module's name.
        command = import_module("phirt.cli.doctor")
        monkeypatch.setattr(command, "survey_machine", lambda **_: None)
        return main(["doctor", *arguments]), capsys.readouterr().out

    return run


def test_nothing_is_broken(run):
    assert run(findings=[OK]) == (0, "ok       versions: All is well.\nNothing is broken.\n")


def test_a_warning_breaks_nothing(run):
    status, out = run(findings=[WARNING, OK])
    assert status == 0
    assert out.endswith("0 broken, 1 warning.\n")


def test_lines_of_80_columns_and_a_command_in_one_piece(run):
    status, out = run(findings=[BROKEN, WARNING])
    assert status == 1
    first, *_ = lines = out.splitlines()
    assert first.startswith("broken   packages: onnxruntime 1.31.1 and")
    (command,) = [line for line in lines if line.lstrip().startswith("$")]
    assert command == f"         $ {BROKEN.command}"
    assert all(len(line) <= 80 for line in lines if line != command)
    # A path in one piece, too.
    assert any(
        "/home/somebody/project/.venv/lib/python3.11/site-packages," in line for line in lines
    )
    assert lines[-1] == "1 broken, 1 warning. The command after $ mends what it stands below."


def test_a_strangers_words_give_the_terminal_no_orders(run):
    assert "\x1b" not in run(findings=[WARNING])[1]


def test_colour_on_a_terminal(run, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    assert run(findings=[BROKEN, OK])[0] == 1
    text = terminal.getvalue()
    assert "\x1b[1;31mbroken" in text
    assert "\x1b[32mok" in text
    assert BROKEN.command is not None
    assert BROKEN.command in text


def test_json(run):
    status, out = run("--json", findings=[BROKEN, OK])
    document = json.loads(out)
    assert (status, document["broken"]) == (1, True)
    assert document["findings"][0] == {
        "severity": "broken",
        "area": "packages",
        "found": BROKEN.found,
        "why": BROKEN.why,
        "command": BROKEN.command,
    }
    assert document["findings"][1]["command"] is None
    assert json.loads(run("--json", findings=[OK])[1])["broken"] is False


def store_findings(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, str]]:
    main(["doctor", "--json", *arguments])
    findings = json.loads(capsys.readouterr().out)["findings"]
    return [each for each in findings if each["area"] == "store" and each["severity"] != "ok"]


@pytest.mark.parametrize("form", ["built-elsewhere", "converted-here"])
def test_a_damaged_model_is_mended_by_the_command(form, tiny_gguf, tmp_path, monkeypatch, capsys):
    """From a hub on loopback, as a build for ONNX or as a GGUF file that is converted."""
    if form == "built-elsewhere":
        convert(tiny_gguf, tmp_path, layout="onnx-genai", precision="int8")
        files = {f"cpu-int8/{path.name}": path.read_bytes() for path in tmp_path.iterdir()}
        del files["cpu-int8/phirt.json"]
        options = []
    else:
        files = {"Tiny-F32.gguf": tiny_gguf.read_bytes()}
        options = ["--precision", "fp32", "--backend", "openvino"]
    with FakeHub() as hub:
        hub.add_repo("org/tiny", files)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))
        assert main(["pull", "org/tiny", *options]) == 0
        (model,) = Store().installed()
        weights = max(model.path.iterdir(), key=lambda path: path.stat().st_size)
        weights.unlink()
        capsys.readouterr()
        (found,) = store_findings(capsys)
        assert weights.name in found["found"]
        program, *arguments = shlex.split(found["command"])
        assert (program, main(arguments)) == ("phirt", 0)
        capsys.readouterr()
        assert store_findings(capsys, "--deep") == []
        assert [each.key for each in Store().installed()] == [model.key]
