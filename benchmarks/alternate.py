"""Two sides, taking turns in one run, so that what the machine does hits both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Comparison", "alternate"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Rates of both sides, round by round.

    Attributes:
        ours: phirt's rate in each round, larger is better.
        theirs: The rival's rate in the same rounds.
    """

    ours: list[float]
    theirs: list[float]

    @property
    def ratio(self) -> float:
        """Median over the rounds of ours / theirs."""
        return statistics.median(a / b for a, b in zip(self.ours, self.theirs, strict=True))

    def __str__(self) -> str:
        ratios = [a / b for a, b in zip(self.ours, self.theirs, strict=True)]
        return (
            f"{statistics.median(self.ours):.1f} against {statistics.median(self.theirs):.1f}, "
            f"ratio {self.ratio:.2f} (rounds from {min(ratios):.2f} to {max(ratios):.2f})"
        )


def alternate(
    benchmark: Any, ours: Callable[[], float], theirs: Callable[[], float], *, rounds: int = 25
) -> Comparison:
    """Run both sides in turn and compare their rates.

    Args:
        benchmark: pytest-benchmark's fixture; it records phirt's side.
        ours: Runs phirt once and returns its rate.
        theirs: Runs the rival once and returns its rate.
        rounds: Turns of each side, after one that is not counted.
    """
    rates: tuple[list[float], list[float]] = ([], [])

    def turn(side: Callable[[], float], found: list[float]) -> None:
        # A runtime's idle workers may spin for a while after its turn.
        time.sleep(0.05)
        found.append(side())

    benchmark.pedantic(
        lambda: turn(ours, rates[0]),
        setup=lambda: turn(theirs, rates[1]),
        rounds=rounds,
        warmup_rounds=1,
    )
    # pytest-benchmark runs nothing but the one call where it is disabled.
    skip = 1 if len(rates[0]) > 1 else 0
    comparison = Comparison(rates[0][skip:], rates[1][skip : len(rates[0])])
    benchmark.extra_info["ratio"] = round(comparison.ratio, 3)
    return comparison
