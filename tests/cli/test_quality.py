"""``phirt quality``: its tables, its JSON, its exit status, and what it refuses early."""

from __future__ import annotations

import json

import pytest

from phirt.cli import main
from phirt.errors import BackendNotInstalledError, UnsupportedModelError
from phirt.quality import comparison
from phirt.quality import folder as folder_module
from phirt.quality.figures import HISTOGRAM_EDGES, Figures
from phirt.quality.report import (
    KernelQuality,
    QualityReport,
    Section,
    Side,
    SpanFigures,
    WorstPosition,
)
from phirt.quality.speed import Rates, Speed
from phirt.quality.verdict import Thresholds, Verdict

FIGURES = Figures(
    positions=4064,
    spans=32,
    ppl_reference=12.371,
    ppl=12.464,
    kl_mean=0.0061,
    kl_se=0.0004,
    kl_p99=0.031,
    top1_agreement=0.9591,
    top1_se=0.003,
)
QUALITY = KernelQuality(
    figures=FIGURES,
    sections=(Section(name="english", figures=FIGURES), Section(name="c\x1b[2J", figures=FIGURES)),
    spans=(SpanFigures(section="english", start=0, positions=127, kl_mean=0.006),),
    histogram=(0,) * (len(HISTOGRAM_EDGES) - 2) + (4064,),
    worst=(
        WorstPosition(
            section="english",
            position=81,
            before="Once upon a time there was\n\x1b[31m a",
            token=" king",  # noqa: S106  no password
            after=" who",
            reference_token=" king",  # noqa: S106
            reference_probability=0.41,
            candidate_token=" \x9b31mqueen",  # noqa: S106
            candidate_probability=0.33,
            kl=0.132,
        ),
    ),
)


def side(precision, size):
    return Side(
        name="tiny",
        path="/somewhere",
        format="onnx-genai",
        precision=precision,
        backend="onnxruntime-genai",
        device="cuda:1",
        bytes=size,
    )


def report(*, passed=True, many=True, speed=True):
    rates = Rates(reference=87.1, candidate=1927.6, ratio=22.13)
    return QualityReport(
        reference=side("fp32", 544_000_000),
        candidate=side("int8", 149_000_000),
        vocabulary=49_152,
        many_rows=QUALITY if many else None,
        one_row=QUALITY,
        speed=Speed(prefill=rates, decode=rates, prompt_tokens=128, rounds=7) if speed else None,
        verdict=Verdict(
            grade="equal" if passed else "broken",
            passed=passed,
            reasons=() if passed else ("With the one-row kernels the mean KL is 3 nats.",),
            thresholds=Thresholds(),
        ),
        notes=("LongRoPE: only the factors for short contexts were run.",),
        version="1",
    )


@pytest.fixture
def asked():
    """What `compare_quality` was given."""
    return {}


@pytest.fixture
def run(monkeypatch, capsys, asked):
    def run(*arguments, found=None):
        def compare_quality(reference, candidate, **options):
            asked.update(options, models=(reference, candidate))
            if isinstance(found, BaseException):
                raise found
            return found or report()

        monkeypatch.setattr(comparison, "compare_quality", compare_quality)
        status = main(["quality", *arguments])
        return status, *capsys.readouterr()

    return run


def test_what_a_pipe_gets(run):
    status, out, err = run("fp32", "int8")
    assert (status, err) == (0, "")
    assert "\x1b" not in out
    assert "\x9b" not in out
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "reference: tiny, fp32 (onnx-genai) on onnxruntime-genai, cuda:1" in lines
    assert "candidate  149.0 MB  1,927.6 tokens/s  1,927.6 tokens/s" in lines
    assert "many-row      4,064       12.46   12.37   0.0061  0.0004   0.0310    95.9 %" in lines
    row = next(line for line in lines if line.startswith("english"))
    assert row.split() == ["english", "4,064", "12.46", "12.37", "0.0061", "95.9", "%"]
    assert "LongRoPE: only the factors for short contexts were run." in lines
    assert lines[-1].startswith("PASSED: equal")


def test_without_speeds_and_many_rows_their_columns_and_rows_are_left_out(run):
    _, out, _ = run("a", "b", found=report(many=False, speed=False))
    assert "PREFILL" not in out
    assert "many-row  " not in out
    assert "one-row" in out


def test_a_candidate_that_does_not_pass_is_status_1(run):
    status, out, _ = run("a", "b", found=report(passed=False))
    assert status == 1
    assert "FAILED: broken" in out
    assert out.endswith("With the one-row kernels the mean KL is 3 nats.\n")


def test_json_is_one_object(run):
    status, out, _ = run("a", "b", "--json", found=report(passed=False))
    assert status == 1
    assert json.loads(out)["verdict"]["grade"] == "broken"


def test_what_was_asked_for_is_passed_on(run, asked, tmp_path):
    one, other = tmp_path / "one.txt", tmp_path / "other.txt"
    one.write_text("One.")
    other.write_text("Other.")
    run(
        *("a", "b", "--text", str(one), "--text", str(other), "--tokens", "99", "--no-speed"),
        *("--max-kl", "0.5", "--min-agreement", "0.7", "--offline"),
        *("--reference-device", "cpu", "--reference-backend", "openvino"),
        *("--reference-precision", "int8", "--device", "cuda", "--backend", "mlx"),
        *("--precision", "int4"),
    )
    assert asked["models"] == ("a", "b")
    assert asked["text"] == {"one": "One.", "other": "Other."}
    assert (asked["tokens"], asked["max_kl"], asked["min_agreement"]) == (99, 0.5, 0.7)
    assert (asked["offline"], asked["speed"]) == (True, False)
    assert asked["reference_device"] == asked["reference_backend"].replace("openvino", "cpu")
    assert asked["reference_precision"] == "int8"
    assert (asked["device"], asked["backend"], asked["precision"]) == ("cuda", "mlx", "int4")


def test_what_was_not_asked_for_is_left_to_the_library(run, asked):
    run("a", "b")
    assert (asked["text"], asked["max_kl"], asked["min_agreement"]) == (None, None, None)
    assert asked["tokens"] == 4096
    assert asked["reference_precision"] == "auto"


def test_a_report_is_written_and_named(run, tmp_path):
    folder = tmp_path / "report"
    status, _, err = run("a", "b", "--report", str(folder))
    assert status == 0
    assert err == f"phirt: the report is {folder / 'report.md'}\n"
    assert (folder / "report.md").is_file()


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_loaded(run, asked, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    status, _, err = run("a", "b", "--report", str(tmp_path))
    assert status == 2
    assert "'mine.txt'" in err
    assert asked == {}


def test_a_missing_package_is_told_before_anything_is_loaded(run, asked, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "find_spec", lambda name: None)
    status, _, err = run("a", "b", "--report", str(tmp_path / "report"))
    assert status == 1
    assert 'pip install "phirt[report]"' in err
    assert asked == {}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--text", "latin.txt"), "not UTF-8"),
        (("--text", "one/a.txt", "--text", "other/a.txt"), "two of the texts have one name"),
    ],
)
def test_wrong_texts(run, asked, folder_of_texts, arguments, complaint):
    status, _, err = run("a", "b", *arguments)
    assert status == 2
    assert complaint in err
    assert asked == {}


@pytest.fixture
def folder_of_texts(tmp_path, monkeypatch):
    """The working directory, with texts in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("text")


def test_a_text_that_is_not_there(run):
    status, _, err = run("a", "b", "--text", "nowhere.txt")
    assert status == 2
    assert "the text nowhere.txt cannot be read: No such file" in err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("tokens=3 is too few"), 2),
        (UnsupportedModelError("their tokenizers differ"), 1),
        (BackendNotInstalledError("no onnxruntime"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_have_their_status(run, error, status):
    found, out, err = run("a", "b", found=error)
    assert found == status
    assert out == ""
    assert str(error) in err
