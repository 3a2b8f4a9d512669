"""What ``phirt tune`` accepts."""

from __future__ import annotations

import argparse
from typing import Any

from phirt.cli.store_arguments import add_choice

__all__ = ["add_tune"]


def add_tune(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command."""
    summary = "time a model with every backend and device, for later choices"
    tune = commands.add_parser(
        "tune",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. It takes minutes; run it while the "
        "machine does nothing else.",
        allow_abbrev=False,
    )
    tune.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="a name, org/name of a hub, a model folder or a GGUF file (default: a small model)",
    )
    add_choice(tune)
    tune.add_argument(
        "--quick", action="store_true", help="two lengths, with the runtimes' own settings only"
    )
    tune.add_argument("--yes", action="store_true", help="do not ask before a large download")
    tune.add_argument("--json", action="store_true", help="print one JSON object")
    tune.add_argument(
        "-v", "--verbose", action="count", default=0, help="log to stderr; twice for more"
    )
