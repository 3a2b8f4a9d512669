"""Faults around a running model: threads, signals, forks, memory. Rows L1 to L4, L8, L9."""

from __future__ import annotations

import _thread
import gc
import multiprocessing
import subprocess
import sys
import threading
import time
from typing import Any

import psutil
import pytest

import phirt

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS binds on Linux only")


def test_eight_threads_on_one_model(tiny_model):
    """Row L1: each output is what it is alone."""
    prompts = [f"hello World {'the ' * index}" for index in range(8)]
    alone = [tiny_model.generate(p, max_new_tokens=60).token_ids for p in prompts]
    together: list[list[int] | None] = [None] * 8

    def run(index):
        together[index] = tiny_model.generate(prompts[index], max_new_tokens=60).token_ids

    threads = [threading.Thread(target=run, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert together == alone


def test_500_streams_dropped_or_closed_leak_nothing(tiny_model):
    """Row L2: no thread, descriptor or memory."""
    process = psutil.Process()

    def handles():
        return process.num_handles() if sys.platform == "win32" else process.num_fds()

    def start_and_leave(index):
        stream = tiny_model.stream("hello", max_new_tokens=50)
        next(stream)
        if index % 3 == 0:
            stream.close()
        elif index % 3 == 1:
            closer = threading.Thread(target=stream.close)
            closer.start()
            closer.join()

    for index in range(20):
        start_and_leave(index)
    gc.collect()
    before = (process.num_threads(), handles(), process.memory_info().rss)
    for index in range(500):
        start_and_leave(index)
    gc.collect()
    assert process.num_threads() == before[0]
    assert handles() == before[1]
    assert process.memory_info().rss < before[2] + 20_000_000


def test_closing_from_another_thread_frees_within_a_step(tiny_model):
    """Row L2: the reader stops, and close() returns with the session freed."""
    started = threading.Event()
    seen = []

    def slow(token_ids, logits):
        started.set()
        time.sleep(0.01)
        return logits

    stream = tiny_model.stream(
        "hello", max_new_tokens=2000, ignore_eos=True, logits_processors=[slow]
    )
    reader = threading.Thread(target=lambda: seen.extend(stream))
    reader.start()
    started.wait(timeout=30)
    stream.close()
    reader.join(timeout=30)
    assert not reader.is_alive()
    assert stream.result.finish_reason == "cancelled"
    assert len(seen) < 2000


def test_ctrl_c_in_the_middle_of_generate(tiny_model):
    """Row L3: a clean raise, and the next call works."""
    started = threading.Event()

    def slow(token_ids, logits):
        started.set()
        time.sleep(0.005)
        return logits

    def interrupt():
        started.wait(timeout=30)
        _thread.interrupt_main()

    expected = tiny_model.generate("hello", max_new_tokens=10).token_ids
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        tiny_model.generate("hello", max_new_tokens=2000, ignore_eos=True, logits_processors=[slow])
    thread.join(timeout=30)
    assert tiny_model.generate("hello", max_new_tokens=10).token_ids == expected


def _child_generates(model, connection):
    try:
        model.generate("hello", max_new_tokens=3)
    except phirt.BackendRuntimeError as error:
        connection.send(str(error))
    else:
        connection.send("no error")


def _child_exits(model, connection):
    connection.send("exits")


@POSIX
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("work", "expected"), [(_child_generates, "forked from it"), (_child_exits, "exits")]
)
def test_fork(tiny_model, work, expected):
    """Row L4: a typed error in the child, which then ends by itself; the parent works."""
    before = tiny_model.generate("hello", max_new_tokens=10).token_ids
    context: Any = multiprocessing.get_context("fork")  # which typeshed lacks for Windows
    ours, theirs = context.Pipe()
    child = context.Process(target=work, args=(tiny_model, theirs))
    child.start()
    assert ours.poll(timeout=60), "the child hangs"
    assert expected in ours.recv()
    child.join(timeout=60)
    assert child.exitcode == 0
    assert tiny_model.generate("hello", max_new_tokens=10).token_ids == before


_FORK = """
import os, sys, time, warnings
import phirt

warnings.simplefilter("ignore", DeprecationWarning)
model = phirt.load(sys.argv[1], threads=2)
stream = model.stream("hello", max_new_tokens=5)
next(stream)
child = os.fork()
if child == 0:
    if sys.argv[2] == "closes":
        stream.close()
        model.close()
    sys.exit(7)  # tears the interpreter down, which multiprocessing's children do not
deadline = time.monotonic() + 30
while time.monotonic() < deadline:
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        print(os.waitstatus_to_exitcode(status), len(list(stream)))
        break
    time.sleep(0.01)
else:
    os.kill(child, 9)
    print("the child hangs")
"""


@POSIX
@pytest.mark.parametrize("child", ["exits", "closes"])
def test_a_forked_child_ends_like_any_process(tiny_model, child):
    """Row L4: freeing the model in the child does not wait for threads that are not there."""
    run = subprocess.run(
        [sys.executable, "-c", _FORK, str(tiny_model.path), child],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.stdout.split() == ["7", "4"], run.stdout + run.stderr


def test_a_processor_that_raises(tiny_model):
    """Row L8: unchanged, and the next call works."""

    class MineError(Exception):
        pass

    error = MineError("mine")

    def broken(token_ids, logits):
        raise error

    with pytest.raises(MineError) as caught:
        tiny_model.generate("hello", logits_processors=[broken])
    assert caught.value is error
    assert tiny_model.generate("hello", max_new_tokens=2).token_ids


_OUT_OF_MEMORY = """
import resource, sys
import psutil
import phirt

model = phirt.load()
model.generate("Hello", max_new_tokens=2)
used = psutil.Process().memory_info().vms
resource.setrlimit(resource.RLIMIT_AS, (used + 100_000_000, resource.RLIM_INFINITY))
for prompt in ([1] * 6000, [1] * 2500):
    try:
        model.generate(prompt, max_new_tokens=1)
    except phirt.OutOfMemoryError as error:
        print("refused:", error)
print("then:", len(model.generate("Hello", max_new_tokens=2).token_ids))
"""


@LINUX
@pytest.mark.model
@pytest.mark.usefixtures("smollm2")
def test_an_allocation_that_fails():
    """Row L9: a typed error, and then a small call works."""
    run = subprocess.run(
        [sys.executable, "-c", _OUT_OF_MEMORY],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("refused: Out of memory")
    assert run.stdout.splitlines()[-1] == "then: 2"
