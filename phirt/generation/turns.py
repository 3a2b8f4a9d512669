"""Whose turn it is on a model that many threads want to call: steps together, the rest alone.

There is no thread of its own. Whoever waits and finds nothing running takes the lead: it runs
what is due, for others too, and wakes them. Steps and everything else take turns, so that a long
prompt, which comes in parts, holds up running sequences by no more than a part.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

from phirt.errors import SessionClosedError
from phirt.types import FloatArray

__all__ = ["Step", "Turns"]

_Member = TypeVar("_Member", bound=Hashable)
_T = TypeVar("_T")

_GATHER = 0.1
"""For this part of a step's time, a step waits for those that took part in the last one."""

_LEAST_GATHER_S = 0.001
_MOST_GATHER_S = 0.02

_RECENT = 0.2
"""Weight of the newest time in the average."""


class _Request(Generic[_Member]):
    """Something that a thread waits for."""

    def __init__(self, member: _Member) -> None:
        self.member = member
        self.is_taken = False
        self.is_done = False
        self.error: BaseException | None = None

    def fail(self, error: BaseException) -> None:
        if not self.is_done:
            self.error = error
            self.is_done = True


class Step(_Request[_Member]):
    """A member's wish for the logits after one more token.

    Attributes:
        member: Whose sequence it is.
        token_id: The token.
        row: The logits, once they are known, shape (vocab,).
    """

    def __init__(self, member: _Member, token_id: int) -> None:
        super().__init__(member)
        self.token_id = token_id
        self.row: FloatArray | None = None


class _Call(_Request[_Member]):
    """A call that nothing else may run beside."""

    def __init__(self, member: _Member, call: Callable[[], object]) -> None:
        super().__init__(member)
        self.call = call
        self.result: object = None


class Turns(Generic[_Member]):
    """Runs the members' calls, one at a time.

    Args:
        run_step: Runs one step for several members, and fills in each one's ``row`` or calls its
            ``fail``. It is called by one thread at a time.
        most: Most members of a step.
    """

    def __init__(self, run_step: Callable[[Sequence[Step[_Member]]], None], *, most: int) -> None:
        self._run_step = run_step
        self._most = most
        # Reentrant: a garbage collection while it is held may end a request.
        self._changed = threading.Condition(threading.RLock())
        self._is_running = False
        self._running: list[_Request[_Member]] = []
        self._leader: int | None = None
        self._steps: deque[Step[_Member]] = deque()
        self._calls: deque[_Call[_Member]] = deque()
        self._last: set[_Member] = set()
        self._was_step = False
        self._gather_until: float | None = None
        self._process = os.getpid()
        self._later: list[Callable[[], object]] = []
        self.step_s = 0.0
        """Recent time of a step, in seconds; 0 before the first."""

    @property
    def others_step(self) -> bool:
        """Whether sequences are being generated that took part in the last step."""
        return bool(self._last)

    def step(self, member: _Member, token_id: int) -> FloatArray:
        """Logits after one more token of a member, shape (vocab,).

        Raises:
            SessionClosedError: It was interrupted.
            Exception: What the step failed of.
        """
        request = Step(member, token_id)
        if os.getpid() != self._process:
            # Of a fork: the lock may be held by a thread that is not here. Nothing runs here, and
            # the session says why.
            self._run_step([request])
            return self._row_of(request)
        with self._changed:
            self._steps.append(request)
            self._wait_for(request)
        return self._row_of(request)

    @staticmethod
    def _row_of(request: Step[_Member]) -> FloatArray:
        if request.error is not None:
            raise request.error
        assert request.row is not None  # noqa: S101 - else it has failed
        return request.row

    def alone(self, member: _Member, call: Callable[[], _T]) -> _T:
        """What a call returns, run while nothing else runs.

        Raises:
            SessionClosedError: The member was interrupted before its turn.
            Exception: What the call raised.
        """
        if os.getpid() != self._process:
            return call()
        request = _Call(member, call)
        with self._changed:
            self._last.discard(member)
            self._calls.append(request)
            self._wait_for(request)
        return request.result  # type: ignore[return-value]  # what the call returned

    def interrupt(self, member: _Member, running: Callable[[], object]) -> None:
        """End a member's wait. Callable from any thread.

        Args:
            member: Whose.
            running: Called if a call of its own runs now, to end it.
        """
        if os.getpid() != self._process:
            return
        with self._changed:
            self._last.discard(member)
            for queue in (self._steps, self._calls):
                for request in [each for each in queue if each.member is member]:
                    queue.remove(request)  # type: ignore[arg-type]  # it is of this very queue
                    request.fail(SessionClosedError("The session was interrupted."))
            if any(isinstance(each, _Call) and each.member is member for each in self._running):
                running()
            self._changed.notify_all()

    def pause(self, member: _Member) -> None:
        """Wait for a member no more until it comes again."""
        if os.getpid() != self._process:
            return
        with self._changed:
            self._last.discard(member)
            self._changed.notify_all()

    def leave(self, member: _Member, then: Callable[[], object]) -> None:
        """Wait for a member no more, and call ``then`` once nothing runs: now, or soon."""
        if os.getpid() != self._process:
            then()
            return
        with self._changed:
            self._last.discard(member)
            if self._is_running:
                self._later.append(then)
            else:
                then()
            self._changed.notify_all()

    def _wait_for(self, request: _Request[_Member]) -> None:
        """Wait, or work, until a request is done. The lock is held."""
        try:
            self._check_not_leading()
            while not request.is_done:
                if self._is_running:
                    self._changed.wait()
                    continue
                due = self._due()
                if due:
                    self._run(due)
                else:
                    self._changed.wait(timeout=self._patience())
        except BaseException:
            # Ctrl-C in this thread; the request must not be run when nobody waits for it.
            self._withdraw(request)
            raise
        if request.error is not None:
            raise request.error

    def _check_not_leading(self) -> None:
        """Refuse what would wait for itself: a garbage collection inside a call ended a request."""
        if self._leader == threading.get_ident():
            raise SessionClosedError("A session was used from inside a call of its model.")

    def _due(self) -> list[_Request[_Member]]:
        """What runs next; nothing where a step waits for its last members a moment longer."""
        waiting = {each.member for each in self._steps}
        if self._calls and self._was_step:
            self._was_step = False
            self._gather_until = None
            return [self._calls.popleft()]
        # After a call it is a step's turn, even where nobody waits for it yet.
        if self._last - waiting and len(waiting) < self._most and self._may_come():
            return []
        self._gather_until = None
        if not self._steps:
            self._last.clear()
            return [self._calls.popleft()] if self._calls else []
        due = [self._steps.popleft() for _ in range(min(len(self._steps), self._most))]
        # Who does not come in time, such as a reader that is slow, is not waited for again.
        self._last = {each.member for each in due} | (self._last & waiting)
        self._was_step = True
        return list(due)

    def _may_come(self) -> bool:
        """Whether there is time yet for those that took part in the last step."""
        now = time.perf_counter()
        if self._gather_until is None:
            gather = min(max(_GATHER * self.step_s, _LEAST_GATHER_S), _MOST_GATHER_S)
            self._gather_until = now + gather
        return now < self._gather_until

    def _patience(self) -> float | None:
        if self._gather_until is None:
            return None
        return max(self._gather_until - time.perf_counter(), 0.0001)

    def _run(self, due: list[_Request[_Member]]) -> None:
        """Run what is due, with the lock released."""
        self._is_running, self._running, self._leader = True, due, threading.get_ident()
        self._changed.release()
        try:
            first = due[0]
            if isinstance(first, _Call):
                first.result = first.call()
            else:
                started = time.perf_counter()
                self._run_step([each for each in due if isinstance(each, Step)])
                seconds = time.perf_counter() - started
                self.step_s += _RECENT * (seconds - self.step_s) if self.step_s else seconds
        except Exception as error:
            for each in due:
                each.fail(error)
        except BaseException as error:
            for each in due:
                each.fail(SessionClosedError(f"The call was broken off: {type(error).__name__}."))
            raise
        finally:
            self._changed.acquire()
            self._is_running, self._running, self._leader = False, [], None
            for each in due:
                each.is_done = True
            later, self._later = self._later, []
            for call in later:
                call()
            self._changed.notify_all()

    def _withdraw(self, request: _Request[_Member]) -> None:
        if isinstance(request, Step) and request in self._steps:
            self._steps.remove(request)
        elif isinstance(request, _Call) and request in self._calls:
            self._calls.remove(request)
        else:
            while not request.is_done:
                self._changed.wait()
        self._last.discard(request.member)
        self._changed.notify_all()
