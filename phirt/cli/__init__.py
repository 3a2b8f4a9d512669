"""The command line: one small file per command.

What a user gets back: 0 when it worked; 1 for a `PhirtError` or an error of the system (a
full disk), with its message, for a download that nobody agreed to, and where `phirt verify`
or `phirt doctor` found a fault, or `phirt quality` a candidate that does not pass; 2 for wrong
usage, with one line that says what is wrong; 130 after Ctrl-C, and 141 when the reader of the
output has gone, as shells count signals. The answer goes to stdout, all else to stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence

from phirt.cli.announce import DeclinedError
from phirt.cli.arguments import UsageError, parse
from phirt.cli.bench import print_bench
from phirt.cli.build import build
from phirt.cli.devices import print_devices
from phirt.cli.doctor import doctor
from phirt.cli.gc import collect
from phirt.cli.list import print_list
from phirt.cli.plan import print_plan
from phirt.cli.pull import pull
from phirt.cli.quality import print_quality
from phirt.cli.rm import remove
from phirt.cli.run import run
from phirt.cli.show import show
from phirt.cli.terminal import is_broken_pipe, open_log, plain, use_utf8
from phirt.cli.tune import print_tuning
from phirt.cli.verify import verify
from phirt.errors import PhirtError

__all__ = ["main"]

_FAILED, _WRONG_USAGE, _INTERRUPTED, _NO_READER = 1, 2, 130, 141

# What each does; its value is the exit status, None for 0.
_COMMANDS: Mapping[str, Callable[[argparse.Namespace], int | None]] = {
    "run": run,
    "plan": print_plan,
    "pull": pull,
    "list": print_list,
    "show": show,
    "verify": verify,
    "rm": remove,
    "gc": collect,
    "devices": print_devices,
    "tune": print_tuning,
    "bench": print_bench,
    "build": build,
    "quality": print_quality,
    "doctor": doctor,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments, or None for those of the process.

    Returns:
        The exit status.
    """
    use_utf8()
    arguments = parse(argv)
    open_log(arguments.verbose)
    try:
        status = _COMMANDS[arguments.command](arguments)
        sys.stdout.flush()
    except UsageError as error:
        hint = f"phirt {arguments.command} --help lists the options"
        return _fail(_WRONG_USAGE, f"{error} ({hint})")
    except (PhirtError, DeclinedError) as error:
        return _fail(_FAILED, str(error))
    except KeyboardInterrupt:
        return _INTERRUPTED
    except OSError as error:
        # What is still buffered has nowhere to go; Python would complain of it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if is_broken_pipe(error):
            return _NO_READER
        return _fail(_FAILED, f"the system refused a file or the output: {error}")
    return status or 0


def _fail(status: int, message: str) -> int:
    print(plain(f"phirt: {message}"), file=sys.stderr)
    return status
