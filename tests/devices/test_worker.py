"""A process that answers one request after another, and may crash or hang at any of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from phirt.devices.child import CHILD
from phirt.devices.worker import Worker, WorkerEndedError

ECHO = """
    print("a banner", flush=True)
    for request, answer in requests():
        answer(f"{os.getpid()} {request}")
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts a worker that runs a program."""
    started = []

    def start(source: str) -> Worker:
        (tmp_path / "worker_program.py").write_text(
            "import os, signal, sys, time\nfrom phirt.devices.worker import requests\n"
            + textwrap.dedent(source),
            encoding="utf-8",
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        started.append(Worker("worker_program", environment={"PHIRT_TEST_WORD": "wörd"}))
        return started[-1]

    yield start
    for worker in started:
        worker.close(kill=True)


def test_one_process_answers_several_requests_whatever_it_prints(start):
    worker = start(ECHO)
    first, second = (worker.ask(word, timeout_s=60).split(" ", 1) for word in ("ein wörd", "two"))
    assert (first[1], second[1]) == ("ein wörd", "two")
    assert first[0] == second[0]
    worker.close()
    assert not psutil.pid_exists(int(first[0]))
    worker.close()


def test_it_has_the_variables_that_are_set_for_it(start):
    source = "for _, answer in requests():\n    answer(os.environ['PHIRT_TEST_WORD'])\n"
    assert start(source).ask("", timeout_s=60) == "wörd"


def test_how_it_crashed_is_in_the_error(start):
    worker = start(
        "for _, answer in requests():\n"
        "    print('no such driver', flush=True)\n"
        "    signal.raise_signal(signal.SIGABRT) if os.name == 'posix' else os._exit(3)\n"
    )
    with pytest.raises(WorkerEndedError, match=r"no such driver$") as raised:
        worker.ask("", timeout_s=60)
    if hasattr(signal, "SIGKILL"):
        assert str(raised.value).startswith("crashed with SIGABRT: it aborted itself")
    with pytest.raises(WorkerEndedError, match="was closed"):
        worker.ask("", timeout_s=60)


def test_one_that_ends_before_it_reads_is_told_too(start):
    worker = start("sys.exit('it does not like it here')")
    with pytest.raises(WorkerEndedError, match=r"exit status 1 .* does not like it here"):
        worker.ask("x" * 1_000_000, timeout_s=60)


def test_one_that_hangs_is_killed(start):
    worker = start(
        "for request, answer in requests():\n"
        "    answer(str(os.getpid())) if request else time.sleep(1000)\n"
    )
    pid = int(worker.ask("who", timeout_s=60))
    started = time.perf_counter()
    with pytest.raises(WorkerEndedError, match=r"gave no answer within 0\.2 s"):
        worker.ask("", timeout_s=0.2)
    assert time.perf_counter() - started < 20
    assert not psutil.pid_exists(pid)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signal that ends at once")
@pytest.mark.parametrize("work", ["pass", "time.sleep(1000)"], ids=["waiting", "at work"])
def test_it_ends_with_the_process_that_started_it_and_leaves_nothing(tmp_path, work):
    told = tmp_path / "told"
    (tmp_path / "orphan.py").write_text(
        "import os, sys, time\nfrom phirt.devices.worker import requests\n"
        "for request, answer in requests():\n"
        "    answer(f'{os.getpid()} {sys.argv[1]}')\n"
        f"    {work}\n",
        encoding="utf-8",
    )
    source = (
        "import pathlib, time; from phirt.devices.worker import Worker; worker = Worker('orphan'); "
        f"pathlib.Path({str(told)!r}).write_text(worker.ask('', timeout_s=60)); time.sleep(1000)"
    )
    path = os.pathsep.join(filter(None, [str(tmp_path), *sys.path]))
    environment = os.environ | {"PYTHONPATH": path}
    with subprocess.Popen([sys.executable, "-c", source], env=environment) as parent:
        wait_for(lambda: told.exists() and " " in told.read_text(encoding="utf-8"))
        parent.kill()
    number, folder = told.read_text(encoding="utf-8").split(" ", 1)
    wait_for(lambda: not psutil.pid_exists(int(number)))
    assert not Path(folder).exists()


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_process_that_was_started_to_answer_starts_none(monkeypatch):
    monkeypatch.setenv(CHILD, "1")
    with pytest.raises(WorkerEndedError, match="itself started"):
        Worker("worker_program")
