"""Nothing that phirt runs opens a connection, and no runtime reports that it was used.

Three ways of looking: at the source, where every import of a runtime that sends something goes
through `phirt.silence`; from inside Python, on any system; and at the system calls, in a network
namespace without any network, on Linux.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import phirt
from phirt import silence
from phirt.silence import TELEMETRY, import_silently, state_of
from tests.installed import require

PACKAGE = Path(phirt.__file__).parent
# What each backend imports; the reference has no runtime, and "auto" takes what is there.
BACKENDS = {
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "onnxruntime-genai": "onnxruntime_genai",
    "mlx": "mlx",
    "transformers": "transformers",
    "reference": "numpy",
    # All runtimes are asked for their devices, and those that come first are tried.
    "auto": "numpy",
}
# What turns telemetry off, and what would hide that phirt does not: in what looks like a test or
# a build server, onnxruntime and OpenVINO send nothing of themselves.
SWITCHES = {name for each in TELEMETRY.values() for name in each.variables}
HIDING = {"CI", "GITHUB_ACTIONS", "TF_BUILD", "ORT_RUNNING_UNIT_TESTS", "JENKINS_URL", "TRAVIS"}

# onnxruntime 1.31 opens its first connection 9 seconds after it was imported.
UNTIL_SENT_S = 12
GENERATE = """
import sys, time, phirt
device = "auto" if sys.argv[1] == "auto" else "cpu"
with phirt.load(sys.argv[2], backend=sys.argv[1], device=device, precision="fp32") as model:
    print(len(model.generate("hello", max_new_tokens=3, ignore_eos=True).token_ids), "tokens")
time.sleep(float(sys.argv[3]))
"""


class TestSource:
    """Who imports what, read from the syntax trees."""

    # Whose argument is a name that is not known before the program runs, and is no runtime's.
    DYNAMIC = (
        "phirt/__init__.py",  # phirt's own modules, when a public name is first asked for
        "phirt/backends/mlx/modules.py",  # mlx-lm's layers, which import nothing else
        "phirt/dispatch/registry.py",  # adapters
        "phirt/silence.py",
    )
    SILENCERS = ("import_silently", "silence", "import_runtime", "import_openvino")

    def test_every_import_of_a_runtime_is_silenced(self):
        found = [fault for path in PACKAGE.rglob("*.py") for fault in self.faults(path)]
        assert found == []

    def faults(self, path: Path) -> Iterator[str]:
        """Imports of what sends something, in functions that have not silenced it before."""
        relative = path.relative_to(PACKAGE.parent).as_posix()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for scope in self.scopes(tree):
            silenced: list[int] = []
            for node in sorted(self.nodes(scope), key=lambda node: getattr(node, "lineno", 0)):
                if isinstance(node, ast.Call) and self.name_of(node) in self.SILENCERS:
                    silenced.append(node.lineno)
                for package in self.imported(node, relative):
                    if package in TELEMETRY and not silenced:
                        yield f"{relative}:{node.lineno}: {package}"
                    if package == "?" and relative not in self.DYNAMIC:
                        yield f"{relative}:{node.lineno}: a module by a computed name"

    def scopes(self, tree: ast.Module) -> Iterator[ast.AST]:
        yield tree
        yield from (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef))

    def nodes(self, scope: ast.AST) -> Iterator[Any]:
        """What belongs to a module or function itself, and not to a function in it."""
        pending = list(ast.iter_child_nodes(scope))
        while pending:
            node = pending.pop()
            typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            if not isinstance(node, ast.FunctionDef) and not typing_only:
                yield node
                pending += ast.iter_child_nodes(node)

    def imported(self, node: ast.AST, path: str) -> list[str]:
        match node:
            case ast.Import(names=names):
                return [alias.name.partition(".")[0] for alias in names]
            case ast.ImportFrom(module=str(module), level=0):
                return [module.partition(".")[0]]
            case ast.Call(args=[first, *_]) if self.name_of(node) in {
                "import_module",
                "__import__",
            }:
                if isinstance(first, ast.Constant):
                    return [str(first.value).partition(".")[0]]
                return ["?"]
        return []

    def name_of(self, call: ast.Call) -> str:
        return ast.unparse(call.func).rpartition(".")[2]

    @pytest.mark.parametrize(
        ("source", "is_fault"),
        [
            ("def f():\n    import onnxruntime", True),
            ("def f():\n    from huggingface_hub import constants", True),
            ("import openvino", True),
            ("def f(name):\n    return importlib.import_module(name)", True),
            ("def f():\n    return importlib.import_module('transformers.models')", True),
            ("def f():\n    silence('x')\ndef g():\n    import transformers", True),
            ("def f():\n    import transformers\n    silence('transformers')", True),
            ("def f():\n    silence('huggingface_hub')\n    import huggingface_hub", False),
            ("def f():\n    return import_silently('onnxruntime')", False),
            ("if TYPE_CHECKING:\n    import openvino", False),
            ("def f():\n    import numpy", False),
        ],
    )
    def test_a_planted_import_is_found(self, tmp_path, monkeypatch, source, is_fault):
        monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "phirt")
        path = tmp_path / "phirt" / "planted.py"
        path.parent.mkdir()
        path.write_text(source)
        assert bool(list(self.faults(path))) is is_fault


class TestSwitches:
    """What is set before an import, in a made-up package that sends things."""

    @pytest.fixture(autouse=True)
    def _sender(self, tmp_path, monkeypatch):
        (tmp_path / "sender_xyz").mkdir()
        (tmp_path / "sender_xyz" / "__init__.py").write_text(
            "import os\nsaid = os.environ.get('SENDER_OFF')\ncalls = []\n"
            "def stop(): calls.append(1)\n"
            "try: import sender_xyz_mail\nexcept ImportError: mail = None\n"
            "else: mail = sender_xyz_mail\n"
        )
        (tmp_path / "sender_xyz_mail.py").write_text("")
        monkeypatch.syspath_prepend(tmp_path)
        for name in ("sender_xyz", "sender_xyz_mail"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setattr(silence, "_ours", set())
        monkeypatch.setattr(silence, "_early", set())
        # Registered with monkeypatch, so that what is set for the test goes with it.
        monkeypatch.setenv("SENDER_OFF", "")
        monkeypatch.delenv("DO_NOT_SEND", raising=False)
        telemetry = silence.Telemetry(
            sends="everything",
            variables=("SENDER_OFF", "DO_NOT_SEND"),
            function="stop",
        )
        monkeypatch.setitem(TELEMETRY, "sender_xyz", telemetry)

    def test_the_variable_is_set_before_the_import_and_the_function_called_after_it(self):
        assert state_of("sender_xyz").reason == "phirt sets SENDER_OFF=1"
        sender: Any = import_silently("sender_xyz")
        assert sender.said == "1"
        assert sender.calls == [1]
        assert state_of("sender_xyz") == silence.State(
            True, "phirt has set SENDER_OFF=1", variable="SENDER_OFF"
        )

    @pytest.mark.parametrize("name", ["SENDER_OFF", "DO_NOT_SEND"])
    def test_the_users_own_yes_stands(self, monkeypatch, name):
        monkeypatch.setenv(name, "0")
        sender: Any = import_silently("sender_xyz")
        assert sender.said == os.environ["SENDER_OFF"] != "1"
        assert sender.calls == []
        assert state_of("sender_xyz") == silence.State(
            False, f"the environment has set {name}=0", variable=name
        )

    def test_the_users_own_no_stands(self, monkeypatch):
        monkeypatch.setenv("DO_NOT_SEND", "TRUE")
        sender: Any = import_silently("sender_xyz")
        assert sender.said == ""
        assert sender.calls == [1]
        assert state_of("sender_xyz").off

    def test_what_was_imported_before_is_called_off_and_told(self):
        import sender_xyz  # type: ignore[import-not-found]

        assert state_of("sender_xyz").early
        assert import_silently("sender_xyz") is sender_xyz
        assert sender_xyz.calls == [1]
        assert state_of("sender_xyz") == silence.State(False, "it was imported before phirt", True)

    def test_what_sends_for_it_is_kept_away_while_it_is_imported(self, monkeypatch):
        hiding = silence.Telemetry(sends="everything", hidden="sender_xyz_mail")
        monkeypatch.setitem(TELEMETRY, "sender_xyz", hiding)
        sender: Any = import_silently("sender_xyz")
        assert sender.mail is None
        assert state_of("sender_xyz").off
        import sender_xyz_mail  # type: ignore[import-not-found]  # for others it is there

        assert sender_xyz_mail is not None
        assert state_of("sender_xyz").early


def environment(home: Path) -> dict[str, str]:
    """That of a user who has switched nothing off, with a home of his own."""
    kept = {key: value for key, value in os.environ.items() if key not in SWITCHES | HIDING}
    homes = dict.fromkeys(("HOME", "USERPROFILE", "LOCALAPPDATA", "APPDATA"), str(home))
    # Runtimes are asked for their devices here once more, and must not say so to anybody.
    own = {"XDG_CACHE_HOME": "", "PHIRT_HOME": str(home / "phirt"), "PHIRT_MACHINE_DIR": ""}
    return kept | homes | own


WATCH = """
import sys
# What may reach another machine; sockets of the system's own, a pair or a file, may be opened.
EVENTS = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto",
          "socket.sendmsg")
def hook(event, arguments):
    if event in EVENTS and not (event == "socket.connect" and arguments[0].family == 1):
        print("NETWORK", event, arguments[1:], file=sys.stderr)
sys.addaudithook(hook)
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_generation_opens_no_connection_from_python(backend, tiny_gguf, tmp_path):
    """On any system; and it leaves nothing in the user's home folder."""
    require(BACKENDS[backend])
    home = tmp_path / "home"
    home.mkdir()
    command = [sys.executable, "-c", WATCH + GENERATE, backend, str(tiny_gguf), "0"]
    ran = subprocess.run(
        command, env=environment(home), capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "3 tokens\n"
    assert "NETWORK" not in ran.stderr
    # onnxruntime keeps a number for the machine and a queue of events, OpenVINO a number.
    left = {path.name for path in home.rglob("*") if path.is_file()}
    assert not [name for name in left if re.search(r"\.db$|deviceid|_ga_|stats", name)], left


def test_a_connection_from_python_would_be_seen(tmp_path):
    program = WATCH + "import socket\ntry: socket.create_connection(('127.0.0.1', 9), 1)\n"
    program += "except OSError: pass"
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "NETWORK socket.connect" in ran.stderr


@cache
def what_is_missing() -> str | None:
    """Why system calls cannot be watched in an empty network namespace here, or None."""
    system: str = sys.platform
    if system != "linux":
        return "system calls are watched on Linux only"
    for program in ("unshare", "strace"):
        if shutil.which(program) is None:
            return f"the program {program} is not installed"
    for command in (["unshare", "-rn", "true"], ["strace", "-f", "-o", os.devnull, "true"]):
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            return f"`{' '.join(command)}` failed here: {ran.stderr.strip()[:200]}"
    return None


class Traces:
    """Programs that run at the same time, each watched, in an empty network namespace."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, program: str, *arguments: str) -> None:
        home = self._folder / name
        home.mkdir()
        watched = ["strace", "-f", "-qq", "-e", "trace=network", "-e", "signal=none", "-o"]
        command = ["unshare", "-rn", *watched, str(home / "trace"), sys.executable, "-c", program]
        with (home / "out").open("wb") as out, (home / "err").open("wb") as err:
            self._running[name] = subprocess.Popen(
                [*command, *arguments], env=environment(home), stdout=out, stderr=err
            )

    def finish(self, name: str) -> tuple[str, list[str]]:
        """What a program printed, and the calls in which it reached out."""
        status = self._running[name].wait(timeout=300)
        out, err, trace = (
            (self._folder / name / file).read_text(encoding="utf-8")
            for file in ("out", "err", "trace")
        )
        assert status == 0, err
        return out, reaching_out(trace)

    def close(self) -> None:
        for process in self._running.values():
            process.kill()
            process.wait()


def reaching_out(trace: str) -> list[str]:
    """The lines of strace's output that reach beyond this machine.

    `connect` and `sendto` to other addresses than of unix sockets; a socket for the internet,
    even if nothing was sent through it.
    """
    calls = re.compile(r"(socket\(AF_INET|(connect|sendto|sendmsg|sendmmsg)\()")
    return [
        line
        for line in trace.splitlines()
        if calls.search(line) and "AF_UNIX" not in line and "AF_NETLINK" not in line
    ]


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory, tiny_gguf: Path) -> Iterator[Traces]:
    """All programs of this file's last tests: each waits for what a runtime sends late."""
    missing = what_is_missing()
    if missing is not None:
        pytest.skip(f"system calls cannot be watched: {missing}")
    traces = Traces(tmp_path_factory.mktemp("traces"))
    traces.start("loud", "import openvino, time; time.sleep(1)")
    for backend in BACKENDS:
        traces.start(backend, GENERATE, backend, str(tiny_gguf), str(UNTIL_SENT_S))
    yield traces
    traces.close()


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_generation_reaches_out_to_nobody(backend, traces):
    require(BACKENDS[backend])
    out, calls = traces.finish(backend)
    assert out == "3 tokens\n"
    assert calls == []


@pytest.mark.slow
def test_a_runtime_that_reaches_out_would_be_seen(traces):
    """OpenVINO, imported as anybody imports it."""
    require("openvino")
    _, calls = traces.finish("loud")
    assert any("connect" in call for call in calls)
