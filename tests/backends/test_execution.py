"""Calls run where and when a runtime needs them, whichever thread makes them."""

import threading

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


def test_an_interrupted_wait_is_raised_once_the_call_has_ended(one_thread):
    class Interrupted(KeyboardInterrupt):
        pass

    ended = threading.Event()
    release = threading.Event()
    main = threading.get_ident()

    def call():
        import ctypes

        # As Ctrl-C does: an exception thrown into the thread that waits.
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(main), ctypes.py_object(Interrupted)
        )
        release.wait(0.2)
        ended.set()

    with pytest.raises(Interrupted):
        one_thread.run(call)
    assert ended.is_set()


def test_after_close_there_is_nothing_to_run_on():
    execution = OneThread("phirt-test")
    execution.close()
    execution.close()
    with pytest.raises(SessionClosedError):
        execution.run(int)
    assert "phirt-test" not in [thread.name for thread in threading.enumerate()]


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
