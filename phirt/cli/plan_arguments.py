"""What ``phirt plan`` accepts."""

from __future__ import annotations

import argparse
from typing import Any

from phirt.cli.store_arguments import add_choice, add_kv_precision

__all__ = ["add_plan"]


def add_plan(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command."""
    summary = "say how a model would be run on this machine, and why"
    plan = commands.add_parser(
        "plan",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. Nothing is fetched or converted.",
        allow_abbrev=False,
    )
    plan.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="a name, org/name of a hub, a model folder or a GGUF file (default: a small model)",
    )
    add_choice(plan)
    add_kv_precision(plan)
    plan.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="tokens of prompt and answer that there must be memory for (default: 2048, or the "
        "model's limit)",
    )
    plan.add_argument(
        "--optimize",
        choices=("latency", "prefill", "throughput"),
        default="latency",
        help="what the choice is for, where speeds were measured (default: latency)",
    )
    plan.add_argument(
        "--machine",
        metavar="FILE",
        help="plan for the machine of a record (phirt devices --raw); - for stdin",
    )
    plan.add_argument("--json", action="store_true", help="print one JSON object")
    plan.add_argument(
        "-v", "--verbose", action="count", default=0, help="log to stderr; twice for more"
    )
