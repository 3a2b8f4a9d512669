"""The Pythons that engines run on: the caller's, or one that was prepared for them.

    ROOT/engines/NAME/              a virtual environment
    ROOT/engines/NAME/engine.json   written last: what is installed there

ROOT is the store's. A virtual environment has its own path written into it and cannot be
moved, so it is made in place; one without engine.json is unfinished, and made anew by
whoever prepares it next. A build installs nothing by itself.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

from phirt.build.engines.process import plain_output, run_logged
from phirt.errors import EngineFailedError, EngineNotInstalledError, StoreError
from phirt.models.safe_json import JsonFields, read_json
from phirt.models.staging import locked
from phirt.models.store import Store
from phirt.types import Progress, ProgressCallback

__all__ = [
    "ENGINES",
    "Engine",
    "EnginePython",
    "find_engine",
    "merge_requirements",
    "prepare_engine",
    "prepared_engine",
    "remove_engine",
]

_MARKER = "engine.json"
_MARKER_FORMAT = 1
_PIP = ("--timeout", "60", "--retries", "5", "--no-input", "--disable-pip-version-check")
_REQUIREMENT = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)\s*(?:[\[<>=!~;@(].*)?")
_PYTHON = re.compile(r"(python|pypy|graalpy)", re.IGNORECASE)
# Run by the environment's own Python: versions of what is installed, by project.
_VERSIONS = """
import importlib.metadata, json
found = {each.metadata["Name"]: each.version for each in importlib.metadata.distributions()}
print("VERSIONS " + json.dumps(found))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What an engine is made of.

    Attributes:
        name: What it is called.
        modules: Packages that it imports, each with the distributions that may bring it.
        requirements: What is installed into an environment that is prepared for it.
    """

    name: str
    modules: Mapping[str, tuple[str, ...]]
    requirements: tuple[str, ...]


ENGINES: Mapping[str, Engine] = MappingProxyType(
    {
        "model-builder": Engine(
            name="model-builder",
            modules={
                "onnxruntime_genai": (
                    "onnxruntime-genai",
                    "onnxruntime-genai-cuda",
                    "onnxruntime-genai-directml",
                ),
                "torch": ("torch",),
                "transformers": ("transformers",),
                "onnx": ("onnx",),
                "onnx_ir": ("onnx-ir",),
            },
            requirements=(
                "onnxruntime-genai>=0.18",
                "torch>=2.9",
                "transformers>=5.23",
                "onnx>=1.20",
                "onnx-ir>=0.1",
            ),
        ),
        "mlx": Engine(
            name="mlx",
            modules={"mlx": ("mlx",), "mlx_lm": ("mlx-lm",)},
            requirements=(
                "mlx-lm>=0.32",
                "mlx>=0.32; sys_platform == 'darwin'",
                "mlx[cpu]>=0.32; sys_platform == 'linux'",
            ),
        ),
    }
)
"""The engines that run in a Python of their own, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePython:
    """A Python that has an engine.

    Attributes:
        python: The interpreter.
        versions: Versions of the distributions that the engine is made of, by name.
        folder: Where its packages are, of which the engine's is one; None where it is not known.
    """

    python: Path
    versions: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None


def find_engine(name: str, *, store: Store | None = None) -> EnginePython:
    """The Python to run an engine with. Imports nothing of it.

    The caller's own environment, where it has all that the engine imports; else the one that
    was prepared.

    Args:
        name: One of `ENGINES`.
        store: Where it was prepared; the default store where not given.

    Raises:
        EngineNotInstalledError: Neither has it.
        ValueError: There is no such engine.
    """
    engine = _engine(name)
    missing = [module for module in engine.modules if find_spec(module) is None]
    if not missing and _is_python():
        return EnginePython(
            python=Path(sys.executable),
            versions=_own_versions(engine),
            folder=_folder_of(next(iter(engine.modules))),
        )
    prepared = prepared_engine(name, store=store)
    if prepared is not None:
        return prepared
    lack = f"this environment lacks {', '.join(missing)}" if missing else "this is no plain Python"
    raise EngineNotInstalledError(
        f"The engine {name!r} is not installed: {lack}, and no environment was prepared for it. "
        f"Run: phirt build --prepare-engine {name}"
    )


def prepared_engine(name: str, *, store: Store | None = None) -> EnginePython | None:
    """The environment that was prepared for an engine; None where there is none, or half of one.

    Args:
        name: One of `ENGINES`.
        store: Where it was prepared; the default store where not given.

    Raises:
        ValueError: There is no such engine.
    """
    folder = _environment(_engine(name), store or Store())
    marker, python = folder / _MARKER, _python_of(folder)
    # The interpreter that it was made from may have been removed.
    if not marker.is_file() or not python.exists():
        return None
    fields = JsonFields(read_json(marker), source=str(marker))
    versions = {key: str(value) for key, value in fields.mapping("versions").items()}
    return EnginePython(python=python, versions=versions, folder=_site_packages(folder))


def prepare_engine(
    name: str,
    *,
    requirements: Sequence[str] | None = None,
    progress: ProgressCallback | None = None,
    force: bool = False,
    store: Store | None = None,
) -> Path:
    """Make a virtual environment for an engine, with pip and the user's settings of it.

    One that is there is kept, unless it is to be made anew or has other requirements. Of two
    processes that prepare one engine, the second waits.

    Args:
        name: One of `ENGINES`.
        requirements: Requirements such as ``"torch==2.13.0"``. Each takes the place of the
            engine's own for the same project; others come on top.
        progress: Called for every package.
        force: Make it anew.
        store: Where it goes; the default store where not given.

    Returns:
        The interpreter.

    Raises:
        EngineFailedError: ``venv`` or pip failed.
        StoreError: The store cannot be written.
        ValueError: There is no such engine, or a requirement does not begin with the name of a
            project.
    """
    engine = _engine(name)
    wanted = merge_requirements(engine.requirements, requirements or ())
    store = store or Store()
    folder = _environment(engine, store)
    try:
        with locked(_lock(engine, store)):
            if not force and _requirements_of(folder) == wanted:
                return _python_of(folder)
            _discard(folder)
            folder.parent.mkdir(parents=True, exist_ok=True)
            _make(engine, folder, wanted, progress)
    except OSError as error:
        raise StoreError(
            f"The environment of {name!r} cannot be written to {folder}: {error}."
        ) from error
    return _python_of(folder)


def remove_engine(name: str, *, store: Store | None = None) -> bool:
    """Remove the environment that was prepared for an engine.

    Args:
        name: One of `ENGINES`.
        store: Where it was prepared; the default store where not given.

    Returns:
        Whether there was one.

    Raises:
        StoreError: It cannot be removed.
        ValueError: There is no such engine.
    """
    engine = _engine(name)
    store = store or Store()
    folder = _environment(engine, store)
    try:
        with locked(_lock(engine, store)):
            was_there = folder.exists()
            _discard(folder)
    except OSError as error:
        raise StoreError(f"{folder} cannot be removed: {error}.") from error
    return was_there


def merge_requirements(defaults: Sequence[str], chosen: Sequence[str]) -> list[str]:
    """The defaults, but for the projects that were chosen otherwise; then what was chosen.

    Raises:
        ValueError: One does not begin with the name of a project, as an option of pip's, a path
            or an address would.
    """
    projects = {_project(requirement) for requirement in chosen}
    kept = [default for default in defaults if _project(default) not in projects]
    return [*kept, *(requirement.strip() for requirement in chosen)]


def _project(requirement: str) -> str:
    match = _REQUIREMENT.fullmatch(requirement.strip())
    if match is None:
        raise ValueError(
            f"{requirement[:200]!r} is no requirement: name a project, as in 'torch==2.13.0' or "
            "'torch @ file:///wheels/torch.whl'."
        )
    return _canonical(match[1])


def _canonical(project: str) -> str:
    return re.sub(r"[-_.]+", "-", project).lower()


def _engine(name: str) -> Engine:
    if name not in ENGINES:
        raise ValueError(f"There is no engine {name!r}. Choose one of: {', '.join(ENGINES)}.")
    return ENGINES[name]


def _is_python() -> bool:
    """Whether this process's interpreter can be started: an application may have embedded it."""
    frozen = getattr(sys, "frozen", False)
    return not frozen and bool(sys.executable and _PYTHON.match(Path(sys.executable).name))


def _own_versions(engine: Engine) -> dict[str, str]:
    versions = {}
    for distributions in engine.modules.values():
        for distribution in distributions:
            try:
                versions[distribution] = version(distribution)
            except PackageNotFoundError:
                continue
            break
    return versions


def _folder_of(module: str) -> Path | None:
    spec = find_spec(module)
    places = spec.submodule_search_locations if spec else None
    return Path(next(iter(places))).parent if places else None


def _environment(engine: Engine, store: Store) -> Path:
    return store.root / "engines" / engine.name


def _lock(engine: Engine, store: Store) -> Path:
    return store.root / "locks" / f"engines-{engine.name}.lock"


def _python_of(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _site_packages(folder: Path) -> Path | None:
    places = [folder / "Lib/site-packages", *sorted(folder.glob("lib/python*/site-packages"))]
    return next((place for place in places if place.is_dir()), None)


def _requirements_of(folder: Path) -> list[str] | None:
    """What a finished environment was made with, or None where it is not finished."""
    marker = folder / _MARKER
    if not marker.is_file() or not _python_of(folder).exists():
        return None
    requirements = read_json(marker).get("requirements")
    return requirements if isinstance(requirements, list) else None


def _discard(folder: Path) -> None:
    # The marker first: half of an environment must not look like a whole one.
    (folder / _MARKER).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)


def _make(
    engine: Engine, folder: Path, requirements: list[str], progress: ProgressCallback | None
) -> None:
    if not _is_python():
        raise EngineFailedError(
            f"No environment can be made for {engine.name!r}: {sys.executable or 'this program'} "
            "is not a Python that could make one."
        )
    name, parent = f"{engine.name} (its environment)", folder.parent
    environment = {**os.environ, **plain_output()}
    # A path of this interpreter's would hide what is installed there, or stand for it.
    for variable in ("PYTHONPATH", "PYTHONHOME"):
        environment.pop(variable, None)

    def run(command: Sequence[str | Path], watch: _Watch) -> None:
        run_logged(
            [str(each) for each in command],
            engine=name,
            environment=environment,
            folder=parent,
            on_line=watch.line,
        )

    watch = _Watch(progress)
    run([sys.executable, "-m", "venv", folder], watch)
    python = _python_of(folder)
    run([python, "-m", "pip", "install", *_PIP, "--progress-bar", "off", *requirements], watch)
    run([python, "-P", "-c", _VERSIONS], watch)
    _write_marker(folder, engine, requirements, watch.versions)


class _Watch:
    """Listens to pip: every package that it collects is one."""

    def __init__(self, progress: ProgressCallback | None) -> None:
        self._progress = progress
        self._collected = 0
        self.versions: dict[str, str] = {}

    def line(self, line: str) -> None:
        if line.startswith("VERSIONS "):
            found = json.loads(line.removeprefix("VERSIONS "))
            self.versions = {_canonical(name): version for name, version in found.items()}
        elif line.startswith(("Collecting ", "Processing ")):  # the latter from a folder
            self._collected += 1
            if self._progress is not None:
                self._progress(Progress("install", self._collected, None, "packages"))


def _write_marker(
    folder: Path, engine: Engine, requirements: list[str], versions: Mapping[str, str]
) -> None:
    own = {name for names in engine.modules.values() for name in names}
    document = {
        "format_version": _MARKER_FORMAT,
        "engine": engine.name,
        "requirements": requirements,
        "versions": {name: versions[name] for name in sorted(versions) if name in own},
    }
    partial = folder / f"{_MARKER}.partial"
    with partial.open("w", encoding="utf-8", newline="\n") as file:
        json.dump(document, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / _MARKER)
