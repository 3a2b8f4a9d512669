"""What figures amount to: a grade, and whether the candidate passes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from phirt.quality.figures import Figures

__all__ = ["GRADES", "Grade", "Thresholds", "Verdict", "grade_of", "is_uncertain", "judge"]

Grade: TypeAlias = Literal["equal", "close", "degraded", "broken"]
"""How far a candidate is from its reference, in a word."""

GRADES: Mapping[Grade, tuple[float, float]] = {
    # What "equal" means for quantized weights everywhere in phirt: what kernels of two runtimes,
    # or of one row and many, differ by.
    "equal": (0.01, 0.95),
    # The most that `precision="auto"` accepts (docs/precision.md); measured there, a mean
    # divergence of 0.02 comes with an agreement of over 90 %.
    "close": (0.02, 0.90),
    # Beyond it, most of the text that is written is another. Int4 made by rounding minima is
    # within (0.35 nats, 69 %), and already writes another answer after a few tokens.
    "degraded": (1.0, 0.50),
    "broken": (math.inf, 0.0),
}
"""Of each grade the largest mean divergence, in nats, and the least top-1 agreement."""

# Chance alone takes a figure so many of its standard errors too far in one case of forty.
_ALLOWANCE = 2.0
# A section with fewer positions says too little to fail a candidate.
_FEWEST = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """What a candidate must keep to in order to pass; by default, to be ``close``.

    Attributes:
        max_kl: Largest mean divergence, in nats.
        min_agreement: Least top-1 agreement, from 0 to 1.

    Raises:
        ValueError: One is out of range.
        TypeError: One is no number.
    """

    max_kl: float = GRADES["close"][0]
    min_agreement: float = GRADES["close"][1]

    def __post_init__(self) -> None:
        for name, largest in (("max_kl", math.inf), ("min_agreement", 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, not {value!r}")
            if not 0 <= value <= largest or math.isinf(value):
                bound = "at least 0" if math.isinf(largest) else f"from 0 to {largest:g}"
                raise ValueError(f"{name}={value} must be {bound}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether a candidate passes, and why not.

    Attributes:
        grade: The worse of the grades of both kernels.
        passed: Whether both kernels keep to the thresholds, but for two standard errors of each
            figure, and no section of the text is ``broken``.
        reasons: What it failed by, one sentence each; empty where it passed.
        thresholds: What was asked for.
    """

    grade: Grade
    passed: bool
    reasons: tuple[str, ...]
    thresholds: Thresholds


def grade_of(figures: Figures) -> Grade:
    """The best grade whose bounds figures keep to, but for two standard errors."""
    return next(
        grade
        for grade, (max_kl, min_agreement) in GRADES.items()
        if _least_kl(figures) <= max_kl and _most_agreement(figures) >= min_agreement
    )


def is_uncertain(figures: Figures, thresholds: Thresholds) -> bool:
    """Whether chance may have decided: a figure is within two standard errors of its bound."""
    kl = abs(figures.kl_mean - thresholds.max_kl)
    agreement = abs(figures.top1_agreement - thresholds.min_agreement)
    return kl < _ALLOWANCE * (figures.kl_se or 0.0) or agreement < _ALLOWANCE * (
        figures.top1_se or 0.0
    )


def _least_kl(figures: Figures) -> float:
    return figures.kl_mean - _ALLOWANCE * (figures.kl_se or 0.0)


def _most_agreement(figures: Figures) -> float:
    return figures.top1_agreement + _ALLOWANCE * (figures.top1_se or 0.0)


def judge(
    kernels: Mapping[str, tuple[Figures, Mapping[str, Figures]]], thresholds: Thresholds
) -> Verdict:
    """Pass judgement on a candidate.

    Args:
        kernels: By what the kernels are called: the figures of all that they were run on, and
            those of each section. At least one.
        thresholds: What it must keep to.
    """
    grades = list(GRADES)
    reasons: list[str] = []
    for name, (figures, sections) in kernels.items():
        reasons += _failures(name, figures, thresholds)
        reasons += _broken_sections(name, sections)
    return Verdict(
        grade=max((grade_of(figures) for figures, _ in kernels.values()), key=grades.index),
        passed=not reasons,
        reasons=tuple(reasons),
        thresholds=thresholds,
    )


def _failures(name: str, figures: Figures, thresholds: Thresholds) -> Iterable[str]:
    if _least_kl(figures) > thresholds.max_kl:
        yield (
            f"With the {name} kernels the mean KL is {figures.kl_mean:.3g} nats, and "
            f"{thresholds.max_kl:g} is the most."
        )
    if _most_agreement(figures) < thresholds.min_agreement:
        yield (
            f"With the {name} kernels {100 * figures.top1_agreement:.1f} % of the most likely "
            f"tokens agree, and {100 * thresholds.min_agreement:.1f} % is the least."
        )


def _broken_sections(name: str, sections: Mapping[str, Figures]) -> Iterable[str]:
    for section, figures in sections.items():
        if figures.positions >= _FEWEST and grade_of(figures) == "broken":
            yield (
                f"With the {name} kernels the section {section!r} is broken: mean KL "
                f"{figures.kl_mean:.3g} nats, agreement {100 * figures.top1_agreement:.1f} %."
            )
