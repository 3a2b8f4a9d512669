"""The plots of a report, as SVG."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phirt.quality.figures import HISTOGRAM_EDGES
from phirt.quality.report import KERNEL_NAMES, KernelQuality, QualityReport
from phirt.quality.verdict import GRADES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

__all__ = ["STYLE", "draw_plots", "figures_of_plots"]

# Blue and orange of Okabe and Ito's palette, which colour-blind readers tell apart.
_COLOURS = {"many_rows": "#0072b2", "one_row": "#e69f00"}
_GREY = "#666666"
_SMALLEST = 1e-8  # what 0 is drawn as on a logarithmic axis
_WIDTH = 7.2  # inches
# Fixed ids within the file, and no date: the same report gives the same bytes.
STYLE: Mapping[str, Any] = {
    "svg.hashsalt": "phirt",
    "font.size": 9.5,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "text.parse_math": False,  # a file's name may have dollars in it
}
"""Settings of matplotlib for all plots of phirt."""


def draw_plots(report: QualityReport, names: Mapping[str, str], folder: Path) -> None:
    """Draw the plots into a folder.

    Args:
        report: What was found.
        names: File names of ``histogram``, ``sections`` and ``spans``.
        folder: Where to.
    """
    import matplotlib as mpl

    # Nothing of the process's own settings, nor of its windows, is touched.
    with mpl.rc_context(dict(STYLE)), warnings.catch_warnings():
        # The font has no Chinese; a name in it is drawn as boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        for plot, figure in figures_of_plots(report).items():
            figure.savefig(folder / names[plot], format="svg", metadata={"Date": None})


def figures_of_plots(report: QualityReport) -> Mapping[str, Figure]:
    """The three plots: ``histogram``, ``sections`` and ``spans``."""
    return {
        "histogram": _histogram(report),
        "sections": _sections(report),
        "spans": _spans(report),
    }


def _axes(height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.add_subplot()


def _histogram(report: QualityReport) -> Figure:
    figure, axes = _axes(3.0)
    for kernel, quality in report.kernels.items():
        total = sum(quality.histogram)
        axes.stairs(
            [100 * count / total for count in quality.histogram],
            HISTOGRAM_EDGES,
            color=_COLOURS[kernel],
            fill=kernel == "many_rows",
            alpha=0.45 if kernel == "many_rows" else 1.0,
            linewidth=1.5,
            label=f"{KERNEL_NAMES[kernel]}, {total:,} positions",
        )
    axes.set_xscale("log")
    _mark_threshold(axes, report, vertical=True)
    axes.set_xlim(*_occupied(report))
    _plain_ticks(axes.xaxis, decades=True)
    axes.set_xlabel("KL of a position, nats (0 counts as 1e-8)")
    axes.set_ylabel("positions, %")
    axes.set_title("How far the predictions are apart")
    _legend(figure)
    return figure


def _sections(report: QualityReport) -> Figure:
    names = [section.name for section in report.leading.sections]
    figure, axes = _axes(1.3 + 0.26 * len(names))
    for offset, (kernel, quality) in zip((-0.16, 0.16), report.kernels.items(), strict=False):
        places, means, errors = [], [], []
        for section in quality.sections:
            places.append(names.index(section.name) + offset)
            means.append(max(section.figures.kl_mean, _SMALLEST))
            errors.append(section.figures.kl_se or 0.0)
        axes.errorbar(
            means,
            places,
            # On a logarithmic axis an error as large as the mean has no lower end.
            xerr=[[min(e, 0.9 * m) for e, m in zip(errors, means, strict=True)], errors],
            fmt="o" if kernel == "many_rows" else "D",
            markersize=5 if kernel == "many_rows" else 4,
            color=_COLOURS[kernel],
            elinewidth=1,
            label=f"{KERNEL_NAMES[kernel]} kernels",
        )
    axes.set_yticks(range(len(names)), list(map(_label, names)))
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    _scale(axes, "x", report)
    _mark_threshold(axes, report, vertical=True)
    axes.set_xlabel("mean KL, nats; bars: one standard error, where a section has several spans")
    axes.set_title("By section")
    _legend(figure)
    return figure


def _spans(report: QualityReport) -> Figure:
    figure, axes = _axes(3.2)
    leading = report.leading
    for kernel, quality in report.kernels.items():
        axes.plot(
            [_place(leading, span.section, span.start) for span in quality.spans],
            [max(span.kl_mean, _SMALLEST) for span in quality.spans],
            marker="o" if kernel == "many_rows" else "D",
            markersize=4 if kernel == "many_rows" else 3,
            linestyle="none",
            color=_COLOURS[kernel],
            label=f"{KERNEL_NAMES[kernel]} kernels",
        )
    edges, middles = _borders(leading)
    for edge in edges:
        axes.axvline(edge, color="#dddddd", linewidth=0.8, zorder=0)
    axes.set_xticks(middles, [_label(section.name) for section in leading.sections], rotation=60)
    for label in axes.get_xticklabels():
        label.set_horizontalalignment("right")
        label.set_rotation_mode("anchor")
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.5, len(leading.spans) - 0.5)
    _scale(axes, "y", report)
    _mark_threshold(axes, report, vertical=False)
    axes.set_ylabel("mean KL of a span, nats")
    axes.set_title("Along the text")
    _legend(figure)
    return figure


def _label(name: str) -> str:
    """A section's name, without what XML does not take."""
    return "".join(each if each.isprintable() else "?" for each in name.replace("_", " "))


def _place(leading: KernelQuality, section: str, start: int) -> int:
    """The number of a span."""
    return [(span.section, span.start) for span in leading.spans].index((section, start))


def _borders(leading: KernelQuality) -> tuple[list[float], list[float]]:
    """Where sections meet, and their middles, in numbers of spans."""
    edges, middles, start = [], [], 0
    for section in leading.sections:
        end = start + section.figures.spans
        edges.append(end - 0.5)
        middles.append((start + end - 1) / 2)
        start = end
    return edges[:-1], middles


def _scale(axes: Axes, axis: str, report: QualityReport) -> None:
    """A logarithmic axis that holds every mean and the threshold."""
    means = [
        max(span.kl_mean, _SMALLEST) for each in report.kernels.values() for span in each.spans
    ]
    limit = report.verdict.thresholds.max_kl or _SMALLEST
    low, high = min(*means, limit, GRADES["equal"][0]) / 2, max(*means, limit) * 2
    if axis == "x":
        axes.set_xscale("log")
        axes.set_xlim(low, high)
    else:
        axes.set_yscale("log")
        axes.set_ylim(low, high)
    _plain_ticks(axes.xaxis if axis == "x" else axes.yaxis, decades=high / low > 300)


def _plain_ticks(axis: Axis, *, decades: bool) -> None:
    """Ticks in plain figures: 0.01, 0.02, 0.05, or the powers of ten alone."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1,) if decades else (1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _occupied(report: QualityReport) -> tuple[float, float]:
    """The edges between which the histograms have counts, and the threshold is."""
    filled = [
        number
        for quality in report.kernels.values()
        for number, count in enumerate(quality.histogram)
        if count
    ]
    limit = report.verdict.thresholds.max_kl or _SMALLEST
    low, high = HISTOGRAM_EDGES[min(filled)], HISTOGRAM_EDGES[max(filled) + 1]
    return min(low, limit / 2), max(high, limit * 2)


def _legend(figure: Figure) -> None:
    figure.legend(loc="outside lower center", ncols=3)


def _mark_threshold(axes: Axes, report: QualityReport, *, vertical: bool) -> None:
    limit = report.verdict.thresholds.max_kl
    if limit <= 0:
        return
    line = axes.axvline if vertical else axes.axhline
    line(limit, color=_GREY, linestyle="--", linewidth=1, label=f"threshold, {limit:g}")
