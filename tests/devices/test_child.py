"""A child that crashes, hangs or cannot be started is a value, and never an exception."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from phirt.devices import child
from phirt.devices.child import CHILD, PASSING, describe_exit, run_child

ANSWER = "open(sys.argv[-1], 'w').write('answer')\n"


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Writes a module that only sys.path leads to, and returns its name."""

    def write(source: str) -> str:
        (tmp_path / "child_program.py").write_text(
            "import os, signal, subprocess, sys, time\n" + textwrap.dedent(source),
            encoding="utf-8",
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        return "child_program"

    return write


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_it_answers_in_a_file_whatever_it_prints(program):
    name = program("print('a banner')\nos.write(2, b'a warning')\n" + ANSWER)
    end = run_child(name, [], timeout_s=60)
    assert (end.ending, end.answer, end.reason) == ("answered", "answer", "")


def test_its_arguments_come_before_the_file(program):
    name = program("open(sys.argv[-1], 'w').write(' '.join(sys.argv[1:3]))")
    assert run_child(name, ["list", "mine"], timeout_s=60).answer == "list mine"


def test_what_it_said_last_is_in_the_reason(program):
    source = "print('first', flush=True)\nraise SystemExit('no such driver')"
    end = run_child(program(source), [], timeout_s=60)
    assert end.ending == "crashed"
    assert end.reason == (
        "ended with exit status 1 and without an answer. It said last: first / no such driver"
    )


def test_what_it_said_is_cut_to_size(program):
    end = run_child(program("print('é' * 100_000, flush=True)\nos._exit(1)"), [], timeout_s=60)
    assert end.reason.endswith("é")
    assert len(end.reason) < 600


@pytest.mark.skipif(os.name == "nt", reason="Windows has exit codes in place of signals")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("SIGILL", "crashed with SIGILL: an instruction that this processor does not have"),
        ("SIGABRT", "crashed with SIGABRT: it aborted itself"),
        ("SIGSEGV", "crashed with SIGSEGV: memory that is not there was accessed"),
    ],
)
def test_a_signal_is_told_in_words(program, name, words):
    number = getattr(signal, name).value
    end = run_child(program(f"signal.raise_signal({number})"), [], timeout_s=60)
    assert (end.ending, end.reason) == ("crashed", words)


def test_a_crash_after_the_answer_costs_nothing(program):
    end = run_child(program(ANSWER + "os.abort()"), [], timeout_s=60)
    assert (end.ending, end.answer) == ("answered", "answer")


@pytest.mark.skipif(os.name == "nt", reason="Windows has exit codes in place of signals")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("SIGKILL", "the system does that when memory runs out"),
        ("SIGINT", "Ctrl-C"),
        ("SIGTERM", "it was told to end"),
        ("SIGHUP", "its terminal was closed"),
    ],
)
def test_what_was_ended_from_outside_may_work_next_time(program, name, words):
    number = getattr(signal, name).value
    source = f"""
        if {number} != signal.SIGKILL:
            signal.signal({number}, signal.SIG_DFL)  # it may have been born to ignore it
        os.kill(os.getpid(), {number})
        time.sleep(60)
    """
    end = run_child(program(source), [], timeout_s=60)
    assert (end.ending, end.lasts) == ("crashed", False)
    assert words in end.reason


def test_a_child_that_could_not_write_its_answer_may_next_time(program):
    end = run_child(program(f"sys.exit({PASSING})"), [], timeout_s=60)
    assert (end.ending, end.lasts) == ("crashed", False)


def test_a_child_that_is_not_wanted_any_more_is_killed(program, tmp_path):
    stop, pid_file = threading.Event(), tmp_path / "pid"
    name = program(f"""
        open({str(pid_file)!r}, "w").write(str(os.getpid()))
        time.sleep(1000)
    """)

    def give_up() -> None:
        while not pid_file.exists() or not pid_file.read_text(encoding="utf-8"):
            time.sleep(0.05)
        stop.set()

    thread = threading.Thread(target=give_up)
    thread.start()
    end = run_child(name, [], timeout_s=60, stop=stop)
    thread.join()
    assert (end.ending, end.reason, end.lasts) == ("not run", "it was interrupted", False)
    assert not psutil.pid_exists(int(pid_file.read_text(encoding="utf-8")))


def test_one_that_not_even_dies_is_left(program, monkeypatch):
    # As a process is that hangs in a driver.
    kill = subprocess.Popen.kill
    late: list[subprocess.Popen[bytes]] = []

    def spare(self: subprocess.Popen[bytes]) -> None:
        late.append(self)

    monkeypatch.setattr(subprocess.Popen, "kill", spare)
    monkeypatch.setattr(psutil.Process, "kill", lambda self: None)
    monkeypatch.setattr(child, "_DYING_S", 0.1)
    end = run_child(program("time.sleep(1000)"), [], timeout_s=0.5)
    assert end.ending == "timed out"
    (process,) = late
    kill(process)
    process.wait()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signal that ends at once")
def test_a_child_ends_with_the_process_that_started_it(program, tmp_path):
    name = program("""
        from pathlib import Path
        from phirt.devices.child import end_with_parent
        folder = Path(sys.argv[-1]).parent
        end_with_parent(folder)
        Path(sys.argv[1]).write_text(f"{os.getpid()} {folder}")
        time.sleep(1000)
    """)
    told = tmp_path / "told"
    source = "import sys; from phirt.devices.child import run_child; "
    source += f"run_child({name!r}, [{str(told)!r}], timeout_s=60)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen([sys.executable, "-c", source], env=environment) as parent:
        wait_for(lambda: told.exists() and " " in told.read_text(encoding="utf-8"))
        parent.kill()
    number, folder = told.read_text(encoding="utf-8").split(" ", 1)
    wait_for(lambda: not Path(folder).exists())
    wait_for(lambda: not psutil.pid_exists(int(number)))


def test_what_it_leaves_for_later_is_removed(program):
    name = program("""
        import tempfile
        left = tempfile.mkdtemp()
        open(sys.argv[-1], "w").write(left)
    """)
    assert not Path(run_child(name, [], timeout_s=60).answer).exists()


def test_it_is_started_from_a_folder_that_was_removed(program, tmp_path, monkeypatch):
    name, gone = program(ANSWER), tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    monkeypatch.syspath_prepend("")
    try:
        gone.rmdir()
    except OSError:
        pytest.skip("here a folder that is in use cannot be removed")
    assert run_child(name, [], timeout_s=60).ending == "answered"


def test_an_answer_may_be_of_the_moment(program):
    end = run_child(program(ANSWER + f"sys.exit({PASSING})"), [], timeout_s=60)
    assert (end.ending, end.answer, end.lasts) == ("answered", "answer", False)


def test_a_late_child_is_killed_with_what_it_started(program, tmp_path):
    pid_file = tmp_path / "pid"
    name = program(f"""
        helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
        open({str(pid_file)!r}, "w").write(str(helper.pid))
        time.sleep(1000)
    """)
    started = time.monotonic()
    end = run_child(name, [], timeout_s=3)
    assert (end.ending, end.reason) == ("timed out", "gave no answer within 3 s")
    assert time.monotonic() - started < 15
    helper = int(pid_file.read_text(encoding="utf-8"))
    assert not psutil.pid_exists(helper) or psutil.Process(helper).status() == "zombie"


def test_it_finds_what_this_process_finds_and_not_what_lies_in_the_folder(
    program, tmp_path, monkeypatch
):
    name = program("import json, found_by_path\n" + ANSWER)
    (tmp_path / "found_by_path.py").touch()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "json.py").write_text("raise ImportError('planted')", encoding="utf-8")
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert run_child(name, [], timeout_s=60).ending == "answered"


def test_it_is_offline_and_has_a_store_of_its_own(program):
    name = program("""
        keys = ("HF_HUB_OFFLINE", "PHIRT_HOME", "EXTRA")
        open(sys.argv[-1], "w").write("\\n".join(os.environ[key] for key in keys))
    """)
    end = run_child(name, [], timeout_s=60, environment={"EXTRA": "one more"})
    offline, home, extra = end.answer.splitlines()
    assert (offline, extra) == ("1", "one more")
    assert home != os.environ["PHIRT_HOME"]
    assert not Path(home).parent.exists()


class TestWhereNoProcessCanBeStarted:
    def test_a_child_starts_none_of_its_own(self, monkeypatch):
        monkeypatch.setenv(CHILD, "1")
        end = run_child("anything", [], timeout_s=60)
        assert (end.ending, end.reason) == (
            "not run",
            "this process was itself started to look for devices",
        )

    def test_nor_does_a_frozen_application(self, monkeypatch):
        # It would be started once more, instead of a Python.
        monkeypatch.setattr(sys, "frozen", True, raising=False)
        assert run_child("anything", [], timeout_s=60).ending == "not run"

    @pytest.mark.parametrize("executable", ["", "/opt/editor/bin/editor"])
    def test_nor_one_that_embeds_python(self, monkeypatch, executable):
        monkeypatch.setattr(sys, "executable", executable)
        assert run_child("anything", [], timeout_s=60).ending == "not run"

    def test_nor_a_system_that_refuses(self, monkeypatch, tmp_path):
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python-that-was-removed"))
        end = run_child("anything", [], timeout_s=60)
        assert end.ending == "not run"
        assert end.reason.startswith("no process could be started: ")

    def test_an_interruption_kills_it(self, program, monkeypatch):
        started: list[subprocess.Popen[bytes]] = []
        wait = subprocess.Popen.wait

        def interrupted(self, timeout=None):
            if not started:
                started.append(self)
                raise KeyboardInterrupt
            return wait(self, timeout)

        monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_child(program("time.sleep(1000)"), [], timeout_s=60)
        assert started[0].returncode is not None


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0xC000001D, "crashed with 0xC000001D: an instruction that this processor does not have"),
        (-1073741795, "crashed with 0xC000001D: an instruction that this processor does not have"),
        (0xC0000005, "crashed with 0xC0000005: memory that is not there was accessed"),
        (0xC0000135, "crashed with 0xC0000135: a DLL that it needs was not found"),
        (0xC0001234, "crashed with 0xC0001234: a fault that phirt has no words for"),
        (3, "ended with exit status 3 and without an answer"),
    ],
)
def test_exit_codes_of_windows_in_words(code, words):
    assert describe_exit(code, windows=True) == words


def test_a_signal_without_a_name_keeps_its_number():
    assert describe_exit(-127, windows=False) == (
        "crashed with signal 127: it was ended by a signal"
    )
