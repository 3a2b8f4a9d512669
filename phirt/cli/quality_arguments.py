"""What ``phirt quality`` accepts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from phirt.cli.store_arguments import add_kv_precision, add_target
from phirt.locate import PRECISIONS

__all__ = ["add_quality"]


def add_quality(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command."""
    summary = "say what a model lost against its reference: distance, size, speed"
    quality = commands.add_parser(
        "quality",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. Both are loaded at once. The status is "
        "1 where the candidate does not pass.",
        allow_abbrev=False,
    )
    named = "a name, org/name of a hub, a model folder or a GGUF file"
    quality.add_argument("reference", metavar="REFERENCE", help=f"what is held against: {named}")
    quality.add_argument("candidate", metavar="CANDIDATE", help="what is judged, likewise")
    compared = quality.add_argument_group("comparison")
    compared.add_argument(
        "--text",
        action="append",
        type=Path,
        metavar="FILE",
        help="a UTF-8 text to compare on; may be repeated (default: prose in several languages, "
        "and code)",
    )
    compared.add_argument(
        "--tokens", type=int, metavar="N", help="about how many tokens of it (default: 4096)"
    )
    compared.add_argument(
        "--max-kl", type=float, metavar="X", help="largest mean KL that passes (default: 0.02)"
    )
    compared.add_argument(
        "--min-agreement",
        type=float,
        metavar="X",
        help="least share of equal top tokens that passes (default: 0.9)",
    )
    compared.add_argument("--no-speed", action="store_true", help="do not time them")
    reference = quality.add_argument_group("reference")
    reference.add_argument("--reference-device", default="auto", help="as --device")
    reference.add_argument("--reference-backend", default="auto", help="as --backend")
    reference.add_argument(
        "--reference-precision",
        default="auto",
        help=f"what a checkpoint is converted to: {', '.join(PRECISIONS)} (default: fp32)",
    )
    candidate = quality.add_argument_group("candidate")
    add_target(candidate)
    add_kv_precision(candidate)
    output = quality.add_argument_group("output")
    output.add_argument(
        "--report", type=Path, metavar="DIR", help="write a page with plots into this folder"
    )
    output.add_argument("--json", action="store_true", help="print one JSON object")
    output.add_argument(
        "-v", "--verbose", action="count", default=0, help="log to stderr; twice for more"
    )
