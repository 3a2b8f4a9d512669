"""Builds a model into a folder; for tests to kill, and to run side by side.

    python -m tests.models.build_child SOURCE OUT [--overwrite] [--int4]

It prints the points at which it could have been killed, or the error.
"""

from __future__ import annotations

import sys
from pathlib import Path

import phirt
from phirt.errors import StoreError
from phirt.models.kill_points import points_passed
from tests.models.install_child import tensor_done


def main() -> None:
    """Do what the command line says."""
    source, out, *flags = sys.argv[1:]
    try:
        phirt.build_model(
            source,
            Path(out),
            precision="int4" if "--int4" in flags else "int8",
            overwrite="--overwrite" in flags,
            offline=True,
            progress=tensor_done,
        )
    except StoreError as error:
        said = str(error)
    else:
        said = " ".join(points_passed())
    sys.stdout.write(f"{said}\n")


if __name__ == "__main__":
    main()
