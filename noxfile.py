"""What CI runs, and a developer before a change: ``python -m nox``, or one session of it.

Every session installs with pip in its own virtual environment, so that the index, links
and proxies of the user's pip configuration hold here too. Nothing here is a shell script:
the sessions run on Linux, macOS and Windows.
"""

from __future__ import annotations

import ctypes.util
import os
import shlex
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import nox

ROOT = Path(__file__).parent
# One model store for all sessions: the default model is fetched and converted once.
STORE = ROOT / ".nox" / "phirt-home"
PYPROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
# The extras whose runtimes run on any machine's CPU, and the backend that each is for.
CPU_BACKENDS = {
    "cpu": "onnxruntime",
    "genai": "onnxruntime-genai",
    "openvino": "openvino",
    "mlx": "mlx",
    "torch": "transformers",
}
if os.name == "nt":
    del CPU_BACKENDS["mlx"]  # which has no wheels for Windows
RUNTIMES = ",".join(CPU_BACKENDS)
# Tiny models gain nothing from torch's and NumPy's threads, which spin where other work wants
# the cores.
TEST_ENV = {"PHIRT_HOME": str(STORE), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
# A torch of a CPU build, where the extra would take the newest build, CUDA and all.
TORCH = next(
    requirement
    for requirement in nox.project.dependency_groups(PYPROJECT, "oracle")
    if requirement.startswith("torch==")
)
# A program that fails where torch or transformers can be imported.
NO_TORCH = """
import importlib.util
found = [name for name in ("torch", "transformers") if importlib.util.find_spec(name)]
raise SystemExit(f"the cpu extra pulled in {found}" if found else 0)
"""

# What the conformance suite needs beside a backend.
CONFORMANCE = ["pytest>=8.3", "pytest-timeout>=2.3"]
# Vulkan in software, where Debian's package "chromium" puts it.
SWIFTSHADER = Path("/usr/lib/chromium/vk_swiftshader_icd.json")

nox.needs_version = ">=2025.5"
nox.options.default_venv_backend = "virtualenv"
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = True
nox.options.sessions = [
    "lint",
    "typing",
    "tests",
    "extras",
    "docs",
    "examples",
    "bench-once",
    "wheel",
]


def install(session: nox.Session, *groups: str, extra: str | None = None) -> None:
    """Install the checkout (with extras, if named) together with dependency groups.

    The groups are read here and not by ``pip install --group``, which a pip of 2023 lacks.
    """
    project = ["-e", f".[{extra}]"] if extra else ["-e", "."]
    session.install(*project, *nox.project.dependency_groups(PYPROJECT, *groups))


def readme_main_job() -> list[str]:
    """The ``phirt run ...`` part of README's first command, as arguments."""
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        _, found, job = line.partition("&& phirt ")
        if found:
            return shlex.split(job)
    message = "README.md has no line that ends in '&& phirt ...'"
    raise ValueError(message)


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff: lint rules and formatting."""
    session.install(*nox.project.dependency_groups(PYPROJECT, "lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def typing(session: nox.Session) -> None:
    """Strict mypy, as seen from Linux, Windows and macOS."""
    install(session, "typing")
    for platform in ("linux", "win32", "darwin"):
        session.run("mypy", "--platform", platform)


@nox.session
def tests(session: nox.Session) -> None:
    """The test suite, on every runtime; arguments after ``--`` go to pytest."""
    install(session, "test", extra=RUNTIMES)
    # A runtime that is missing here is a failure, and no reason to skip its tests.
    session.run("pytest", *session.posargs, env=TEST_ENV | {"PHIRT_TEST_REQUIRE_ALL": "1"})


@nox.session(name="tests-on", python=["3.12", "3.13"])
def tests_on(session: nox.Session) -> None:
    """The test suite on later Pythons, on demand, without what needs the pinned torch."""
    # The same list without the oracle's group, which is the entry that is no string.
    groups = [group for group in PYPROJECT["dependency-groups"]["test"] if isinstance(group, str)]
    runtimes = ",".join(extra for extra in CPU_BACKENDS if extra != "torch")
    session.install("-e", f".[{runtimes}]", *groups)
    session.run("pytest", "-m", "not oracle", *session.posargs, env=TEST_ENV)


@nox.session
@nox.parametrize("extra", list(CPU_BACKENDS))
def extras(session: nox.Session, extra: str) -> None:
    """README's main job on one backend, with nothing installed but its extra."""
    session.install(f".[{extra}]", *([TORCH] if extra == "torch" else []))
    command = ["phirt", *readme_main_job(), "--backend", CPU_BACKENDS[extra]]
    answer = session.run(*command, silent=True, env={"PHIRT_HOME": str(STORE)})
    session.log(f"{CPU_BACKENDS[extra]} answered: {answer}")
    if "Paris" not in str(answer):
        session.error(f"{CPU_BACKENDS[extra]} did not answer with Paris")


@nox.session
def webgpu(session: nox.Session) -> None:
    """The conformance suite on onnxruntime's WebGPU provider; on Linux, Vulkan in software.

    There it needs SwiftShader: Debian's package ``chromium`` has it, with a Vulkan loader beside.
    A driver that the user names in VK_DRIVER_FILES is taken instead.
    """
    env = vulkan_environment(session) if sys.platform == "linux" else {}
    install(session, extra="webgpu")
    session.install(*CONFORMANCE)
    session.run("pytest", "tests/devices_real/on_webgpu.py", *session.posargs, env=env)


def vulkan_environment(session: nox.Session) -> dict[str, str]:
    """Variables with which a Vulkan loader and a driver are found; an error without them."""
    driver = os.environ.get("VK_DRIVER_FILES", str(SWIFTSHADER))
    if not Path(driver.split(os.pathsep)[0]).is_file():
        session.error(
            f"there is no Vulkan driver at {driver}: install SwiftShader (apt-get install "
            "chromium), or name a driver's manifest in VK_DRIVER_FILES"
        )
    env = {"VK_DRIVER_FILES": driver}
    if ctypes.util.find_library("vulkan") is None:
        # Chromium has a loader of its own beside its driver.
        if not (SWIFTSHADER.parent / "libvulkan.so.1").is_file():
            session.error("there is no Vulkan loader: apt-get install libvulkan1")
        env["LD_LIBRARY_PATH"] = str(SWIFTSHADER.parent)
    return env


@nox.session(name="openvino-ep")
@nox.parametrize(
    "wheels",
    [
        nox.param(("onnxruntime>=1.31", "onnxruntime-ep-openvino>=1.8"), id="plugin"),
        nox.param(("onnxruntime-openvino>=1.24",), id="built-in"),
    ],
)
def openvino_ep(session: nox.Session, wheels: tuple[str, ...]) -> None:
    """The conformance suite on onnxruntime's OpenVINO provider, on the CPU.

    The plugin offers itself on Intel's processors only; the wheel that has the provider
    built in, an older one, runs it on any.
    """
    install(session)
    session.install(*wheels, "onnx>=1.20", *CONFORMANCE)
    session.run("pytest", "tests/devices_real/on_openvino_ep.py", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation, with every warning and every dangling reference an error."""
    install(session, "docs")
    build = ["sphinx-build", "-q", "-W", "-n", "--keep-going", "-b", "html"]
    session.run(*build, "docs", "docs/_build/html")


@nox.session
def examples(session: nox.Session) -> None:
    """Every example, as a user would run it."""
    install(session, extra="cpu")
    for example in sorted((ROOT / "examples").glob("*.py")):
        session.run("python", str(example), env={"PHIRT_HOME": str(STORE)})


@nox.session
def bench(session: nox.Session) -> None:
    """The benchmarks, on demand: minutes on a quiet machine; arguments go to pytest."""
    run_benchmarks(session, "-s", *session.posargs)


@nox.session(name="bench-once")
def bench_once(session: nox.Session) -> None:
    """Each benchmark once and unmeasured, so that none stops working unseen."""
    run_benchmarks(session, "--benchmark-disable")


def run_benchmarks(session: nox.Session, *arguments: str) -> None:
    """Run pytest over benchmarks/ with the rivals installed."""
    runtimes = ",".join(extra for extra in CPU_BACKENDS if extra != "torch")
    install(session, "bench", extra=runtimes)
    session.run("pytest", "benchmarks", *arguments, env={"PHIRT_HOME": str(STORE)})


@nox.session
def wheel(session: nox.Session) -> None:
    """Build, install outside the checkout without torch, and do README's main job."""
    session.install("build", "virtualenv")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        outside = Path(name)
        session.run("python", "-m", "build", "--outdir", str(outside / "dist"))
        (built,) = (outside / "dist").glob("*.whl")
        check_contents(session, built)
        run_main_job(session, built, outside)


def check_contents(session: nox.Session, built: Path) -> None:
    """Fail unless the wheel holds the whole package, its licence, and nothing else."""
    with zipfile.ZipFile(built) as archive:
        packed = {name for name in archive.namelist() if not name.endswith("/")}
    files = [path for path in (ROOT / "phirt").rglob("*") if path.is_file()]
    package = {p.relative_to(ROOT).as_posix() for p in files if p.suffix != ".pyc"}
    missing = package - packed
    metadata = {name for name in packed if name.split("/")[0].endswith(".dist-info")}
    strange = {name for name in packed - metadata if not name.startswith("phirt/")}
    if missing or strange or not any(name.endswith("/LICENSE") for name in metadata):
        session.error(f"{built.name}: missing {sorted(missing)}, not wanted {sorted(strange)}")


def run_main_job(session: nox.Session, built: Path, outside: Path) -> None:
    """Install the wheel with its cpu extra in a bare environment and ask README's question."""
    session.run("python", "-m", "virtualenv", "--quiet", str(outside / "venv"))
    scripts = outside / "venv" / ("Scripts" if os.name == "nt" else "bin")
    python = str(scripts / "python")
    # The checkout must not be importable, nor a model be lying in a store.
    env = {"PYTHONPATH": None, "PHIRT_HOME": str(outside / "home")}
    with session.chdir(outside):
        session.run(python, "-m", "pip", "install", "--quiet", f"{built}[cpu]", external=True)
        session.run(python, "-c", NO_TORCH, external=True, env=env)
        command = shutil.which("phirt", path=str(scripts))
        if command is None:
            session.error("the wheel installed no phirt command")
        answer = session.run(command, *readme_main_job(), external=True, silent=True, env=env)
    session.log(f"phirt answered: {answer}")
    if "Paris" not in str(answer):
        session.error("README's main job did not answer with Paris")
