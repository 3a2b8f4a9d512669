"""An engine ends with whoever started it, reaches no network, and says in a line how it failed."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

from phirt.build.engines.process import Log, last_words, offline_environment, run_module
from phirt.errors import EngineFailedError
from tests.build.engines.fake import wait_for, write_module

TRACEBACK = "Traceback (most recent call last):"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a program as an engine, and returns the lines that it wrote."""

    def run_source(source: str, on_line=None) -> list[str]:
        write_module(tmp_path, "engine_program", source)
        monkeypatch.syspath_prepend(str(tmp_path))
        lines: list[str] = []
        run_module(
            Path(sys.executable),
            "engine_program",
            ["one", "two"],
            engine="fake",
            work_dir=tmp_path,
            on_line=on_line or lines.append,
        )
        return lines

    return run_source


class TestOutput:
    def test_every_line_is_heard_those_of_a_bar_of_progress_too(self, run):
        source = "print('a'); sys.stderr.write('1/2\\r2/2\\r'); print('b\\n\\nc', end='')"
        assert run(source) == ["a", "1/2", "2/2", "b", "c"]

    def test_its_arguments_are_those_that_were_given(self, run):
        assert run("print(sys.argv[1:], __name__)") == ["['one', 'two'] __main__"]

    def test_what_is_no_text_is_still_a_line(self, run):
        assert run("os.write(1, b'\\xff\\n')") == ["\N{REPLACEMENT CHARACTER}"]

    def test_a_line_without_end_is_not_kept_whole(self, run):
        lines = run("os.write(1, b'x' * 5_000_000 + b'\\nend\\n')")
        assert lines[-1] == "end"
        assert len(lines[0]) <= 2000

    def test_of_a_long_log_the_end_is_kept(self):
        log = Log()
        for number in range(100_000):
            log.add(f"line {number}")
        assert str(log).endswith("line 99999")
        assert len(str(log)) < 33_000

    def test_its_standard_input_is_empty(self, run):
        assert run("print(repr(sys.stdin.read()))") == ["''"]


class TestFailure:
    def failure(self, run, source: str) -> EngineFailedError:
        with pytest.raises(EngineFailedError) as caught:
            run(source)
        return caught.value

    def test_the_message_is_one_line_and_the_log_has_the_rest(self, run):
        error = self.failure(run, "print('Reading layer 0')\nraise ValueError('no\\nsuch weight')")
        assert str(error) == (
            "The engine 'fake' failed: ValueError: no (ended with exit status 1; the exception's "
            "`log` has the last that it wrote)."
        )
        assert error.log.startswith("Reading layer 0\nTraceback (most recent call last):")
        assert error.log.endswith("ValueError: no\nsuch weight")

    def test_it_survives_a_process_pool(self, run):
        error = self.failure(run, "raise ValueError('no')")
        copied = pickle.loads(pickle.dumps(error))  # noqa: S301  # our own bytes
        assert (str(copied), copied.log) == (str(error), error.log)

    @pytest.mark.skipif(os.name == "nt", reason="Windows has no signals")
    def test_a_signal_is_explained(self, run):
        error = self.failure(run, "os.kill(os.getpid(), signal.SIGKILL)")
        assert "the system does that when memory runs out" in str(error)

    def test_what_cannot_be_started(self, tmp_path):
        with pytest.raises(EngineFailedError, match="cannot be started"):
            run_module(
                tmp_path / "python",
                "x",
                [],
                engine="fake",
                work_dir=tmp_path,
                on_line=lambda _: None,
            )

    @pytest.mark.parametrize(
        ("log", "said"),
        [
            ("", ""),
            ("a\nb\n\n", "b"),
            ("usage: x\nbuilder.py: error: argument -p: invalid", "builder.py: error: argument"),
            ("ERROR: first\nERROR: No matching distribution\nbye", "ERROR: No matching"),
            (f"{TRACEBACK}\n  File x\n    y\nKeyError: 'a'\nbye", "KeyError"),
            (
                f"{TRACEBACK}\n  x\nOSError: 1\n\nThen:\n\n{TRACEBACK}\n  y\nt.Error: 2\n z",
                "t.Error: 2",
            ),
            ("\x1b[31mred\x07", "[31mred"),
            ("x" * 1000, "x" * 300),
        ],
    )
    def test_the_last_words(self, log, said):
        found = last_words(log)
        assert found.startswith(said)
        assert found.isprintable()
        assert len(found) <= 303


class TestEnd:
    GRANDCHILD = """
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(os.getpid(), child.pid, flush=True)
        time.sleep(600)
    """

    @pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
    def test_what_is_raised_while_it_runs_ends_it_and_all_that_it_started(self, run, kind):
        heard = []

        def fail(line: str) -> None:
            heard.append(line)
            raise kind("enough")

        with pytest.raises(kind):
            run(self.GRANDCHILD, fail)
        pids = [int(pid) for pid in heard[0].split()]
        assert len(pids) == 2
        wait_for(lambda: not any(map(psutil.pid_exists, pids)))

    @pytest.mark.skipif(os.name == "nt", reason="Windows has no signals")
    def test_ctrl_c_ends_it(self, tmp_path):
        parent, pids = self.start_parent(tmp_path)
        parent.send_signal(signal.SIGINT)
        assert parent.wait(30) != 0
        wait_for(lambda: not any(map(psutil.pid_exists, pids)))

    def test_it_does_not_outlive_a_parent_that_was_killed(self, tmp_path):
        parent, (engine, grandchild) = self.start_parent(tmp_path)
        parent.kill()
        parent.wait(30)
        wait_for(lambda: not psutil.pid_exists(engine))
        psutil.Process(grandchild).kill()  # of which nobody knows any more

    def start_parent(self, folder: Path) -> tuple[subprocess.Popen[str], list[int]]:
        write_module(folder, "engine_program", self.GRANDCHILD)
        program = (
            "import sys; from pathlib import Path\n"
            "from phirt.build.engines.process import run_module\n"
            f"sys.path.insert(0, {str(folder)!r})\n"
            "run_module(Path(sys.executable), 'engine_program', [], engine='fake',"
            f" work_dir=Path({str(folder)!r}), on_line=lambda line: print(line, flush=True))"
        )
        parent = subprocess.Popen(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert parent.stdout
        with parent.stdout as output:
            return parent, [int(pid) for pid in output.readline().split()]

    def test_what_it_leaves_running_does_not_hold_the_build(self, run):
        source = self.GRANDCHILD.replace("time.sleep(600)\n    ", "os._exit(0)\n")
        (line,) = run(source)
        psutil.Process(int(line.split()[1])).kill()
        wait_for(lambda: all(each.name != "phirt-engine" for each in threading.enumerate()))


class TestNetwork:
    @pytest.mark.parametrize(
        "attempt",
        [
            "socket.create_connection(('127.0.0.1', 9))",
            "socket.getaddrinfo('localhost', 80)",
            "urllib.request.urlopen('http://127.0.0.1:9')",
        ],
    )
    def test_no_connection_is_opened(self, run, attempt):
        with pytest.raises(EngineFailedError, match="A build opens no connection"):
            run(f"import socket, urllib.request\n{attempt}")

    def test_no_hub_is_asked_and_no_token_is_there(self, monkeypatch, tmp_path):
        monkeypatch.setenv("HF_TOKEN", "secret")
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        found = offline_environment(tmp_path, own=True)
        assert "secret" not in found.values()
        assert found["HF_HUB_OFFLINE"] == "1"
        assert Path(found["HF_HOME"]).is_relative_to(tmp_path)

    def test_telemetry_is_off_unless_the_user_said_otherwise(self, monkeypatch, tmp_path):
        monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
        assert offline_environment(tmp_path, own=True)["ORT_DISABLE_TELEMETRY"] == "1"
        monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
        assert offline_environment(tmp_path, own=True)["ORT_DISABLE_TELEMETRY"] == "0"

    def test_the_path_of_this_python_is_not_that_of_another(self, monkeypatch, tmp_path):
        monkeypatch.setenv("PYTHONPATH", "mine")
        assert "PYTHONPATH" not in offline_environment(tmp_path, own=False)
        assert str(Path(sys.path[-1]).absolute()) in offline_environment(tmp_path, own=True)[
            "PYTHONPATH"
        ].split(os.pathsep)
