"""The plot of a benchmark: bars of the rows, and curves where several cases were measured."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from phirt.benchmark.report import BenchPoint, BenchReport, BenchRow, Spread
from phirt.errors import BackendNotInstalledError
from phirt.quality.plots import STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["check_plot", "draw", "figure_of"]

_SUFFIXES = (".png", ".svg", ".pdf")
_NO_DATE = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
_DOTS_PER_INCH = 160
_WIDTH, _CURVES = 8.4, 2.9  # inches, and so is the height of curves
_TITLE, _LEGEND, _BARS, _BAR = 0.45, 0.25, 0.85, 0.3

# Okabe and Ito's palette, which colour-blind readers tell apart, and markers for all others.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#000000")
_MARKERS = "os^Dv*P"

_Figure: TypeAlias = Callable[[BenchPoint], Spread]

_RATES: Mapping[str, _Figure] = {
    "decode": lambda point: point.decode_tokens_per_s,
    "prefill": lambda point: point.prefill_tokens_per_s,
}


def check_plot(path: Path) -> None:
    """Make sure that a plot can be drawn, before minutes are spent on what is in it.

    Args:
        path: The file.

    Raises:
        ValueError: It ends in none of .png, .svg and .pdf.
        FileNotFoundError: Its folder does not exist.
        BackendNotInstalledError: matplotlib is missing, which draws.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise ValueError(
            f"The plot cannot be written to {str(path)!r}: the name must end in "
            f"{', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}."
        )
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"The plot cannot be written to {str(path)!r}: there is no such folder."
        )
    if find_spec("matplotlib") is None:
        raise BackendNotInstalledError(
            "A plot needs the package 'matplotlib', and it is not installed. Install it with: "
            'python -m pip install "phirt[report]"'
        )


def draw(report: BenchReport, path: Path) -> None:
    """As `BenchReport.save_plot`."""
    import matplotlib as mpl

    suffix = path.suffix.lower()
    metadata: dict[str, Any] = dict(_NO_DATE[suffix])
    # Nothing of the process's own settings, nor of its windows, is touched.
    with mpl.rc_context(dict(STYLE)), warnings.catch_warnings():
        # The font has no Chinese; a name in it is drawn as boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure_of(report).savefig(path, format=suffix[1:], dpi=_DOTS_PER_INCH, metadata=metadata)


def figure_of(report: BenchReport) -> Figure:
    """The whole plot.

    Raises:
        ValueError: Nothing was measured.
    """
    from matplotlib.figure import Figure

    rows = [row for row in report.rows if row.points]
    if not rows:
        raise ValueError("Nothing was measured that could be drawn.")
    lengths, counts = report.settings.prompt_tokens, report.settings.concurrency
    curves = [draws for draws, cases in ((_lengths, lengths), (_streams, counts)) if len(cases) > 1]
    heights = [_BARS + _BAR * len(rows), *[_CURVES] * len(curves)]
    figure = Figure(
        figsize=(_WIDTH, _TITLE + sum(heights) + _LEGEND * bool(curves)), layout="constrained"
    )
    axes = figure.subplots(len(heights), 2, squeeze=False, height_ratios=heights)
    _bars(axes[0], rows, report)
    for draws, pair in zip(curves, axes[1:], strict=True):
        draws(pair, rows, report)
    if curves:
        handles, labels = axes[1][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.suptitle(f"{_plain(report.model)} on {_plain(_machine(report))}", fontsize=11)
    return figure


def _bars(pair: Sequence[Axes], rows: Sequence[BenchRow], report: BenchReport) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    length, count = report.settings.prompt_tokens[0], report.settings.concurrency[0]
    for axes, (name, figure) in zip(pair, _RATES.items(), strict=True):
        longest = 0.0
        for place, row in enumerate(rows):
            point = row.point(length, count)
            if point is None:
                axes.text(0, place, " not measured", va="center", color="#666666")
                continue
            rate = figure(point)
            longest = max(longest, rate.high)
            axes.barh(place, rate.median, height=0.62, color=_COLOURS[0], alpha=0.75)
            axes.errorbar(
                rate.median,
                place,
                xerr=[[rate.median - rate.low], [rate.high - rate.median]],
                color="black",
                elinewidth=1,
                capsize=2.5,
            )
            axes.annotate(
                _short(rate.median),
                (rate.high, place),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
            )
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, 1.25 * longest or 1)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(f"{name}, tokens/s")
        axes.set_yticks(range(len(rows)), list(_labels(rows)) if axes is pair[0] else [])
    streams = "1 stream" if count == 1 else f"{count} streams, each"
    pair[0].set_title(f"Prompt of {length:,} tokens, {streams}; lines: least to greatest")


def _lengths(pair: Sequence[Axes], rows: Sequence[BenchRow], report: BenchReport) -> None:
    """Speeds by the length of the prompt, of the fewest streams."""
    lengths, count = report.settings.prompt_tokens, report.settings.concurrency[0]
    for axes, (name, figure) in zip(pair, _RATES.items(), strict=True):
        for row, label, style in _styled(rows):
            points = [point for each in lengths if (point := row.point(each, count))]
            places = [point.prompt_tokens for point in points]
            _curve(axes, places, [figure(each) for each in points], label=label, **style)
        _finish(axes, lengths, "tokens of the prompt", f"{name}, tokens/s")
    pair[0].set_title("By length of the prompt")


def _streams(pair: Sequence[Axes], rows: Sequence[BenchRow], report: BenchReport) -> None:
    """All tokens a second, and the time between two of one stream, by the number of streams."""
    counts, length = report.settings.concurrency, report.settings.prompt_tokens[0]
    for row, label, style in _styled(rows):
        points = [point for each in counts if (point := row.point(length, each))]
        places = [point.concurrency for point in points]
        _curve(pair[0], places, [each.total_tokens_per_s for each in points], label=label, **style)
        for dash, gaps in (
            ("-", [1000 * each.inter_token_p50_s for each in points]),
            (":", [1000 * each.inter_token_p99_s for each in points]),
        ):
            pair[1].plot(places, gaps, linestyle=dash, **style)
    below = f"streams at once, prompts of {length:,} tokens"
    _finish(pair[0], counts, below, "all answers together, tokens/s")
    _finish(pair[1], counts, below, "between two tokens, ms")
    pair[0].set_title("By number of streams")
    pair[1].set_title("line: median; dots: 99th percentile", fontsize=STYLE["font.size"])


def _curve(
    axes: Axes, places: Sequence[int], rates: Sequence[Spread], *, label: str, **style: Any
) -> None:
    medians = [each.median for each in rates]
    below = [each.median - each.low for each in rates]
    above = [each.high - each.median for each in rates]
    axes.errorbar(
        places, medians, yerr=[below, above], label=label, elinewidth=1, capsize=2.5, **style
    )


def _finish(axes: Axes, places: Sequence[int], below: str, left: str) -> None:
    from matplotlib.ticker import NullFormatter, NullLocator, StrMethodFormatter

    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{each:,}" for each in places])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(bottom=0)
    if axes.get_ylim()[1] >= 1000:
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_xlabel(below)
    axes.set_ylabel(left)


def _styled(rows: Sequence[BenchRow]) -> Iterator[tuple[BenchRow, str, dict[str, Any]]]:
    """Each row with its label and its looks, the same in all curves."""
    looks = itertools.cycle(zip(_COLOURS, _MARKERS, strict=True))
    for row, label, (colour, marker) in zip(rows, _labels(rows), looks, strict=False):
        yield row, label, {"color": colour, "marker": marker, "markersize": 4.5, "linewidth": 1.4}


def _labels(rows: Sequence[BenchRow]) -> Iterator[str]:
    for row in rows:
        yield _plain(", ".join(filter(None, (row.described, row.precision))))


def _machine(report: BenchReport) -> str:
    cpu = report.machine.cpu
    return f"{cpu.name or cpu.architecture}, {cpu.threads} threads"


def _plain(text: str) -> str:
    """A name, without what XML does not take."""
    return "".join(each if each.isprintable() else "?" for each in text)


def _short(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"
