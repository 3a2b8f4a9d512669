"""What ``phirt bench`` accepts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from phirt.locate import PRECISIONS

__all__ = ["add_bench"]


def add_bench(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the command."""
    summary = "measure a model with every backend and device, as a user sees it"
    bench = commands.add_parser(
        "bench",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}: seconds to load, time to first token, "
        "tokens a second, peak memory. Nothing is downloaded. It takes minutes; run it while the "
        "machine does nothing else. The status is 1 where nothing could be measured.",
        allow_abbrev=False,
    )
    what = bench.add_argument_group("model")
    what.add_argument(
        "-m",
        "--model",
        help="a name, org/name of a hub, a model folder or a GGUF file (default: a small model)",
    )
    what.add_argument("--backend", default="all", help="such as onnxruntime (default: all)")
    what.add_argument("--device", default="all", help="such as cpu (default: all)")
    what.add_argument(
        "--precision",
        default="auto",
        help=f"what a checkpoint is converted to: {', '.join(PRECISIONS)} (default: auto, what "
        "each backend would take)",
    )
    what.add_argument("--offline", action="store_true", help="use no network at all")
    how = bench.add_argument_group("measurement")
    how.add_argument(
        "--prompt-tokens",
        type=_counts,
        metavar="N,N",
        help="lengths of the prompts (default: 128,512)",
    )
    how.add_argument("--new-tokens", type=int, metavar="N", help="tokens to generate (default: 64)")
    how.add_argument(
        "--concurrency",
        type=_counts,
        metavar="N,N",
        help="how many streams at once, one thread each (default: 1)",
    )
    how.add_argument(
        "--repeats",
        type=int,
        metavar="N",
        help="how often each is measured, after once that does not count (default: 3)",
    )
    how.add_argument(
        "--row-timeout",
        type=float,
        metavar="SECONDS",
        help="most that one backend on one device may take (default: 300)",
    )
    output = bench.add_argument_group("output")
    output.add_argument(
        "--json", action="store_true", help="print one JSON object, with every time measured"
    )
    output.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw a figure: .png, .svg or .pdf"
    )
    output.add_argument(
        "-v", "--verbose", action="count", default=0, help="log to stderr; twice for more"
    )


def _counts(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(each) for each in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of whole numbers such as 128,512"
        ) from None
