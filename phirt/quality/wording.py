"""Figures and models in words, the same on a terminal and in a report."""

from __future__ import annotations

from phirt.quality.report import QualityReport, Side
from phirt.quality.verdict import GRADES

__all__ = ["described", "megabytes", "nats", "percent", "summary", "visible"]


def described(side: Side) -> str:
    """``int8 (onnx-genai) on onnxruntime, cpu``."""
    kept = "" if side.kv_precision == "auto" else f", KV cache in {side.kv_precision}"
    return f"{side.precision or '?'} ({side.format}) on {side.backend}, {side.device}{kept}"


def nats(value: float) -> str:
    """A divergence: ``0`` exactly, ``2e-07`` or ``0.0123``."""
    if value == 0:
        return "0"
    return f"{value:.0e}" if value < 5e-5 else f"{value:.4f}" if value < 10 else f"{value:.3g}"


def percent(share: float) -> str:
    """``95.9 %``; 100 only where it is."""
    # 9,999 of 10,000 are not all.
    return f"{min(99.9, 100 * share) if share < 1 else 100:.1f} %"


def megabytes(size: int) -> str:
    """``545.6 MB``."""
    return f"{size / 1e6:,.1f} MB"


def visible(text: str, *, most: int = 40) -> str:
    """A token as text in quotes, in which line ends and tabs can be seen."""
    shown = text if len(text) <= most else f"{text[: most - 1]}…"
    return repr(shown)


def summary(report: QualityReport) -> str:
    """The verdict in one sentence."""
    verdict = report.verdict
    max_kl, min_agreement = GRADES["degraded" if verdict.grade == "broken" else verdict.grade]
    bounds = (
        f"mean KL over {max_kl:g}, or under {100 * min_agreement:g} % the same top token"
        if verdict.grade == "broken"
        else f"mean KL at most {max_kl:g}, at least {100 * min_agreement:g} % the same top token"
    )
    return f"{'PASSED' if verdict.passed else 'FAILED'}: {verdict.grade} ({bounds})"
