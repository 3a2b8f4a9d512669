"""What an engine's own Python runs: the engine, without a network and without outliving phirt.

It is run by its path, in an environment that may lack phirt, so it imports the standard
library alone. Its standard input is a pipe from phirt on which nothing is ever written: when
it ends, phirt is gone, however it went, and so is this.

    python -P child.py MODULE ARGUMENT...
"""

from __future__ import annotations

import os
import runpy
import sys
import threading

__all__ = ["main"]

# What Python announces before it opens a connection or asks for an address.
_NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")


def main() -> None:
    """Run the module of the first argument as ``python -m`` does, with the others."""
    _end_with_parent()
    sys.addaudithook(_refuse_network)
    module, *arguments = sys.argv[1:]
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _end_with_parent() -> None:
    lifeline = os.dup(0)
    # Whatever reads its standard input finds it empty and not, for ever, silent.
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)

    def watch() -> None:
        os.read(lifeline, 1)
        os._exit(1)

    threading.Thread(target=watch, name="phirt-parent", daemon=True).start()


def _refuse_network(event: str, arguments: tuple[object, ...]) -> None:
    if event not in _NETWORK:
        return
    # A socket of the file system has a path, where those of a network have a tuple.
    if event == "socket.connect" and not isinstance(arguments[1], tuple):
        return
    raise OSError(f"A build opens no connection; this one tried to ({event}).")


if __name__ == "__main__":
    main()
