"""The page of a report, in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from phirt.quality.figures import Figures
from phirt.quality.report import KERNEL_NAMES, QualityReport, WorstPosition
from phirt.quality.wording import described, megabytes, nats, percent, summary, visible

__all__ = ["page_of"]


def page_of(report: QualityReport, *, plots: Sequence[str], data: str) -> str:
    """The page.

    Args:
        report: What was found.
        plots: Files of the plots, in the order in which they are shown.
        data: The file of the data.
    """
    return "\n".join(_lines(report, plots, data)) + "\n"


def _lines(report: QualityReport, plots: Sequence[str], data: str) -> Iterator[str]:
    yield f"# {_plain(report.candidate.name)} against {_plain(report.reference.name)}"
    yield ""
    yield f"**{summary(report)}.**"
    for reason in report.verdict.reasons:
        yield f"- {_plain(reason)}"
    yield ""
    yield from _sides(report)
    yield ""
    yield "## Distance"
    yield ""
    yield from _figures(report)
    yield ""
    yield (
        "Teacher-forced. KL is the divergence of the candidate from the reference over the whole "
        "vocabulary, in nats; ± is one standard error. Many-row kernels run prompts, one-row "
        "kernels decode token by token."
    )
    for note in report.notes:
        yield ""
        yield f"> {_plain(note)}"
    yield ""
    yield "## By section"
    yield ""
    yield from _sections(report)
    yield ""
    for plot in plots:
        yield f"![{plot.partition('.')[0]}]({plot})"
        yield ""
    yield "## Where they differ most"
    yield ""
    for worst in report.leading.worst:
        yield from _worst(worst)
    yield ""
    yield f"Written by phirt {report.version}; [{data}]({data}) has all of it."


def _sides(report: QualityReport) -> Iterator[str]:
    yield "| | Model | Size on disk | Prefill, tokens/s | Decode, tokens/s |"
    yield "|---|---|---:|---:|---:|"
    speed = report.speed
    for name, side in (("Reference", report.reference), ("Candidate", report.candidate)):
        rates = [
            "" if speed is None else f"{getattr(phase, name.lower()):,.1f}"
            for phase in ((speed.prefill, speed.decode) if speed else (None, None))
        ]
        yield f"| {name} | {described(side)} | {megabytes(side.bytes)} | {' | '.join(rates)} |"
    ratio = f"{report.candidate.bytes / report.reference.bytes:.2f}"
    rates = (
        ["", ""] if speed is None else [f"{speed.prefill.ratio:.2f}", f"{speed.decode.ratio:.2f}"]
    )
    yield f"| Ratio | | {ratio} | {' | '.join(rates)} |"


def _figures(report: QualityReport) -> Iterator[str]:
    yield (
        "| Kernels | Positions | Perplexity | of the reference | Mean KL | 99 % KL | "
        "Same top token |"
    )
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for kernel, quality in report.kernels.items():
        figures = quality.figures
        yield (
            f"| {KERNEL_NAMES[kernel]} | {figures.positions:,} in {figures.spans} spans | "
            f"{figures.ppl:.3f} | {figures.ppl_reference:.3f} | {_mean(figures)} | "
            f"{nats(figures.kl_p99)} | {percent(figures.top1_agreement)} |"
        )


def _mean(figures: Figures) -> str:
    error = "" if figures.kl_se is None else f" ± {nats(figures.kl_se)}"
    return f"{nats(figures.kl_mean)}{error}"


def _sections(report: QualityReport) -> Iterator[str]:
    yield "| Section | Positions | Perplexity | of the reference | Mean KL | Same top token |"
    yield "|---|---:|---:|---:|---:|---:|"
    for section in report.leading.sections:
        figures = section.figures
        yield (
            f"| {_plain(section.name)} | {figures.positions:,} | {figures.ppl:.3f} | "
            f"{figures.ppl_reference:.3f} | {_mean(figures)} | "
            f"{percent(figures.top1_agreement)} |"
        )


def _worst(worst: WorstPosition) -> Iterator[str]:
    yield (
        f"- {_plain(worst.section)}, token {worst.position:,}, KL {nats(worst.kl)}: after "
        f"{_code(worst.before, most=120)} the text has {_code(worst.token)}; the reference says "
        f"{_code(worst.reference_token)} ({percent(worst.reference_probability)}), the candidate "
        f"{_code(worst.candidate_token)} ({percent(worst.candidate_probability)})."
    )


def _code(text: str, *, most: int = 40) -> str:
    """A text as code: whatever backticks it has, as it stands."""
    shown = visible(text if len(text) <= most else f"…{text[-most:]}", most=most + 1)
    fence = "``" if "`" in shown else "`"
    return f"{fence} {shown} {fence}" if fence == "``" else f"{fence}{shown}{fence}"


def _plain(text: str) -> str:
    """A name of a stranger's in a table or a heading."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
