"""Sessions beside each other: in turn, on several threads, interrupted, closed, forked."""

from __future__ import annotations

import gc
import mmap
import multiprocessing
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest

from phirt.errors import PhirtError, SessionClosedError
from phirt.testing.subject import Subject, random_ids

__all__ = ["LifetimeConformance", "ThreadConformance"]

_T = TypeVar("_T")

_FIRST = 36
_STEPS = 12
_PATIENCE = 120  # seconds until a thread or a child counts as hanging

_HAS_FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


class ThreadConformance:
    """Concurrency is declared; callers may use any threads all the same."""

    def test_two_sessions_in_turn(self, subject: Subject) -> None:
        """A step of one leaves the other as it was."""
        prompts = [random_ids(_FIRST + _STEPS, seed=seed) for seed in (1, 2)]
        with subject.session(64) as one, subject.session(64) as other:
            sessions = (one, other)
            for session, ids in zip(sessions, prompts, strict=True):
                session.prefill(ids[:_FIRST])
            for index in range(_FIRST, _FIRST + _STEPS):
                for number, (session, ids) in enumerate(zip(sessions, prompts, strict=True)):
                    expected = subject.oracle.logits(ids)[index : index + 1]
                    what = f"session {number + 1} of 2 in turn, token {index + 1}"
                    subject.assert_logits(session.decode(ids[index]), expected, what)

    def test_closing_one_of_two(self, subject: Subject) -> None:
        """The other goes on."""
        ids = random_ids(_FIRST + 2, seed=3)
        with subject.session(64) as one, subject.session(64) as other:
            one.prefill(random_ids(_FIRST, seed=4))
            other.prefill(ids[:_FIRST])
            one.close()
            for index in (_FIRST, _FIRST + 1):
                expected = subject.oracle.logits(ids)[index : index + 1]
                subject.assert_logits(other.decode(ids[index]), expected, "beside a closed session")

    def test_concurrency_is_declared(self, subject: Subject) -> None:
        """In one of three words."""
        found = subject.model.concurrency
        subject.check(found in {"parallel", "serial", "owner"}, f"concurrency is {found!r}")

    def test_sessions_on_several_threads(self, subject: Subject) -> None:
        """Four threads at once, one session each: the answers are those of each alone."""
        prompts = [random_ids(_FIRST + _STEPS, seed=10 + number) for number in range(4)]
        for ids in prompts:
            subject.oracle.logits(ids)  # Known before, so that the threads only read.
        barrier = threading.Barrier(len(prompts))

        def run(ids: list[int]) -> None:
            with subject.session(64) as session:
                barrier.wait(timeout=_PATIENCE)
                session.prefill(ids[:_FIRST])
                for index in range(_FIRST, len(ids)):
                    expected = subject.oracle.logits(ids)[index : index + 1]
                    what = f"one of four threads, token {index + 1}"
                    subject.assert_logits(session.decode(ids[index]), expected, what)

        _on_threads([partial(run, ids) for ids in prompts])

    def test_a_session_that_moves_between_threads(self, subject: Subject) -> None:
        """Made on one thread, used on others, closed on another."""
        ids = random_ids(_FIRST + 3, seed=20)
        expected = subject.oracle.logits(ids)
        session = subject.model.new_session(max_length=64, expected_length=64)
        _on_threads([lambda: session.prefill(ids[:_FIRST])])
        for index in range(_FIRST, len(ids)):
            (logits,) = _on_threads([partial(session.decode, ids[index])])
            subject.assert_logits(logits, expected[index : index + 1], "on a thread of its own")
        _on_threads([session.close])

    def test_a_model_outlives_the_thread_that_loaded_it(self, one_subject: Subject) -> None:
        """Loading on a thread that ends leaves a model that works."""
        subject = one_subject
        (model,) = _on_threads([subject.reload])
        ids = random_ids(_FIRST, seed=21)
        with subject.session(64, model=model) as session:
            expected = subject.oracle.logits(ids)[-1:]
            subject.assert_logits(session.prefill(ids), expected, "loaded on a thread that ended")
        model.close()

    def test_interrupt(self, subject: Subject) -> None:
        """From another thread: the session ends within a step, and no other does."""
        if not subject.model.capabilities.interrupt:
            pytest.skip(f"declared lack: {subject.model.capabilities.lacks['interrupt'].reason}")
        ids = random_ids(_FIRST + 1, seed=22)
        started, interrupted, caught = threading.Event(), threading.Event(), list[BaseException]()
        with subject.session(100) as session, subject.session(64) as other:

            def decode_until_it_ends() -> None:
                session.prefill(ids[:_FIRST])
                started.set()
                try:
                    while session.length < 99:
                        session.decode(1)
                    interrupted.wait(timeout=_PATIENCE)
                    session.decode(1)
                except PhirtError as error:
                    caught.append(error)

            thread = threading.Thread(target=decode_until_it_ends)
            thread.start()
            started.wait(timeout=_PATIENCE)
            session.interrupt()
            interrupted.set()
            thread.join(timeout=_PATIENCE)
            subject.check(not thread.is_alive(), "an interrupted session goes on")
            subject.check(
                len(caught) == 1 and isinstance(caught[0], SessionClosedError),
                f"an interrupted session raised {caught}, not a SessionClosedError",
            )
            other.prefill(ids[:_FIRST])
            expected = subject.oracle.logits(ids)[-1:]
            subject.assert_logits(other.decode(ids[-1]), expected, "beside an interrupted session")


class LifetimeConformance:
    """What is closed is freed, and what is open stays."""

    def test_closing_the_model_before_a_session(self, one_subject: Subject) -> None:
        """The weights stay until the last session has ended; no new one begins."""
        subject, ids = one_subject, random_ids(_FIRST + 1, seed=30)
        model = subject.reload()
        with subject.session(64, model=model) as session:
            session.prefill(ids[:_FIRST])
            model.close()
            model.close()
            expected = subject.oracle.logits(ids)[-1:]
            subject.assert_logits(session.decode(ids[-1]), expected, "after the model was closed")
            with pytest.raises(SessionClosedError):
                model.new_session(max_length=64, expected_length=64)
        with pytest.raises(SessionClosedError):
            session.decode(1)

    def test_nothing_keeps_what_was_closed(self, one_subject: Subject) -> None:
        """A closed session and a closed model are garbage once nobody refers to them."""
        subject = one_subject
        model = subject.reload()
        session = model.new_session(max_length=64, expected_length=64)
        session.prefill(random_ids(_FIRST))
        watched: dict[str, weakref.ref[Any]] = {
            "session": weakref.ref(session),
            "model": weakref.ref(model),
        }
        session.close()
        model.close()
        del session, model
        gc.collect()
        alive = [name for name, reference in watched.items() if reference() is not None]
        subject.check(not alive, f"something still refers to the closed {' and '.join(alive)}")

    @pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
    def test_sessions_leak_no_memory(self, one_subject: Subject) -> None:
        """200 sessions one after the other take the memory of one."""
        subject, ids = one_subject, random_ids(_FIRST)

        def run(count: int) -> int:
            for _ in range(count):
                with subject.session(250) as session:
                    session.prefill(ids)
            gc.collect()
            return _resident_bytes()

        before = run(50)  # Allocators and thread pools settle.
        grown = run(200) - before
        # A cache of 250 tokens alone takes 128 kB in each of them: 25 MB if none were freed.
        subject.check(grown < 12_000_000, f"200 sessions left {grown / 1e6:.1f} MB")

    @_HAS_FORK
    @pytest.mark.parametrize("child", ["decodes", "opens", "exits"])
    def test_fork(self, one_subject: Subject, child: str) -> None:
        """In a forked child a call raises instead of hanging; the parent goes on (row L4)."""
        subject, ids = one_subject, random_ids(_FIRST + 1, seed=31)
        with subject.session(64) as session:
            session.prefill(ids[:_FIRST])
            work: dict[str, Callable[[], object]] = {
                "decodes": lambda: session.decode(1),
                "opens": lambda: subject.model.new_session(max_length=64, expected_length=64),
                "exits": lambda: "nothing",
            }
            answer = _in_a_child(work[child])
            wanted = "result" if child == "exits" else "PhirtError"
            subject.check(answer == wanted, f"a forked child that {child} ended with: {answer}")
            expected = subject.oracle.logits(ids)[-1:]
            subject.assert_logits(session.decode(ids[-1]), expected, "in the parent of a fork")


def _on_threads(works: list[Callable[[], _T]]) -> list[_T]:
    """Run each on a thread of its own, all at once; raises what the first of them raised."""
    results, errors = dict[int, _T](), list[BaseException]()

    def run(index: int) -> None:
        try:
            results[index] = works[index]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=_PATIENCE)
        if thread.is_alive():
            pytest.fail(f"a thread still runs after {_PATIENCE} seconds")
    if errors:
        raise errors[0]
    return [results[index] for index in range(len(works))]


def _in_a_child(work: Callable[[], object]) -> str:
    """Do it in a forked child: "result", "PhirtError", or what else became of the child."""
    context: Any = multiprocessing.get_context("fork")  # which typeshed lacks for Windows
    ours, theirs = context.Pipe()

    def run() -> None:
        try:
            work()
        except PhirtError:
            theirs.send("PhirtError")
        except BaseException as error:
            theirs.send(f"{type(error).__name__}: {error}")
        else:
            theirs.send("result")

    child = context.Process(target=run)
    with warnings.catch_warnings():
        # Python warns of forking a process with threads, which is what is tested.
        warnings.simplefilter("ignore", DeprecationWarning)
        child.start()
    answer = ours.recv() if ours.poll(timeout=_PATIENCE) else "it hangs"
    child.join(timeout=_PATIENCE)
    if child.exitcode != 0:
        child.kill()
        return f"{answer}, and exit code {child.exitcode}"
    return str(answer)


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * mmap.PAGESIZE
