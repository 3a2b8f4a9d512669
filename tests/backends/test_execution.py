"""Calls run where and when a runtime needs them, whichever thread makes them."""

import gc
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from phirt.backends.execution import InTurn, OneThread, Parallel
from phirt.errors import SessionClosedError
from tests.fakes import FakeModel


@pytest.fixture
def one_thread():
    execution = OneThread("phirt-test")
    yield execution
    execution.close()


def in_threads(count, work):
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_results_and_exceptions_reach_the_caller(one_thread):
    for execution in (Parallel(), InTurn(), one_thread):
        assert execution.run(divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            execution.run(divmod, 7, 0)


def test_one_thread_is_one_thread_for_every_caller(one_thread):
    seen = set()
    in_threads(8, lambda: seen.add(one_thread.run(threading.current_thread)))
    assert [thread.name for thread in seen] == ["phirt-test"]


def test_a_call_from_within_does_not_wait_for_itself(one_thread):
    for execution in (InTurn(), one_thread):
        assert execution.run(lambda e=execution: e.run(lambda: 5)) == 5


def test_calls_in_turn_never_overlap(one_thread):
    for execution in (InTurn(), one_thread):
        inside: list[int] = []
        most: list[int] = []

        def work(execution=execution, inside=inside, most=most):
            def call():
                inside.append(1)
                most.append(len(inside))
                threading.Event().wait(0.005)
                inside.pop()

            execution.run(call)

        in_threads(6, work)
        assert max(most) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signal for a thread")
@pytest.mark.parametrize("outcome", ["result", "error"])
def test_an_interrupted_wait_is_raised_once_the_call_has_ended(one_thread, outcome):
    class Interrupted(KeyboardInterrupt):
        pass

    main = threading.get_ident()
    interrupted = threading.Event()
    ended = threading.Event()

    def interrupt(signum, frame):
        if not interrupted.is_set():
            interrupted.set()
            raise Interrupted

    def call():
        while sys._current_frames()[main].f_code is not threading.Condition.wait.__code__:
            time.sleep(0.001)  # It does not wait yet.
        # As Ctrl-C does: a signal wakes the thread that waits, other than an exception that is
        # thrown into it, which it meets only after the wait. One that comes in the moment before
        # the thread sleeps does not wake it.
        while not interrupted.wait(timeout=0.05):
            if sys.platform != "win32":  # for mypy
                signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.05)  # The interruption is in run now, and the call goes on.
        ended.set()
        return 1 // (outcome == "result")

    previous = signal.signal(signal.SIGINT, interrupt)
    try:
        with pytest.raises(Interrupted) as caught:
            one_thread.run(call)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert ended.is_set()
    assert isinstance(caught.value.__cause__, ZeroDivisionError) == (outcome == "error")


class Interrupting:
    """A queue whose ``put`` is interrupted, before or after it has put."""

    def __init__(self, calls, *, before=None, after=None):
        self.calls, self.before, self.after = calls, before, after

    def put(self, item):
        for interrupt in (self.before, lambda: self.calls.put(item), self.after):
            if interrupt is not None:
                interrupt()


def interrupt():
    raise KeyboardInterrupt


class TestAnInterruptionWhileTheCallIsAskedFor:
    """It may come on either side of the moment at which the call is the thread's."""

    def test_before_it_the_call_is_never_made(self, one_thread):
        calls = one_thread._calls
        made: list[int] = []
        one_thread._calls = Interrupting(calls, before=interrupt)
        with pytest.raises(KeyboardInterrupt):
            one_thread.run(made.append, 1)
        one_thread._calls = calls
        assert one_thread.run(len, made) == 0

    def test_a_call_that_has_not_begun_is_taken_back(self, one_thread):
        calls = one_thread._calls
        made: list[int] = []
        begun, go_on = threading.Event(), threading.Event()

        def busy():
            begun.set()
            assert go_on.wait(timeout=30)

        other = threading.Thread(target=one_thread.run, args=(busy,))
        other.start()
        assert begun.wait(timeout=30)
        one_thread._calls = Interrupting(calls, after=interrupt)
        with pytest.raises(KeyboardInterrupt):
            one_thread.run(made.append, 1)
        one_thread._calls = calls
        go_on.set()
        other.join()
        assert one_thread.run(len, made) == 0

    @pytest.mark.parametrize("outcome", ["result", "error"])
    def test_a_call_that_has_begun_is_waited_for(self, one_thread, outcome):
        calls = one_thread._calls
        begun, ended = threading.Event(), threading.Event()

        def call():
            begun.set()
            time.sleep(0.05)
            ended.set()
            return 1 // (outcome == "result")

        def interrupt_the_call():
            assert begun.wait(timeout=30)
            raise KeyboardInterrupt

        one_thread._calls = Interrupting(calls, after=interrupt_the_call)
        with pytest.raises(KeyboardInterrupt) as caught:
            one_thread.run(call)
        one_thread._calls = calls
        assert ended.is_set()
        assert isinstance(caught.value.__cause__, ZeroDivisionError) == (outcome == "error")


def test_after_close_there_is_nothing_to_run_on():
    execution = OneThread("phirt-test")
    execution.close()
    execution.close()
    with pytest.raises(SessionClosedError):
        execution.run(int)
    assert "phirt-test" not in [thread.name for thread in threading.enumerate()]


def test_the_thread_says_goodbye_as_it_ends():
    seen = []
    execution = OneThread("phirt-test", at_end=lambda: seen.append(threading.current_thread().name))
    execution.run(int)
    execution.close()
    assert seen == ["phirt-test"]


def test_a_thread_that_nobody_closed_ends_when_its_owner_is_collected():
    ended = threading.Event()
    execution = OneThread("phirt-test", at_end=ended.set)
    execution.run(int)
    del execution
    gc.collect()
    assert ended.wait(timeout=30)


def test_a_garbage_collection_inside_may_make_a_call(one_thread):
    """As the destructor of a stream does, which frees its session."""

    class Queue:
        def __init__(self, calls):
            self.calls = calls
            self.collected = False

        def put(self, item):
            if not self.collected:
                self.collected = True
                assert one_thread.run(lambda: 5) == 5
            self.calls.put(item)

    one_thread._calls = Queue(one_thread._calls)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(one_thread.run(lambda: 6)), daemon=True)
    thread.start()
    thread.join(timeout=10)
    assert answers == [6]


class TestTheInterpretersExit:
    """A thread that comes back from native code while Python goes away takes the process along."""

    def script(self, tmp_path, body):
        path = tmp_path / "exit.py"
        path.write_text(
            "import ctypes, threading, time\n"
            "from phirt.backends.execution import InTurn, OneThread, Parallel\n"
            + textwrap.dedent(body)
        )
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, path], capture_output=True, text=True, timeout=60, check=False
        )
        return done, time.monotonic() - started

    @pytest.mark.parametrize("execution", ["Parallel()", "InTurn()", "OneThread('phirt-test')"])
    def test_waits_for_the_call_of_a_daemon_and_begins_no_other(self, tmp_path, execution):
        done, _ = self.script(
            tmp_path,
            f"""
            execution = {execution}

            def call():
                print("began", flush=True)
                time.sleep(0.5)
                print("ended", flush=True)

            def work():
                while True:
                    execution.run(call)

            threading.Thread(target=work, daemon=True).start()
            time.sleep(0.2)
            """,
        )
        assert done.stderr == ""
        assert done.returncode == 0
        assert done.stdout.split() == ["began", "ended"]

    def test_a_call_that_does_not_end_is_not_waited_for_for_ever(self, tmp_path):
        done, elapsed = self.script(
            tmp_path,
            """
            from phirt.backends import at_exit
            at_exit._LONGEST_WAIT_S = 0.2
            threading.Thread(target=Parallel().run, args=(time.sleep, 50), daemon=True).start()
            time.sleep(0.2)
            """,
        )
        assert done.returncode == 0
        assert elapsed < 30

    @pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
    def test_a_forked_child_does_not_wait_for_the_threads_of_its_parent(self, tmp_path):
        done, _ = self.script(
            tmp_path,
            """
            import os, sys
            threading.Thread(target=Parallel().run, args=(time.sleep, 1), daemon=True).start()
            time.sleep(0.2)
            child = os.fork()
            if child == 0:
                started = time.monotonic()
                from phirt.backends import at_exit
                at_exit._wait()
                os._exit(time.monotonic() - started > 0.5)
            sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            """,
        )
        assert done.returncode == 0, done.stderr

    def test_what_is_closed_after_it_began_is_left_to_the_system(self, tmp_path):
        done, _ = self.script(
            tmp_path,
            """
            import atexit
            from phirt.backends import at_exit
            from phirt.errors import SessionClosedError
            execution = OneThread("phirt-test")

            def late():
                execution.close()
                try:
                    OneThread("another").run(int)
                except SessionClosedError:
                    print("refused")

            at_exit._wait()
            late()
            """,
        )
        assert done.stdout.split() == ["refused"]
        assert done.returncode == 0


class TestAModelOnOneThread:
    def test_every_call_of_a_session_is_made_there(self):
        names = set()

        def rule(ids):
            names.add(threading.current_thread().name)
            return [0.0] * 8

        with_thread = FakeModel(rule, execution=OneThread("phirt-owner"))
        session = with_thread.new_session(max_length=8, expected_length=8)
        session.prefill([1, 2])
        session.decode(3)
        session.close()
        with_thread.close()
        assert names == {"phirt-owner"}
        assert with_thread.unloaded

    def test_the_weights_stay_until_the_last_session_has_ended(self):
        model = FakeModel(execution=OneThread("phirt-owner"))
        session = model.new_session(max_length=8, expected_length=8)
        model.close()
        session.prefill([1, 2])
        assert not model.unloaded
        with pytest.raises(SessionClosedError):
            model.new_session(max_length=8, expected_length=8)
        session.close()
        assert model.unloaded
