"""Progress bars: what they show, and that they show nothing where nobody looks."""

from __future__ import annotations

import sys

import pytest

from phirt.cli.progress import ProgressBars, amount
from phirt.types import Progress


@pytest.mark.parametrize(
    ("progress", "shown"),
    [
        (Progress("download", 12_340_000, 98_400_000, "bytes"), "12.3/98.4 MB"),
        (Progress("download", 12_340_000, None, "bytes"), "12.3 MB"),
        (Progress("convert", 17, 211, "tensors"), "17/211 tensors"),
        (Progress("convert", 17, None, "tensors"), "17 tensors"),
    ],
)
def test_amounts_read_as_people_say_them(progress, shown):
    assert amount(progress) == shown


def test_nothing_is_drawn_where_stderr_is_no_terminal(capsys):
    with ProgressBars() as report:
        report(Progress("download", 1, 2, "bytes"))
    assert capsys.readouterr() == ("", "")


def test_each_stage_has_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with ProgressBars() as report:
        report(Progress("download", 5_000_000, 5_000_000, "bytes"))
        report(Progress("convert", 3, 3, "tensors"))
    out, err = capsys.readouterr()
    assert out == ""
    assert "Download" in err
    assert "5.0/5.0 MB" in err
    assert "Convert" in err
    assert "3/3 tensors" in err
