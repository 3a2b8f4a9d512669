"""``phirt plan``: what it says to a person, to a pipe and to a program."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from phirt.cli import main
from phirt.devices.machine import BackendRecord, Machine
from phirt.devices.record_json import to_json
from tests.dispatch.fake_backend import GIB, machine, offer, record
from tests.tiny_gguf import write_tiny_llama_gguf


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama_gguf(tmp_path_factory.mktemp("m") / "tiny.gguf", context_length=512)


@pytest.fixture
def plan(model, tmp_path, capsys):
    """``plan(machine, "arguments", ...)``: as ``phirt plan MODEL arguments`` there."""

    def run(here: Machine, *arguments: str) -> str:
        file = tmp_path / "machine.json"
        file.write_text(json.dumps(to_json(here)), encoding="utf-8")
        status = main(["plan", str(model), "--machine", str(file), *arguments])
        out: str
        out, err = capsys.readouterr()
        assert (status, err) == (0, ""), err
        return out

    return run


MISSING = replace(offer("cpu", status="broken"), reason="openvino does not import", fix="pip it")
CRASHED = BackendRecord(backend="mlx", outcome="crashed", reason="Its process died of SIGILL.")
HERE = machine(
    record("onnxruntime", "cpu", "openvino-auto"),
    record("openvino", MISSING),
    CRASHED,
    record("transformers", "cpu"),
    record("reference", "cpu"),
)


def test_what_would_run_it_and_why_the_others_would_not(plan):
    out = plan(HERE)
    lines = out.splitlines()
    assert lines[0].endswith("tiny.gguf on a CPU")
    assert lines[1] == "  for one answer at a time, 512 tokens of context"
    assert lines[3].startswith("chosen    onnxruntime        cpu           onnx-genai")
    assert "to be converted" in lines[3]
    (usable,) = [line for line in lines if line.startswith("usable")]
    assert usable.startswith("usable    transformers       cpu           safetensors fp32")
    for expected in ("openvino does not import", "pip it", "Its process died of SIGILL."):
        assert expected in out
    named = "used by name only: onnxruntime (openvino-auto), reference (cpu)."
    assert named in " ".join(out.split())


def test_it_keeps_within_80_columns(plan, model):
    lines = plan(HERE).replace(str(model), "a-model").splitlines()
    assert max(map(len, lines)) <= 80


def test_a_pipe_gets_no_colours(plan):
    assert "\x1b" not in plan(HERE)


def test_what_is_alike_is_told_of_once(plan):
    alike = machine(record("onnxruntime", "gpu", "npu"), record("onnxruntime-genai", "gpu"), pci=())
    lines = plan(alike).splitlines()
    starts = [line[:39].rstrip() for line in lines if "onnx-genai" in line]
    assert starts == [
        "chosen    onnxruntime        gpu",
        "usable    onnxruntime        npu",
        "          onnxruntime-genai  gpu",
    ]
    assert sum("has said that there" in line for line in lines) == 2
    assert sum(" to " in line and "memory: " in line for line in lines) == 1


def test_a_plugin_of_another_machine(plan):
    out = plan(machine(record("onnxruntime", "cpu"), record("zeta", "cpu")))
    assert out.count("chosen    onnxruntime        cpu") == 1
    assert "backend='zeta' is not registered" in out


def test_a_command_is_not_broken_within(plan):
    """Its first line alone would be another command."""
    missing = replace(offer("cpu", status="broken"), reason="no", fix="x" * 40 + " && " + "y " * 25)
    lines = plan(machine(record("zeta", missing), record("onnxruntime", "cpu"))).splitlines()
    assert " " * 10 + "x" * 40 + " &&" in lines
    assert " " * 10 + ("y " * 25).rstrip() in lines


def test_what_it_takes_against_what_is_free(plan):
    out = " ".join(plan(HERE, "--context", "256").split())
    assert "256 tokens of context" in out
    assert f"of {16 * GIB / 1e6:,.0f} MB free (weights" in out


def test_what_was_asked_for(plan):
    out = plan(HERE, "--device", "cuda", "--optimize", "prefill")
    assert "device 'cuda'; for long prompts and short answers, 512 tokens of context" in out
    assert "Nothing here can run it." in out
    assert "it offers only cpu" in out


def test_as_json(plan):
    document = json.loads(plan(HERE, "--json", "--precision", "fp32"))
    assert document["precision"] == "fp32"
    first = document["candidates"][0]
    assert (first["backend"], first["status"]) == ("onnxruntime", "chosen")
    assert first["artifact"]["precision"] == "fp32"
    assert {row["stage"] for row in document["candidates"]} == {None, "runtime", "request"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--context", "0"], "context=0"),
        (["--context", "100000"], "more than the 512 tokens"),
        (["--precision", "int3"], "'int3' is not one of"),
        (["--device", "cuda:"], "not a device name"),
        (["--machine", "no-such-file"], "no-such-file"),
    ],
)
def test_mistakes(model, tmp_path, capsys, arguments, message):
    file = tmp_path / "machine.json"
    file.write_text(json.dumps(to_json(HERE)), encoding="utf-8")
    assert main(["plan", str(model), "--machine", str(file), *arguments]) in (1, 2)
    assert message in capsys.readouterr().err


def test_nothing_is_fetched_or_converted(plan, tmp_path, monkeypatch):
    monkeypatch.setenv("PHIRT_HOME", str(tmp_path / "home"))
    plan(HERE)
    assert not (tmp_path / "home" / "models").exists()
