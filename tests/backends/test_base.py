"""What every adapter inherits."""

import threading
import time
import weakref

import pytest

from phirt.backends.base import BaseSession
from phirt.backends.execution import InTurn
from phirt.errors import (
    BackendRuntimeError,
    ContextLengthError,
    SessionClosedError,
)
from tests.fakes import FakeModel


@pytest.fixture
def model():
    return FakeModel(vocab=8)


def session_of(model, max_length=8):
    return model.new_session(max_length=max_length, expected_length=max_length)


def test_length_counts_what_was_appended(model):
    session = session_of(model)
    session.prefill([1, 2, 3])
    session.decode(4)
    session.verify([5, 6])
    assert session.length == 6
    session.truncate(2)
    assert session.length == 2


def test_shapes(model):
    session = session_of(model)
    assert session.prefill([1, 2, 3]).numpy().shape == (1, 8)
    assert session.decode(4).numpy().shape == (1, 8)
    assert session.verify([5, 6]).numpy().shape == (2, 8)


@pytest.mark.parametrize("length", [-1, 4])
def test_truncating_to_what_is_not_there(model, length):
    session = session_of(model)
    session.prefill([1, 2, 3])
    with pytest.raises(ValueError, match="Cannot truncate"):
        session.truncate(length)


def test_no_tokens(model):
    with pytest.raises(ValueError, match="no tokens"):
        session_of(model).prefill([])


def test_more_than_it_was_made_for(model):
    session = session_of(model, max_length=3)
    session.prefill([1, 2])
    with pytest.raises(ContextLengthError) as caught:
        session.prefill([3, 4])
    assert (caught.value.required, caught.value.available) == (4, 3)
    session.decode(3)  # refused before anything ran, so the session goes on


def test_a_failed_call_closes_the_session_to_everything_but_close():
    model = FakeModel(fail_at=2)
    session = session_of(model)
    session.prefill([1])
    with pytest.raises(BackendRuntimeError):
        session.decode(2)
    with pytest.raises(SessionClosedError, match="failed"):
        session.decode(2)
    session.close()
    assert model.sessions_open == 0


def test_closing_twice_frees_once(model):
    session = session_of(model)
    session.close()
    session.close()
    assert model.sessions_open == 0
    with pytest.raises(SessionClosedError, match="closed"):
        session.prefill([1])


def test_an_interrupted_session_stays_interrupted(model):
    session = session_of(model)
    session.interrupt()
    session.interrupt()
    with pytest.raises(SessionClosedError, match="interrupted"):
        session.prefill([1])


@pytest.mark.parametrize("token", [-1, 8])
def test_a_token_outside_the_vocabulary_changes_nothing(model, token):
    session = session_of(model)
    session.prefill([1])
    for call in (session.prefill, session.verify):
        with pytest.raises(ValueError, match="from 0 to 7"):
            call([2, token])
    with pytest.raises(ValueError, match="from 0 to 7"):
        session.decode(token)
    session.decode(2)
    assert session.length == 2


def test_a_session_that_cannot_go_back_is_closed_to_everything_but_close(model, monkeypatch):
    session = session_of(model)
    session.prefill([1, 2])

    def fail(length):
        raise BackendRuntimeError("half way")

    monkeypatch.setattr(session, "_truncate", fail)
    with pytest.raises(BackendRuntimeError):
        session.truncate(1)
    with pytest.raises(SessionClosedError, match="failed"):
        session.decode(3)


def test_an_empty_cache_is_taken_over_by_an_empty_session(model):
    cache = session_of(model).export_kv()
    session = session_of(model)
    session.import_kv(cache)
    assert session.prefill([1]).numpy().shape == (1, 8)


def test_an_interruption_never_meets_a_session_that_is_being_closed(model, monkeypatch):
    """Else it would reach what is freed, and a second close() would free it again."""
    session = session_of(model)
    order = []
    closed = threading.Event()

    def close_and_tell():
        session.close()
        closed.set()

    close = threading.Thread(target=close_and_tell)

    def interrupt():
        close.start()
        closed.wait(timeout=0.3)
        order.append("interrupted")

    monkeypatch.setattr(session, "_interrupt", interrupt)
    monkeypatch.setattr(session, "_free", lambda: order.append("freed"))
    session.interrupt()
    close.join(timeout=30)
    session.close()
    assert order == ["interrupted", "freed"]


def test_a_session_that_cannot_be_freed_does_not_hold_the_weights(model, monkeypatch):
    session = session_of(model)

    def fail():
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "_free", fail)
    with pytest.raises(KeyboardInterrupt):
        session.close()
    model.close()
    assert model.unloaded


def test_a_garbage_collection_while_a_session_opens_may_close_another(model):
    first = session_of(model)

    class Collecting(weakref.WeakSet[BaseSession]):
        def add(self, item):
            first.close()
            super().add(item)

    sessions = Collecting()
    sessions.update([first])
    model._open_sessions = sessions
    opened = []
    thread = threading.Thread(target=lambda: opened.append(session_of(model)), daemon=True)
    thread.start()
    thread.join(timeout=10)
    assert len(opened) == 1


def test_a_model_that_is_closed_while_a_session_waits_its_turn_says_so():
    model = FakeModel(execution=InTurn())
    caught = []

    def open_session():
        with pytest.raises(SessionClosedError, match="model is closed"):
            session_of(model)
        caught.append(True)

    held, release = threading.Event(), threading.Event()

    def hold():
        held.set()
        release.wait(timeout=30)

    holder = threading.Thread(target=model.execution.run, args=(hold,))
    holder.start()
    held.wait(timeout=30)
    opener = threading.Thread(target=open_session)
    opener.start()
    time.sleep(0.1)
    model._closed = True
    release.set()
    opener.join(timeout=30)
    holder.join(timeout=30)
    assert caught
    assert model.sessions_opened == 0
