"""The plot: what is in it, in which formats, and what is refused before anything is measured."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from phirt.benchmark import plots
from phirt.benchmark.plots import check_plot, figure_of
from phirt.errors import BackendNotInstalledError
from tests.benchmark.samples import SETTINGS, point, report, row

pytest.importorskip("matplotlib")

ROWS = (
    row("onnxruntime", point(0.01), point(0.02, prompt_tokens=512), point(0.03, streams=4)),
    row("a $strange$\x07 名", point(0.05), device="gpu:1", precision=None),
    row("crashed"),
)
MANY = replace(SETTINGS, prompt_tokens=(128, 512), concurrency=(1, 4))


@pytest.mark.parametrize(
    ("name", "start"), [("p.png", b"\x89PNG"), ("p.SVG", b"<?xml"), ("p.pdf", b"%PDF")]
)
def test_the_suffix_says_the_format(tmp_path, name, start):
    path = tmp_path / name
    report(*ROWS, settings=MANY).save_plot(path)
    assert path.read_bytes().startswith(start)


def test_the_same_report_gives_the_same_bytes(tmp_path):
    made = report(*ROWS, settings=MANY)
    for name in ("a.svg", "b.svg"):
        made.save_plot(tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def widths(axes: Any) -> list[float]:
    """Of its bars."""
    return [bar.get_width() for bar in axes.patches]


def test_one_case_is_bars_alone():
    decode, prefill = figure_of(report(*ROWS)).axes
    assert [label.get_text() for label in decode.get_yticklabels()] == [
        "onnxruntime on cpu, int8",
        "a $strange$? 名 on gpu:1",
    ]
    assert decode.get_xlabel() == "decode, tokens/s"
    assert widths(decode) == pytest.approx([100, 20])
    assert widths(prefill) == pytest.approx([1280, 256])


def test_several_lengths_and_streams_are_curves():
    axes = figure_of(report(*ROWS, settings=MANY)).axes
    assert len(axes) == 6
    assert [each.get_xlabel() for each in axes[2:]] == [
        "tokens of the prompt",
        "tokens of the prompt",
        "streams at once, prompts of 128 tokens",
        "streams at once, prompts of 128 tokens",
    ]
    first = axes[2].lines[0]
    assert np.asarray(first.get_xdata()).tolist() == [128, 512]
    assert np.asarray(first.get_ydata()).tolist() == pytest.approx([100, 50])
    gaps = axes[5].lines[0]
    assert np.asarray(gaps.get_ydata()).tolist() == pytest.approx([10, 30])


def test_a_row_that_lacks_the_case_of_the_bars_says_so():
    short = row("slow", point(0.1, prompt_tokens=512))
    decode, *_ = figure_of(report(*ROWS, short, settings=MANY)).axes
    assert [text.get_text() for text in decode.texts].count(" not measured") == 1


def test_nothing_measured_is_nothing_to_draw():
    with pytest.raises(ValueError, match="Nothing was measured"):
        figure_of(report(row("crashed")))


def test_what_cannot_be_drawn_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"must end in \.png, \.svg or \.pdf"):
        check_plot(tmp_path / "p.jpeg")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        check_plot(tmp_path / "missing" / "p.png")
    monkeypatch.setattr(plots, "find_spec", lambda _: None)
    with pytest.raises(BackendNotInstalledError, match=r'pip install "phirt\[report\]"'):
        check_plot(tmp_path / "p.png")
    assert importlib.util.find_spec("matplotlib")
