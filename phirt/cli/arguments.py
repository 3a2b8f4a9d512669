"""What the command line accepts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from phirt._version import __version__
from phirt.cli.bench_arguments import add_bench
from phirt.cli.build_arguments import add_build
from phirt.cli.device_arguments import add_devices
from phirt.cli.doctor_arguments import add_doctor
from phirt.cli.plan_arguments import add_plan
from phirt.cli.quality_arguments import add_quality
from phirt.cli.store_arguments import add_kv_precision, add_store_commands, add_target
from phirt.cli.tune_arguments import add_tune

__all__ = ["UsageError", "parse"]


class UsageError(Exception):
    """The command was given wrongly; the message is one line."""


class _Parser(argparse.ArgumentParser):
    """argparse, with one line in place of its usage dump."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"phirt: {message} ({self.prog} --help lists the options)\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the arguments.

    Raises:
        SystemExit: With status 2 and one line on stderr for wrong usage, with 0 after
            ``--help`` and ``--version``.
    """
    parser = _Parser(
        prog="phirt",
        description="Run small language models on the machine you have.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"phirt {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_run(commands)
    add_store_commands(commands)
    add_devices(commands)
    add_plan(commands)
    add_tune(commands)
    add_bench(commands)
    add_build(commands)
    add_quality(commands)
    add_doctor(commands)
    return parser.parse_args(argv)


def _add_run(commands: argparse._SubParsersAction[_Parser]) -> None:
    run = commands.add_parser(
        "run",
        help="answer a prompt, or chat",
        description="Answer a prompt. Without one: read it from stdin if that is piped, else chat.",
        allow_abbrev=False,
    )
    run.add_argument("prompt", nargs="?", metavar="PROMPT", help="a message, or text with --raw")
    where = run.add_argument_group("model")
    where.add_argument(
        "-m",
        "--model",
        help="a name, org/name of a hub, a model folder or a GGUF file (default: a small model, "
        "fetched once)",
    )
    add_target(where)
    add_kv_precision(where)
    where.add_argument(
        "--prefill",
        metavar="BACKEND",
        help="with --decode: the backend, or BACKEND:DEVICE, that runs the long parts of prompts; "
        "auto for both takes what phirt tune found",
    )
    where.add_argument(
        "--decode", metavar="BACKEND", help="with --prefill: the one that runs everything else"
    )
    how = run.add_argument_group(
        "generation", "What is not given is as the model's own configuration says, else greedy."
    )
    how.add_argument("--max-new-tokens", type=int, metavar="N", help="most tokens to generate")
    how.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    how.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens")
    how.add_argument("--top-p", type=float, metavar="P", help="sample from the likeliest P")
    how.add_argument("--min-p", type=float, metavar="P", help="at least P times the likeliest")
    how.add_argument("--repetition-penalty", type=float, metavar="R", help="1 is none")
    how.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this text; may be repeated"
    )
    how.add_argument("--seed", type=int, metavar="N", help="the same seed samples the same")
    output = run.add_argument_group("input and output")
    output.add_argument("--raw", action="store_true", help="the prompt is plain text, not a chat")
    output.add_argument("--json", action="store_true", help="print one JSON object at the end")
    output.add_argument(
        "-v", "--verbose", action="count", default=0, help="log to stderr; twice for more"
    )
