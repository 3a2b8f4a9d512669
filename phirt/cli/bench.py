"""``phirt bench``: a model with every backend and device, measured as a user sees it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from phirt.cli.arguments import UsageError
from phirt.cli.lines import Line, aligned, paragraph, print_lines
from phirt.cli.progress import ProgressBars
from phirt.cli.selection import print_json
from phirt.cli.terminal import plain
from phirt.errors import PhirtError

if TYPE_CHECKING:
    from phirt.benchmark.report import BenchPoint, BenchReport, BenchRow, Spread

__all__ = ["print_bench"]


def print_bench(arguments: argparse.Namespace) -> int:
    """Carry out ``phirt bench``.

    Returns:
        1 where nothing could be measured, else 0.

    Raises:
        UsageError: The arguments make no sense.
        PhirtError: There is no such model or backend, or nothing here can run it.
        OSError: The plot cannot be written.
    """
    # Imported here, as what it needs is only this command's.
    from phirt.benchmark.plots import check_plot
    from phirt.benchmark.run import bench

    given = {
        name: value
        for name, value in (
            ("prompt_tokens", arguments.prompt_tokens),
            ("new_tokens", arguments.new_tokens),
            ("concurrency", arguments.concurrency),
            ("repeats", arguments.repeats),
            ("row_timeout_s", arguments.row_timeout),
        )
        if value is not None
    }
    with ProgressBars() as bars:

        def say(step: str) -> None:
            bars.stop()
            print(f"phirt: {plain(step)}", file=sys.stderr)

        try:
            if arguments.plot is not None:
                check_plot(arguments.plot)
            report = bench(
                arguments.model,
                backend=arguments.backend,
                device=arguments.device,
                precision=arguments.precision,
                offline=arguments.offline,
                progress=bars,
                on_step=say,
                **given,
            )
        except PhirtError:
            raise
        except (ValueError, FileNotFoundError) as error:
            raise UsageError(" ".join(str(error).split())) from error
    if arguments.json:
        print_json(report.to_json())
    else:
        print_lines(lambda width: _lines(report, width=width))
    is_measured = any(row.points for row in report.rows)
    if arguments.plot is not None and is_measured:
        report.save_plot(arguments.plot)
        print(f"phirt: the plot is {plain(str(arguments.plot))}", file=sys.stderr)
    return 0 if is_measured else 1


def _lines(report: BenchReport, *, width: int) -> Iterator[Line]:
    machine = report.machine
    about = f"{report.model} on {machine.cpu.name or machine.cpu.architecture}"
    yield from paragraph(about, width=width, style="bold")
    repeats = report.settings.repeats
    yield from paragraph(
        f"{machine.cpu.threads} threads, {machine.memory_bytes / 1e9:.1f} GB, {machine.system}; "
        f"phirt {report.versions['phirt']}; median of {repeats}, "
        f"{report.settings.new_tokens:,} new tokens",
        width=width,
    )
    if report.rows:
        yield []
        yield from _table(_processes(report), width=width)
    for length, streams in report.settings.cases:
        rows = [(row, point) for row in report.rows if (point := row.point(length, streams))]
        if rows:
            yield []
            named = "1 STREAM" if streams == 1 else f"{streams} STREAMS AT ONCE"
            yield [(f"PROMPT OF {length:,} TOKENS, {named}", "bold")]
            yield from _table(_speeds(rows, streams), width=width, best=_best(rows, streams))
    if report.rows:
        yield []
        yield from paragraph(_legend(report), width=width, style="dim")
    for row in report.rows:
        for note in row.notes:
            yield []
            yield from paragraph(f"{row.described}: {note}", width=width, style="yellow")
    for failure in report.failures:
        yield []
        named = f"Not measured: {failure.backend} on {failure.device}"
        text = f"{named}: {failure.reason.rstrip('.')}."
        yield from paragraph(text, width=width, style="yellow")
        if failure.fix:
            yield from paragraph(failure.fix, width=width, indent=2, style="cyan")
    for note in report.notes:
        yield []
        yield from paragraph(note, width=width, style="yellow")


def _legend(report: BenchReport) -> str:
    several = (
        "ALL: tokens of all streams a second, from the first call to the last token; the others "
        "are of one stream, the median of them. "
        if max(report.settings.concurrency) > 1
        else ""
    )
    spread = "±: half the range over the repeats. " if report.settings.repeats > 1 else ""
    is_told = report.takes_turns and len(report.rows) > 1
    turns = "The rows took turns, repeat by repeat. " if is_told else ""
    return (
        "LOAD: seconds of phirt.load in a new process. MEMORY: MB, the most that the process had "
        "resident. TTFT: ms to the first token. PREFILL, DECODE: tokens a second of a prompt and "
        "of an answer, (n - 1) / (t_last - t_first). P50, P99: ms between two tokens. "
        f"{several}{spread}{turns}".rstrip()
    )


_NAMES = 3


def _names(row: BenchRow) -> tuple[str, ...]:
    return plain(row.backend), plain(row.device), plain(row.precision or "")


def _processes(report: BenchReport) -> list[tuple[str, ...]]:
    header = ("BACKEND", "DEVICE", "FORM", "LOAD", "MEMORY")
    return [header] + [
        (*_names(row), f"{row.load_s:.2f}", f"{row.peak_memory_bytes / 1e6:,.0f}")
        for row in report.rows
    ]


def _speeds(rows: list[tuple[BenchRow, BenchPoint]], streams: int) -> list[tuple[str, ...]]:
    first = "PREFILL" if streams == 1 else "ALL"
    table: list[tuple[str, ...]] = [
        ("BACKEND", "DEVICE", "FORM", "TTFT", first, "±", "DECODE", "±", "P50", "P99")
    ]
    for row, point in rows:
        rate = point.prefill_tokens_per_s if streams == 1 else point.total_tokens_per_s
        table.append(
            (
                *_names(row),
                _figure(1000 * point.ttft_s.median),
                *_with_spread(rate, point),
                *_with_spread(point.decode_tokens_per_s, point),
                _figure(1000 * point.inter_token_p50_s),
                _figure(1000 * point.inter_token_p99_s),
            )
        )
    return table


def _best(rows: list[tuple[BenchRow, BenchPoint]], streams: int) -> int:
    """The number of the fastest."""
    rates = [
        (point.decode_tokens_per_s if streams == 1 else point.total_tokens_per_s).median
        for _, point in rows
    ]
    return rates.index(max(rates))


def _with_spread(rate: Spread, point: BenchPoint) -> tuple[str, str]:
    spread = f"{100 * rate.relative:.0f}%" if len(point.samples) > 1 else ""
    return _figure(rate.median), spread


def _figure(value: float) -> str:
    """Three digits of a figure, or all before its point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _table(rows: list[tuple[str, ...]], *, width: int, best: int | None = None) -> Iterator[Line]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, row in enumerate(rows):
        style = "bold" if number == 0 else "green" if number - 1 == best else ""
        yield [(aligned(row, widths, width, names=_NAMES), style)]
