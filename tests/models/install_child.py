"""Installs into a store; for tests to run many times at once, and to kill.

    python -m tests.models.install_child ROOT KIND [WHAT] [--no-locks]

KIND is ``plain`` (three small files), ``convert`` (WHAT: a GGUF file), ``pull`` (WHAT: a name
on the hub of HF_ENDPOINT) or ``remove``. It prints the folder, and the points at which it
could have been killed.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from phirt.models import staging
from phirt.models.kill_points import kill_point, points_passed
from phirt.models.store import Store
from phirt.types import Progress
from tests.models.store_content import KEY, fill

RUNS = "runs"
"""The file beside the store that gets a line whenever the work itself is done."""


class NoLock:
    """A lock on a file system where locking does nothing: everybody gets it."""

    def __init__(self, path: Path) -> None:
        self.lock_file = str(path)

    def acquire(self, timeout: float = -1) -> None:
        """Have it."""

    def release(self) -> None:
        """Let it go."""


def fill_slowly(folder: Path, *, root: Path) -> None:
    """Write an artifact of several files, with a point to be killed at between them."""
    with (root.parent / RUNS).open("a") as file:
        file.write("run\n")
    for index in range(3):
        (folder / f"part-{index}").write_bytes(bytes(100_000))
        kill_point("part")
    fill(folder)


def tensor_done(progress: Progress) -> None:
    """A point to be killed at after every tensor of a conversion."""
    del progress
    kill_point("tensor")


def main() -> None:
    """Do what the command line says."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--no-locks"]
    if len(arguments) < len(sys.argv) - 1:
        vars(staging)["FileLock"] = NoLock
    root, kind = Path(arguments[0]), arguments[1]
    store = Store(root)
    if kind == "plain":
        said = [store.install(KEY, partial(fill_slowly, root=root))]
    elif kind == "convert":
        from phirt.build.convert import convert

        fill_model = partial(
            convert,
            Path(arguments[2]),
            layout="onnx-genai",
            precision="int8",
            progress=tensor_done,
        )
        said = [store.install(KEY, fill_model)]
    elif kind == "pull":
        from phirt.models.hub_models import fetch, plan_build
        from phirt.models.hub_names import HubName

        name = HubName.parse(arguments[2])
        build = plan_build(
            name, label=name.repo, formats=("onnx-genai",), device="cpu", offline=False
        )
        said = [fetch(build, store, progress=None).path]
    else:
        store.remove(KEY)
        said = []
    sys.stdout.writelines(f"{line}\n" for line in [*said, " ".join(points_passed())])


if __name__ == "__main__":
    main()
