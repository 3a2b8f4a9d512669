"""What ``phirt doctor`` accepts."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["add_doctor"]


def add_doctor(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command."""
    summary = "say what is wrong with this installation, and what mends it"
    doctor = commands.add_parser(
        "doctor",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. Nothing is changed. The exit status is 1 "
        "where something is broken.",
        allow_abbrev=False,
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.add_argument(
        "--deep", action="store_true", help="hash every model's files, and try every device"
    )
    doctor.add_argument(
        "-v", "--verbose", action="count", default=0, help="log to stderr; twice for more"
    )
