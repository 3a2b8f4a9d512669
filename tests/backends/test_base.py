"""What every adapter inherits."""

import sys

import pytest

from phirt.backends.base import import_runtime
from phirt.errors import (
    BackendBrokenError,
    BackendNotInstalledError,
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


class TestImportRuntime:
    def test_missing(self):
        with pytest.raises(BackendNotInstalledError, match=r"phirt\[some-extra\]") as caught:
            import_runtime("no_such_runtime_xyz", backend="b", extra="some-extra")
        assert isinstance(caught.value, ImportError)

    @pytest.mark.parametrize(
        "body",
        ["import a_module_that_it_lacks", "raise OSError('libcuda.so: no such file')", "1/0"],
        ids=["lacks-a-dependency", "missing-library", "any-exception"],
    )
    def test_installed_and_broken_is_not_missing(self, tmp_path, monkeypatch, body):
        (tmp_path / "broken_runtime_xyz.py").write_text(body)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "broken_runtime_xyz", raising=False)
        with pytest.raises(BackendBrokenError, match="broken_runtime_xyz") as caught:
            import_runtime("broken_runtime_xyz", backend="b", extra="e")
        assert caught.value.__cause__ is not None
