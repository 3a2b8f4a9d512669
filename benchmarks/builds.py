"""Builds in processes of their own, so that their time and their memory can be told."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

__all__ = ["Built", "build"]


@dataclass(frozen=True, slots=True)
class Built:
    """One build.

    Attributes:
        path: The folder.
        seconds: From the start of the command to its end.
        peak_bytes: Most resident memory of all its processes together, sampled.
        report: What ``phirt build --json`` said.
    """

    path: Path
    seconds: float
    peak_bytes: int
    report: dict[str, Any]


def build(source: Path, out: Path, *arguments: str) -> Built:
    """Run ``phirt build SOURCE -o OUT --json`` with further arguments."""
    command: Sequence[str] = [
        *(sys.executable, "-m", "phirt", "build", str(source), "-o", str(out), "--json"),
        *arguments,
    ]
    started = time.perf_counter()
    with subprocess.Popen(  # noqa: S603  # phirt itself
        command, stdout=subprocess.PIPE, text=True
    ) as process:
        peak = [0]
        watch = threading.Thread(target=_watch, args=(process.pid, peak))
        watch.start()
        output, _ = process.communicate()
        seconds = time.perf_counter() - started
        watch.join()
    if process.returncode:
        raise RuntimeError(f"{command} ended with status {process.returncode}")
    return Built(out, seconds, peak[0], json.loads(output))


def _watch(pid: int, peak: list[int]) -> None:
    try:
        root = psutil.Process(pid)
        while root.is_running() and root.status() != psutil.STATUS_ZOMBIE:
            total = 0
            for process in (root, *root.children(recursive=True)):
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            peak[0] = max(peak[0], total)
            time.sleep(0.02)
    except psutil.NoSuchProcess:
        return
