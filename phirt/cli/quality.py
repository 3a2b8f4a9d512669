"""``phirt quality``: what a model lost against its reference."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from phirt.cli.announce import Announcer
from phirt.cli.arguments import UsageError
from phirt.cli.lines import Line, paragraph, print_lines
from phirt.cli.progress import ProgressBars
from phirt.cli.selection import print_json
from phirt.cli.terminal import plain
from phirt.errors import PhirtError

if TYPE_CHECKING:
    from phirt.quality.report import QualityReport, WorstPosition

__all__ = ["print_quality"]

_COLOURS = {"equal": "green", "close": "green", "degraded": "yellow", "broken": "red"}


def print_quality(arguments: argparse.Namespace) -> int:
    """Carry out ``phirt quality``.

    Returns:
        1 where the candidate does not pass, else 0.

    Raises:
        UsageError: The arguments make no sense, a text cannot be read, or the folder of the
            report holds something else.
        DeclinedError: A download is large, and nobody agreed to it.
        PhirtError: The two cannot be compared.
        OSError: The report cannot be written.
    """
    # Imported here, as what it needs is only this command's.
    from phirt.quality.comparison import DEFAULT_TOKENS, compare_quality

    with ProgressBars() as bars:
        try:
            if arguments.report is not None:
                from phirt.quality.folder import check_report_folder

                check_report_folder(arguments.report)
            report = compare_quality(
                arguments.reference,
                arguments.candidate,
                text=_texts(arguments.text),
                tokens=DEFAULT_TOKENS if arguments.tokens is None else arguments.tokens,
                max_kl=arguments.max_kl,
                min_agreement=arguments.min_agreement,
                speed=not arguments.no_speed,
                reference_device=arguments.reference_device,
                reference_backend=arguments.reference_backend,
                reference_precision=arguments.reference_precision,
                device=arguments.device,
                backend=arguments.backend,
                precision=arguments.precision,
                kv_precision=arguments.kv_precision,
                offline=arguments.offline,
                progress=bars,
                announce=Announcer(bars, yes=arguments.yes),
            )
        except PhirtError:
            raise
        except (ValueError, FileExistsError) as error:
            raise UsageError(" ".join(str(error).split())) from error
    if arguments.json:
        print_json(report.to_json())
    else:
        print_lines(lambda width: _lines(report, width=width))
    if arguments.report is not None:
        page = report.save(arguments.report)
        print(f"phirt: the report is {plain(str(page))}", file=sys.stderr)
    return 0 if report.verdict.passed else 1


def _texts(paths: list[Path] | None) -> dict[str, str] | None:
    from phirt.quality.spans import read_text

    if paths is None:
        return None
    try:
        texts = {path.stem: read_text(path) for path in paths}
    except OSError as error:
        raise UsageError(f"the text {error.filename} cannot be read: {error.strerror}") from error
    if len(texts) < len(paths):
        raise UsageError("two of the texts have one name: figures are told apart by it")
    return texts


def _lines(report: QualityReport, *, width: int) -> Iterator[Line]:
    from phirt.quality.wording import summary

    yield from _sides(report, width=width)
    yield []
    yield from _figures(report)
    yield []
    yield from _sections(report)
    yield []
    yield from paragraph(
        "KL is the divergence from the reference in nats, over the whole vocabulary; ± is one "
        "standard error. Many-row kernels run prompts, one-row kernels decode token by token.",
        width=width,
        style="dim",
    )
    for note in report.notes:
        yield from paragraph(note, width=width, style="dim")
    yield []
    yield [("WHERE THEY DIFFER MOST", "bold")]
    for worst in report.leading.worst:
        yield from _worst(worst, width=width)
    yield []
    colour = _COLOURS[report.verdict.grade] if report.verdict.passed else "red"
    yield from paragraph(f"{summary(report)}.", width=width, style=f"bold {colour}")
    for reason in report.verdict.reasons:
        yield from paragraph(reason, width=width, style=colour)


def _sides(report: QualityReport, *, width: int) -> Iterator[Line]:
    from phirt.quality.wording import described, megabytes

    sides = {"reference": report.reference, "candidate": report.candidate}
    for name, side in sides.items():
        yield from paragraph(f"{name}: {side.name}, {described(side)}", width=width)
    yield []
    speed = report.speed
    rows: list[tuple[str, ...]] = [("", "SIZE", *(("PREFILL", "DECODE") if speed else ()))]
    for name, side in sides.items():
        rates = [getattr(phase, name) for phase in (speed.prefill, speed.decode)] if speed else []
        rows.append((name, megabytes(side.bytes), *(f"{rate:,.1f} tokens/s" for rate in rates)))
    ratios = [report.candidate.bytes / report.reference.bytes]
    if speed:
        ratios += [speed.prefill.ratio, speed.decode.ratio]
    rows.append(("ratio", *(f"{ratio:.2f}" for ratio in ratios)))
    yield from _table(rows)


def _figures(report: QualityReport) -> Iterator[Line]:
    from phirt.quality.report import KERNEL_NAMES
    from phirt.quality.wording import nats, percent

    rows: list[tuple[str, ...]] = [
        ("KERNELS", "POSITIONS", "PERPLEXITY", "(REF.)", "MEAN KL", "±", "99 % KL", "SAME TOP")
    ]
    for kernel, quality in report.kernels.items():
        figures = quality.figures
        rows.append(
            (
                KERNEL_NAMES[kernel],
                f"{figures.positions:,}",
                f"{figures.ppl:.2f}",
                f"{figures.ppl_reference:.2f}",
                nats(figures.kl_mean),
                "" if figures.kl_se is None else nats(figures.kl_se),
                nats(figures.kl_p99),
                percent(figures.top1_agreement),
            )
        )
    yield from _table(rows)


def _sections(report: QualityReport) -> Iterator[Line]:
    from phirt.quality.verdict import grade_of
    from phirt.quality.wording import nats, percent

    rows: list[tuple[str, ...]] = [
        ("SECTION", "POSITIONS", "PERPLEXITY", "(REF.)", "MEAN KL", "SAME TOP")
    ]
    styles = ["bold"]
    for section in report.leading.sections:
        figures = section.figures
        rows.append(
            (
                plain(section.name)[:24],
                f"{figures.positions:,}",
                f"{figures.ppl:.2f}",
                f"{figures.ppl_reference:.2f}",
                nats(figures.kl_mean),
                percent(figures.top1_agreement),
            )
        )
        grade = grade_of(figures)
        styles.append("" if grade in ("equal", "close") else _COLOURS[grade])
    yield from _table(rows, styles=styles)


def _worst(worst: WorstPosition, *, width: int) -> Iterator[Line]:
    from phirt.quality.wording import nats, percent, visible

    before = f"…{worst.before[-50:]}" if len(worst.before) > 50 else worst.before
    yield from paragraph(
        f"{worst.section}, token {worst.position:,}: KL {nats(worst.kl)} after "
        f"{visible(before, most=60)}",
        width=width,
    )
    yield from paragraph(
        f"text {visible(worst.token)}; reference {visible(worst.reference_token)} "
        f"{percent(worst.reference_probability)}; candidate {visible(worst.candidate_token)} "
        f"{percent(worst.candidate_probability)}",
        width=width,
        indent=4,
        style="dim",
    )


def _table(rows: list[tuple[str, ...]], *, styles: list[str] | None = None) -> Iterator[Line]:
    """Columns that fit their contents: names to the left, then figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, (name, *cells) in enumerate(rows):
        row = [name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]
        style = styles[number] if styles else "" if number else "bold"
        yield [("  ".join(row).rstrip(), style)]
