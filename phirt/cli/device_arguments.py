"""What ``phirt devices`` accepts."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["add_devices"]


def add_devices(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command."""
    summary = "list the devices of this machine, and what each backend can do with them"
    devices = commands.add_parser(
        "devices",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. Every runtime is asked in a process of "
        "its own, and runs a tiny model on each device; the answers are kept.",
        allow_abbrev=False,
    )
    output = devices.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print a JSON list of the devices")
    output.add_argument(
        "--raw",
        action="store_true",
        help="print the whole record of the machine as JSON: all that a decision reads",
    )
    devices.add_argument(
        "--refresh", action="store_true", help="forget the answers and quarantines, and ask again"
    )
    devices.add_argument(
        "--no-trials", dest="trials", action="store_false", help="list only, and run nothing"
    )
    devices.add_argument(
        "--machine",
        metavar="FILE",
        help="show the record of another machine, as --raw prints it; - for stdin",
    )
    devices.add_argument(
        "-v", "--verbose", action="count", default=0, help="log to stderr; twice for more"
    )
