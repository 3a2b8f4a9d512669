"""``phirt tune``: how fast a model is here with every backend and device."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from phirt.cli.announce import Announcer
from phirt.cli.arguments import UsageError
from phirt.cli.lines import Line, aligned, paragraph, print_lines
from phirt.cli.progress import ProgressBars
from phirt.cli.selection import print_json
from phirt.cli.terminal import plain
from phirt.errors import PhirtError

if TYPE_CHECKING:
    from phirt.dispatch.measurements import Measurement
    from phirt.dispatch.plan import PlanCandidate
    from phirt.tuning import Tuning

__all__ = ["print_tuning"]


def print_tuning(arguments: argparse.Namespace) -> int:
    """Carry out ``phirt tune``.

    Returns:
        1 where nothing could be timed, else 0.

    Raises:
        UsageError: The arguments make no sense.
        DeclinedError: A download is large, and nobody agreed to it.
        PhirtError: There is no such model, or nothing here can run it.
    """
    # Imported here, as what it needs is only this command's.
    from phirt.tuning import tune

    with ProgressBars() as bars:

        def announce_candidate(candidate: PlanCandidate, number: int, count: int) -> None:
            bars.stop()
            named = plain(_named(candidate))
            print(f"phirt: timing {named} ({number} of {count})", file=sys.stderr)

        try:
            tuning = tune(
                arguments.model,
                device=arguments.device,
                backend=arguments.backend,
                precision=arguments.precision,
                quick=arguments.quick,
                offline=arguments.offline,
                progress=bars,
                announce=Announcer(bars, yes=arguments.yes),
                on_candidate=announce_candidate,
            )
        except PhirtError:
            raise
        except ValueError as error:
            raise UsageError(" ".join(str(error).split())) from error
    if arguments.json:
        print_json(
            {
                "measurements": [asdict(each) for each in tuning.measurements],
                "failures": [asdict(each) for each in tuning.failures],
                "plan": tuning.plan.to_json(),
            }
        )
    else:
        print_lines(lambda width: _lines(tuning, width=width))
    return 0 if tuning.measurements else 1


_HEADER = ("BACKEND", "DEVICE", "FORM", "SETTING", "PREFILL", "DECODE", "ANSWER", "LONG", "FOUR")
_NAMES = 4


def _lines(tuning: Tuning, *, width: int) -> Iterator[Line]:
    from phirt.dispatch.measurements import WORKLOADS, predict_seconds

    artifacts = filter(None, (row.artifact for row in tuning.plan.candidates))
    forms = {artifact.id: artifact.precision or "" for artifact in artifacts}
    rows = [_row(each, forms.get(each.artifact, "")) for each in tuning.measurements]
    best = (
        [min(predict_seconds(m, o) for m in tuning.measurements) for o in WORKLOADS] if rows else []
    )
    widths = [max(map(len, column)) for column in zip(_HEADER, *rows, strict=True)]
    if rows:
        yield [(aligned(_HEADER, widths, width, names=_NAMES), "bold")]
    for measurement, row in zip(tuning.measurements, rows, strict=True):
        times = [predict_seconds(measurement, optimize) for optimize in WORKLOADS]
        is_best = any(time <= least for time, least in zip(times, best, strict=True))
        yield [(aligned(row, widths, width, names=_NAMES), "green" if is_best else "")]
    if rows:
        yield []
        yield from paragraph(
            "FORM is the precision of the weights; SETTING the number of threads, and whether idle "
            "ones spin or sleep, where that is not the runtime's own choice. PREFILL and DECODE "
            "are tokens a second, of the longest prompt and of one answer. The rest are seconds: "
            "ANSWER, 128 tokens to a prompt of 128 (latency); LONG, 16 tokens to a prompt of "
            "1,024 (prefill); FOUR, four answers of 128 at once (throughput).",
            width=width,
            style="dim",
        )
    for failure in tuning.failures:
        yield []
        form = f", {failure.precision}" if failure.precision else ""
        text = f"Not timed: {failure.backend} on {failure.device}{form}: {failure.reason}"
        yield from paragraph(text, width=width, style="yellow")
    chosen = tuning.plan.chosen
    if chosen is not None:
        yield []
        text = f"phirt.load() now takes {_named(chosen)}: {chosen.reason}."
        yield from paragraph(text, width=width, style="bold")


def _named(candidate: PlanCandidate) -> str:
    form = candidate.artifact and candidate.artifact.precision
    return f"{candidate.described}, {form}" if form else candidate.described


def _row(measurement: Measurement, form: str) -> tuple[str, ...]:
    from phirt.dispatch.measurements import WORKLOADS, predict_seconds

    setting = measurement.setting
    longest, shortest = measurement.points[-1], measurement.points[0]
    threads = "" if setting.threads is None else str(setting.threads)
    spins = {None: "", True: "spin", False: "sleep"}[setting.spinning]
    pins = {None: "", True: "pin", False: "float"}[setting.pinning]
    return (
        plain(measurement.backend),
        plain(measurement.device),
        plain(form),
        " ".join(filter(None, (threads, spins, pins))),
        f"{longest.tokens / longest.prefill_s:,.0f}",
        f"{1 / shortest.decode_s:,.1f}",
        *(f"{predict_seconds(measurement, optimize):.2f}" for optimize in WORKLOADS),
    )
