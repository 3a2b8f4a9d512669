"""``phirt bench``: its table, its JSON, its plot and its exit status."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from phirt.benchmark import plots
from phirt.benchmark import run as benchmark
from phirt.cli import main
from phirt.errors import BackendNotInstalledError, UnsupportedModelError
from tests.benchmark.samples import SETTINGS, point, report, row
from tests.installed import require

ONE = report(
    row("onnxruntime", point(0.01)),
    row("onnxruntime-genai", point(0.005), load_s=12.345),
    row("openvino", notes=("1 stream: its process crashed.",)),
)
SEVERAL = report(
    row("onnxruntime", point(0.01), point(0.02, streams=4)),
    settings=replace(SETTINGS, concurrency=(1, 4)),
    takes_turns=False,
    notes=("The rows did not take turns.",),
)


@pytest.fixture
def asked():
    """What `phirt.bench` was given."""
    return {}


@pytest.fixture
def run(monkeypatch, capsys, asked):
    def run(*arguments, found=ONE):
        def bench(model, *, on_step, progress, **given):
            asked.update(given, model=model)
            if isinstance(found, Exception):
                raise found
            on_step("loading onnxruntime on cpu (1 of 3)")
            return found

        monkeypatch.setattr(benchmark, "bench", bench)
        status = main(["bench", *arguments])
        return status, *capsys.readouterr()

    return run


def test_a_table_of_processes_and_one_of_speeds(run):
    status, out, err = run()
    assert status == 0
    assert err == "phirt: loading onnxruntime on cpu (1 of 3)\n"
    lines = out.splitlines()
    assert lines[0] == "tiny on A CPU"
    assert lines[1] == "4 threads, 16.0 GB, linux; phirt 0.1.0; median of 3, 4 new tokens"
    assert lines[3:7] == [
        "BACKEND            DEVICE  FORM   LOAD  MEMORY",
        "onnxruntime        cpu     int8   0.50   1,234",
        "onnxruntime-genai  cpu     int8  12.35   1,234",
        "openvino           cpu     int8   0.50   1,234",
    ]
    assert lines[8:12] == [
        "PROMPT OF 128 TOKENS, 1 STREAM",
        "BACKEND            DEVICE  FORM  TTFT  PREFILL    ±  DECODE    ±   P50   P99",
        "onnxruntime        cpu     int8   100    1,280  10%     100  10%  10.0  11.0",
        "onnxruntime-genai  cpu     int8  50.0    2,560  10%     200  10%  5.00  5.50",
    ]
    assert "openvino on cpu: 1 stream: its process crashed.\n" in out
    assert "Not measured: mlx on metal: it is \\u001b[31mmissing.\n  get a Mac\n" in out
    assert "The rows took turns" in " ".join(out.split())
    assert all(len(line) <= 80 for line in lines)


def test_of_several_streams_all_tokens_are_told(run):
    _, out, _ = run(found=SEVERAL)
    lines = out.splitlines()
    heading = lines.index("PROMPT OF 128 TOKENS, 4 STREAMS AT ONCE")
    assert lines[heading + 1].split()[3:] == ["TTFT", "ALL", "±", "DECODE", "±", "P50", "P99"]
    assert lines[heading + 2].split()[3:] == ["200", "61.5", "10%", "50.0", "10%", "20.0", "22.0"]
    assert "ALL: tokens of all streams a second" in " ".join(out.split())
    assert out.endswith("\nThe rows did not take turns.\n")
    assert all(len(line) <= 80 for line in lines)


def test_one_repeat_has_no_spread(run):
    once = point(0.01)
    alone = report(row("onnxruntime", replace(once, samples=once.samples[:1])))
    _, out, _ = run(found=alone)
    assert "%" not in out


def test_the_same_as_json(run):
    _, out, _ = run("--json")
    assert json.loads(out) == json.loads(json.dumps(ONE.to_json()))


def test_what_was_asked_for_is_passed_on(run, asked):
    run(
        *("-m", "tiny.gguf", "--backend", "onnxruntime", "--device", "cpu", "--precision", "int4"),
        *("--prompt-tokens", "8,16", "--new-tokens", "4", "--concurrency", "1,4"),
        *("--repeats", "5", "--row-timeout", "60", "--offline"),
    )
    assert asked == {
        "model": "tiny.gguf",
        "backend": "onnxruntime",
        "device": "cpu",
        "precision": "int4",
        "prompt_tokens": (8, 16),
        "new_tokens": 4,
        "concurrency": (1, 4),
        "repeats": 5,
        "row_timeout_s": 60.0,
        "offline": True,
    }


def test_what_was_not_asked_for_is_as_in_python(run, asked):
    run()
    assert asked == {
        "model": None,
        "backend": "all",
        "device": "all",
        "precision": "auto",
        "offline": False,
    }


def test_the_plot_is_drawn_beside_the_answer(run, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.svg"
    status, out, err = run("--json", "--plot", str(path))
    assert status == 0
    assert json.loads(out)
    assert err.endswith(f"phirt: the plot is {path}\n")
    assert path.read_bytes().startswith(b"<?xml")


def test_a_plot_that_cannot_be_drawn_is_refused_before_anything_is_measured(
    run, asked, tmp_path, monkeypatch
):
    status, _, err = run("--plot", str(tmp_path / "plot.jpeg"))
    assert (status, asked) == (2, {})
    assert ".png, .svg or .pdf" in err
    monkeypatch.setattr(plots, "find_spec", lambda _: None)
    status, _, err = run("--plot", str(tmp_path / "plot.png"))
    assert (status, asked) == (1, {})
    assert "phirt[report]" in err


def test_nothing_measured_is_a_failure_and_nothing_to_draw(run, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.png"
    status, out, _ = run("--plot", str(path), found=report())
    assert status == 1
    assert "Not measured" in out
    assert not path.exists()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UnsupportedModelError("Nothing here can run it."), 1),
        (BackendNotInstalledError("It is not installed."), 1),
        (ValueError("new_tokens=1 must be from 2 to 9."), 2),
    ],
)
def test_errors_are_one_line(run, error, status):
    found, out, err = run(found=error)
    assert (found, out) == (status, "")
    assert err.startswith(f"phirt: {error}")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("text", ["1,", "a", "1;2"])
def test_a_list_of_numbers_that_is_none_is_wrong_usage(text, capsys):
    with pytest.raises(SystemExit) as end:
        main(["bench", "--prompt-tokens", text])
    assert end.value.code == 2
    assert "is not a list of whole numbers such as 128,512" in capsys.readouterr().err


def test_a_real_one_end_to_end(tiny_gguf, tmp_path, capsys):
    require("onnxruntime")
    pytest.importorskip("matplotlib")
    plot = tmp_path / "plot.png"
    status = main(
        [
            *("bench", "-m", str(tiny_gguf), "--backend", "onnxruntime", "--device", "cpu"),
            *("--prompt-tokens", "8", "--new-tokens", "4", "--concurrency", "2", "--repeats", "1"),
            *("--json", "--plot", str(plot), "--offline"),
        ]
    )
    out, err = capsys.readouterr()
    assert status == 0, err
    document = json.loads(out)
    (found,) = document["rows"]
    (case,) = found["points"]
    assert (case["concurrency"], case["new_tokens"], len(case["samples"])) == (2, 4, 1)
    assert found["peak_memory_bytes"] > 10_000_000
    assert plot.stat().st_size > 10_000
