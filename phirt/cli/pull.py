"""``phirt pull``: fetch a model; its folder is printed."""

from __future__ import annotations

import argparse
from dataclasses import asdict

import phirt
from phirt.cli.announce import Announcer
from phirt.cli.arguments import UsageError
from phirt.cli.progress import ProgressBars
from phirt.cli.selection import as_json, print_json
from phirt.errors import PhirtError
from phirt.models.store import Store

__all__ = ["pull"]


def pull(arguments: argparse.Namespace) -> None:
    """Carry out ``phirt pull``.

    Raises:
        UsageError: The arguments make no sense.
        DeclinedError: The download is large, and nobody agreed to it.
        PhirtError: The model cannot be fetched.
    """
    with ProgressBars() as bars:
        announcer = Announcer(bars, yes=arguments.yes)
        try:
            path = phirt.pull(
                arguments.name,
                device=arguments.device,
                backend=arguments.backend,
                precision=arguments.precision,
                offline=arguments.offline,
                progress=bars,
                announce=announcer,
            )
        except PhirtError:
            raise
        except ValueError as error:
            raise UsageError(" ".join(str(error).split())) from error
    if not arguments.json:
        print(path)
        return
    found = [as_json(model) for model in Store().installed() if model.path == path]
    plan = announcer.plan and asdict(announcer.plan)
    print_json({**found[0], "downloaded": plan})
