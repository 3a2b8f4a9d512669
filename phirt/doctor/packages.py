"""Whether the files of the installed runtimes are those of one distribution, and whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import Distribution, distributions
from pathlib import Path

from phirt.backends.distributions import find_conflicts, listed_files
from phirt.doctor.commands import reinstall, replace
from phirt.doctor.finding import Finding

__all__ = ["canonical", "examine_packages", "is_runtime", "read_installed"]

# Top-level packages of the runtimes and of what they cannot do without. Plugins to onnxruntime
# begin with its name.
_PACKAGES = {
    "gguf",
    "huggingface_hub",
    "mlx",
    "mlx_lm",
    "onnx",
    "openvino",
    "openvino_genai",
    "openvino_tokenizers",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
}
_PREFIX = "onnxruntime"
_MOST_NAMED = 3


def read_installed() -> dict[str, Distribution]:
    """The installed distributions, by canonical name; of two, the one that is imported."""
    found: dict[str, Distribution] = {}
    for distribution in distributions():
        # Without a name, its metadata is damaged, and pip does not see it either.
        if isinstance(distribution.metadata["Name"], str):
            found.setdefault(canonical(distribution.name), distribution)
    return found


def canonical(name: str) -> str:
    """A distribution's name as it is compared."""
    from packaging.utils import canonicalize_name

    return canonicalize_name(name)


def is_runtime(package: str) -> bool:
    """Whether a top-level package is of a runtime, or of a plugin to one."""
    return package in _PACKAGES or package.startswith(_PREFIX)


def examine_packages(installed: Mapping[str, Distribution]) -> Iterator[Finding]:
    """Packages with several owners, and distributions that have lost files."""
    conflicts = find_conflicts(is_runtime)
    for conflict in conflicts:
        yield Finding(
            severity="broken",
            area="packages",
            found=str(conflict),
            why=(
                f"What is left is a mixture, and uninstalling one takes files of the other. "
                f"Keep one: {conflict.wanted}, or another of them in its place."
            ),
            command=replace(conflict.owners, conflict.wanted),
        )
    overwritten = {canonical(name) for conflict in conflicts for name in conflict.owners}
    looked_at = 0
    for name, distribution in sorted(installed.items()):
        files = {
            file: size
            for file, size in listed_files(distribution).items()
            if is_runtime(file.partition("/")[0])
        }
        looked_at += bool(files)
        if name not in overwritten:
            yield from _examine_files(distribution, files)
    if looked_at and not conflicts:
        yield Finding(
            severity="ok",
            area="packages",
            found=f"{looked_at} distributions of runtimes; no two own one package.",
        )


def _examine_files(
    distribution: Distribution, files: Mapping[str, int | None]
) -> Iterator[Finding]:
    damaged = [file for file, size in files.items() if not _is_there(distribution, file, size)]
    if damaged:
        name, version = distribution.name, distribution.version
        yield Finding(
            severity="broken",
            area="packages",
            found=(
                f"{name} {version}: {len(damaged)} of its {len(files)} files are missing or not "
                f"the ones it installed: {_some(damaged)}."
            ),
            why=(
                "Another distribution may have been uninstalled that had overwritten them, or an "
                "installation was interrupted."
            ),
            command=reinstall(f"{name}=={version}"),
        )


def _is_there(distribution: Distribution, file: str, size: int | None) -> bool:
    try:
        found = Path(str(distribution.locate_file(file))).stat().st_size
    except OSError:
        return False
    return size in (None, found)


def _some(files: Iterable[str]) -> str:
    named = sorted(files)
    more = len(named) - _MOST_NAMED
    return ", ".join(named[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
