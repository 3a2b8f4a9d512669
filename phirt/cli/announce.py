"""Says what is about to be downloaded, and asks before it is much."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from phirt.cli.progress import ProgressBars
from phirt.cli.terminal import is_terminal, plain

if TYPE_CHECKING:
    from phirt import PullPlan

__all__ = ["Announcer", "DeclinedError"]

_MUCH_BYTES = 5_000_000_000


class DeclinedError(Exception):
    """A download that needs consent did not get it; the message is one line."""


class Announcer:
    """Told of a plan, prints it to stderr; above 5 GB somebody at the terminal is asked.

    Args:
        bars: Progress bars, which give way to the question.
        yes: Whether consent was given beforehand.

    Attributes:
        plan: The last plan that it was told of.
    """

    def __init__(self, bars: ProgressBars, *, yes: bool) -> None:
        self._bars = bars
        self._yes = yes
        self.plan: PullPlan | None = None

    def __call__(self, plan: PullPlan) -> None:
        """Announce a plan.

        Raises:
            DeclinedError: It is more than 5 GB, and nobody agreed.
        """
        self.plan = plan
        self._bars.stop()
        print(plain(f"phirt: {plan}"), file=sys.stderr)
        if plan.bytes <= _MUCH_BYTES or self._yes:
            return
        size = f"{plan.bytes / 1e9:.1f} GB"
        if not (is_terminal(sys.stdin) and is_terminal(sys.stderr)):
            raise DeclinedError(f"{plan.name} takes {size}: pass --yes to download it.")
        print(f"Download {size}? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in {"y", "yes"}:
            raise DeclinedError("nothing was downloaded.")
