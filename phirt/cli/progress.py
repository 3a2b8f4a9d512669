"""Progress bars on stderr for downloads and conversions."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING

from phirt.cli.terminal import is_terminal
from phirt.types import Progress

if TYPE_CHECKING:
    import rich.progress

__all__ = ["ProgressBars", "amount", "speed"]


class ProgressBars:
    """Draws one bar per stage while it is open; nothing where stderr is no terminal.

    An instance is the callback itself. rich is imported at the first report, so a model
    that is already in the store does not pay for it.
    """

    def __init__(self) -> None:
        self._bars: rich.progress.Progress | None = None
        self._tasks: dict[str, rich.progress.TaskID] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> ProgressBars:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Leave the bars as they are; what comes next draws new ones below."""
        with self._lock:
            if self._bars is not None:
                self._bars.stop()
                self._bars = None
                self._tasks.clear()

    def __call__(self, progress: Progress) -> None:
        """Show how far a stage has come."""
        if not is_terminal(sys.stderr):
            return
        with self._lock:
            bars = self._bars = self._bars or _start()
            task = self._tasks.get(progress.stage)
            if task is None:
                task = bars.add_task(
                    progress.stage.capitalize(), total=progress.total, amount="", unit=progress.unit
                )
                self._tasks[progress.stage] = task
            bars.update(
                task, completed=progress.completed, total=progress.total, amount=amount(progress)
            )


def _start() -> rich.progress.Progress:
    import rich.console
    import rich.progress as columns
    import rich.text

    class SpeedColumn(columns.ProgressColumn):
        def render(self, task: columns.Task) -> rich.text.Text:
            return rich.text.Text(speed(task.finished_speed or task.speed, task.fields["unit"]))

    bars = columns.Progress(
        columns.TextColumn("{task.description}"),
        columns.BarColumn(),
        columns.TaskProgressColumn(),
        columns.TextColumn("{task.fields[amount]}"),
        SpeedColumn(),
        # Time left; once it is done, the time that it took.
        columns.TimeRemainingColumn(elapsed_when_finished=True),
        console=rich.console.Console(stderr=True),
        # stdout is for the answer alone, whatever is drawn beside it.
        redirect_stdout=False,
    )
    bars.start()
    return bars


def amount(progress: Progress) -> str:
    """``12.3/98.4 MB`` or ``17/211 tensors``."""
    done: str | int = progress.completed
    total: str | int | None = progress.total
    unit: str = progress.unit
    if unit == "bytes":
        done, unit = f"{progress.completed / 1e6:.1f}", "MB"
        total = None if progress.total is None else f"{progress.total / 1e6:.1f}"
    return f"{done} {unit}" if total is None else f"{done}/{total} {unit}"


def speed(per_second: float | None, unit: str) -> str:
    """``12.3 MB/s`` or ``17 tensors/s``; nothing while it is not known."""
    if per_second is None:
        return ""
    return f"{per_second / 1e6:.1f} MB/s" if unit == "bytes" else f"{per_second:.0f} {unit}/s"
