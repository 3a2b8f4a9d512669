"""``phirt devices``, on records of machines and on this one."""

from __future__ import annotations

import io
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import phirt
from phirt.cli import main
from phirt.devices.machine import BackendRecord, Machine
from phirt.devices.record_json import machine_from_json, to_json
from phirt.dispatch.survey import Survey
from tests.devices.machines import INTEL, NVIDIA, listed, make_machine, missing, offer, ran

MACHINE = make_machine(
    listed("onnxruntime", offer("cpu"), trials=(ran("cpu"),), version="onnxruntime 1.31.1"),
    BackendRecord(
        backend="openvino",
        outcome="crashed",
        reason="Asked for its devices, its process crashed with SIGILL: an instruction that this "
        "processor does not have.",
        fix="Reinstall or update its runtime.",
    ),
    missing("mlx"),
    listed(
        "transformers",
        offer("cpu"),
        offer("cuda:0", "cuda:0", pci="0000:01:00.0", memory_bytes=24_000_000_000),
        trials=(ran("cpu"), ran("cuda:0")),
        version="transformers 5.23.0, torch 2.13.0",
    ),
    pci=(INTEL, NVIDIA),
    distributions={"onnxruntime": "1.31.1", "torch": "2.13.0"},
)

SHOWN = """\
Test CPU (CPU, 32.0 GB)
  ready       onnxruntime        cpu           onnxruntime 1.31.1
  broken      openvino           cpu
              Asked for its devices, its process crashed with SIGILL: an
              instruction that this processor does not have.
              Reinstall or update its runtime.
  missing     mlx                cpu
              python -m pip install "phirt[mlx]"
  ready       transformers       cpu           transformers 5.23.0, torch 2.13.0

Iris Xe Graphics (GPU, driver i915)
  missing     onnxruntime        webgpu        onnxruntime 1.31.1
              onnxruntime 1.31.1 is installed, and does not serve it.
              python -m pip uninstall -y onnxruntime &&
              python -m pip install "phirt[webgpu]"
  broken      openvino           gpu
              Asked for its devices, its process crashed with SIGILL: an
              instruction that this processor does not have.
              Reinstall or update its runtime.
  no-device   transformers       gpu           transformers 5.23.0, torch 2.13.0
              transformers 5.23.0, torch 2.13.0 is installed, and does not find
              the device.
              Install Intel's driver and a build of torch for it, if it is one
              of the GPUs of
              https://docs.pytorch.org/docs/stable/notes/get_start_xpu.html.

GeForce RTX 4090 (GPU, 24.0 GB, driver nvidia 570.1)
  missing     onnxruntime        cuda          onnxruntime 1.31.1
              onnxruntime 1.31.1 is installed, and does not serve it.
              python -m pip uninstall -y onnxruntime &&
              python -m pip install "phirt[cuda]"
  missing     mlx                cuda
              python -m pip install "mlx[cuda13]" mlx-lm
  ready       transformers       cuda:0        transformers 5.23.0, torch 2.13.0

What is broken is remembered: `phirt devices --refresh` asks again.
"""


@pytest.fixture
def record(tmp_path):
    def write(machine: Machine) -> str:
        file = tmp_path / "machine.json"
        file.write_text(json.dumps(to_json(machine)), encoding="utf-8")
        return str(file)

    return write


def test_a_record_of_another_machine_in_a_pipe(record, capsys):
    assert main(["devices", "--machine", record(MACHINE)]) == 0
    assert capsys.readouterr().out == SHOWN


def test_the_document_has_the_fields_that_it_promises(record, capsys):
    assert main(["devices", "--json", "--machine", record(MACHINE)]) == 0
    cpu, _, nvidia = json.loads(capsys.readouterr().out)
    assert list(cpu) == ["device", "name", "kind", "memory_bytes", "driver", "software", "backends"]
    assert nvidia["device"] == "cuda:0"
    assert nvidia["kind"] == "gpu"
    assert nvidia["memory_bytes"] == 24_000_000_000
    ready = nvidia["backends"][-1]
    assert ready == {
        "backend": "transformers",
        "device": "cuda:0",
        "native": "cuda:0",
        "version": "transformers 5.23.0, torch 2.13.0",
        "status": "ready",
        "reason": "A tiny model ran there.",
        "fix": None,
    }


def test_a_raw_record_comes_out_as_it_went_in(record, capsys):
    assert main(["devices", "--raw", "--machine", record(MACHINE)]) == 0
    assert machine_from_json(json.loads(capsys.readouterr().out)) == MACHINE


def test_a_record_comes_through_a_pipe(capsys, monkeypatch):
    content = io.BytesIO(json.dumps(to_json(MACHINE)).encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(content, encoding="utf-8"))
    assert main(["devices", "--machine", "-"]) == 0
    assert capsys.readouterr().out == SHOWN


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_record_that_a_shell_of_windows_wrote(tmp_path, capsys, encoding):
    file = tmp_path / "machine.json"
    file.write_text(json.dumps(to_json(MACHINE)), encoding=encoding)
    assert main(["devices", "--machine", str(file)]) == 0
    assert capsys.readouterr().out == SHOWN


def test_a_raw_record_does_not_tell_where_the_user_lives(record, capsys, monkeypatch, tmp_path):
    home = tmp_path / "Ada Lovelace"
    monkeypatch.setattr(Path, "home", lambda: home)
    path = f"{home / 'lib'}{os.pathsep}{home}-else{os.pathsep}{home}"
    machine = replace(MACHINE, environment={"LD_LIBRARY_PATH": path})
    assert main(["devices", "--raw", "--machine", record(machine)]) == 0
    shown = json.loads(capsys.readouterr().out)["environment"]["LD_LIBRARY_PATH"]
    assert shown == os.pathsep.join([str(Path("~", "lib")), f"{home}-else", "~"])


def test_a_strangers_words_give_a_terminal_no_orders(record, capsys):
    evil = make_machine(
        listed("x\x1b[2J", offer("cpu"), version="\x1b]0;title\x07"),
        pci=(),
    )
    assert main(["devices", "--machine", record(evil)]) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "Expecting value"),
        ("[" * 100_000, "--machine"),
        ("{}", "machine lacks the field 'cpu'"),
        (
            json.dumps(to_json(replace(MACHINE, backends=(listed("fake", offer("No Name")),)))),
            "'No Name' is not a device name",
        ),
        ('{"schema": 7}', "this phirt reads schema 1"),
        ("\xff", "--machine"),
    ],
)
def test_what_is_no_record_is_wrong_usage(tmp_path, capsys, content, complaint):
    file = tmp_path / "machine.json"
    file.write_text(content, encoding="latin-1")
    assert main(["devices", "--machine", str(file)]) == 2
    err = capsys.readouterr().err
    assert complaint in err
    assert err.count("\n") == 1


def test_a_record_that_is_not_there_is_one_line(tmp_path, capsys):
    assert main(["devices", "--machine", str(tmp_path / "none.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_record_of_another_machine_cannot_be_asked_again(record, capsys):
    assert main(["devices", "--refresh", "--machine", record(MACHINE)]) == 2
    assert "--refresh" in capsys.readouterr().err


class TestThisMachine:
    @pytest.fixture(autouse=True)
    def _asked(self, monkeypatch):
        self.calls: list[Any] = []

        def machine(survey: Survey, *, trials: str) -> Machine:
            self.calls.append(trials)
            return MACHINE

        monkeypatch.setattr(Survey, "machine", machine)
        monkeypatch.setattr(Survey, "refresh", lambda survey: self.calls.append("refresh"))

    @pytest.mark.parametrize(
        ("options", "calls"),
        [
            ([], ["all"]),
            (["--no-trials"], ["cached"]),
            (["--refresh"], ["refresh", "all"]),
            (["--refresh", "--no-trials"], ["refresh", "cached"]),
        ],
    )
    def test_what_is_asked(self, capsys, options, calls):
        assert main(["devices", *options]) == 0
        out, err = capsys.readouterr()
        assert (out, err) == (SHOWN, "")
        assert self.calls == calls

    def test_the_function_says_the_same(self):
        assert phirt.devices()[0].name == "Test CPU"
        assert phirt.devices(refresh=True)[0].name == "Test CPU"
        assert self.calls == ["all", "refresh", "all"]


def test_help_fits_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["devices", "--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
