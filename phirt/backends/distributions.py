"""Finds installed distributions that have overwritten each other's files.

The builds of one runtime (onnxruntime, onnxruntime-gpu, onnxruntime-webgpu …) are separate
distributions that hold the same package. An installer takes a second one without a word and
writes over the first; what is left imports, mixes two versions, and is mended by neither.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import Distribution
from pathlib import Path

from phirt.errors import BackendBrokenError

__all__ = ["check_single_owner"]


def check_single_owner(module: str, *, backend: str) -> None:
    """Refuse a package that several installed distributions own.

    Only distributions whose names begin with the package's are looked at (a plugin such as
    onnxruntime-ep-openvino is, and owns another package), and of each only its RECORD: it
    costs a millisecond and imports nothing. Without a RECORD (conda) or in an editable
    install nothing is known, and nothing is refused.

    Args:
        module: Top-level package, such as ``"onnxruntime"``.
        backend: Name of the backend that needs it, for the message.

    Raises:
        BackendBrokenError: At least two own it; the message has both names and versions, and
            the command that mends it.
    """
    for entry in sys.path:
        folder = Path(entry)
        owners = _owners(folder, module)
        if len(owners) > 1:
            raise _conflict(module, backend, folder, owners)
        if owners or (folder / module).is_dir():
            return  # The first entry that holds the package is the one that is imported.


def _owners(folder: Path, module: str) -> dict[str, str]:
    """Versions, by name, of the distributions that installed the package into a folder."""
    owners: dict[str, str] = {}
    try:
        found = sorted(folder.glob(f"{module}*.dist-info"))
    except OSError:
        return owners
    for metadata in found:
        distribution = Distribution.at(metadata)
        record = distribution.read_text("RECORD") or ""
        if re.search(rf'^"?{re.escape(module)}/__init__\.py"?,', record, re.MULTILINE):
            owners[distribution.name] = distribution.version
    return owners


def _conflict(
    module: str, backend: str, folder: Path, owners: dict[str, str]
) -> BackendBrokenError:
    listed = " and ".join(f"{name} {version}" for name, version in owners.items())
    names = " ".join(owners)
    # The build with a suffix has all that the plain one has.
    wanted = max(owners, key=len)
    others = " or ".join(name for name in owners if name != wanted)
    return BackendBrokenError(
        f"Backend {backend!r}: {listed} both installed the package {module!r} into {folder}, and "
        "overwrote each other's files. Keep one of them: "
        f"python -m pip uninstall -y {names} && python -m pip install {wanted} "
        f"(or install {others} in the end)."
    )
