"""What the requests of a `phirt.Model` run on, and what takes over where that fails."""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from phirt.backends.native_errors import first_line
from phirt.errors import PhirtError, SessionClosedError
from phirt.generation.failover import Failover, Takeover
from phirt.protocols import LoadedModel

if TYPE_CHECKING:
    from phirt.dispatch.plan import Plan
    from phirt.dispatch.select import Selection

__all__ = ["LoadNext", "Standby", "check_failover"]

_logger = logging.getLogger(__name__)


class LoadNext(Protocol):
    """Loads the model on the next candidate of the plan that takes it."""

    def __call__(self, failed: Selection, reason: str) -> Selection:
        """The model, loaded.

        Args:
            failed: What was loaded before.
            reason: What it failed of, in one sentence.

        Raises:
            PhirtError: No candidate is left, or none of them took it.
        """


def check_failover(*, device: str, backend: str) -> None:
    """Refuse failover where nothing may take over.

    Raises:
        ValueError: Device and backend are both named.
    """
    if "auto" not in (device, backend):
        raise ValueError(
            f"failover=True with backend={backend!r} and device={device!r}: what is named is used "
            'or an error says why not, so that nothing may take over. Leave one of them "auto".'
        )


@dataclass(frozen=True, slots=True)
class _Failed:
    """A model that was given up."""

    selection: Selection
    reason: str


class Standby:
    """The selection that requests run on; where it fails, the next one, for all of them.

    Args:
        selection: What was loaded first.
        load_next: Loads what takes over; None where nothing may.
    """

    def __init__(self, selection: Selection, load_next: LoadNext | None) -> None:
        self._current = selection
        self._load_next = load_next
        self._failed: list[_Failed] = []
        # Reentrant: a callback of the load may generate with this very model.
        self._lock = threading.RLock()
        self._closed = False
        self._process = os.getpid()

    @property
    def current(self) -> Selection:
        """What new requests run on."""
        return self._current

    def is_closed(self) -> bool:
        """Whether `close` was called, perhaps a moment ago and in another thread."""
        return self._closed

    def recover(self, failed: LoadedModel, error: Exception, *, tokens: int) -> Takeover | None:
        """What a request goes on with, as `phirt.generation.failover.Recover` has it.

        The first request that comes with the failure of the current model loads the next one;
        those that come meanwhile wait for it.
        """
        if os.getpid() != self._process:
            return None  # Runtimes do not survive a fork, and the lock may be held for ever.
        if isinstance(error, SessionClosedError) and self._current.loaded is failed:
            return None  # Nothing failed: the model was closed.
        with self._lock:
            if self._current.loaded is failed and not self._replace(error):
                return None
            left = next(each for each in self._failed if each.selection.loaded is failed)
            return Takeover(
                self._current.loaded,
                Failover(
                    backend=left.selection.backend,
                    device=left.selection.device,
                    reason=left.reason,
                    next_backend=self._current.backend,
                    next_device=self._current.device,
                    tokens=tokens,
                ),
            )

    def close(self) -> None:
        """Free the weights once the last session has ended. Calling it again does nothing."""
        # Without the lock: a load that goes on meanwhile sees it at its end.
        self._closed = True
        self._current.loaded.close()

    def _replace(self, error: Exception) -> bool:
        """Load what takes over from the current selection, or note on the error why not."""
        before = self._current
        reason = _sentence(error)
        if self.is_closed() or self._load_next is None:
            error.add_note("Nothing takes over: the model is closed.")
            return False
        try:
            after = self._load_next(replace(before, plan=_on_disk(before.plan)), reason)
        except Exception as second:
            error.add_note(f"Nothing takes over: {_sentence(second)}")
            return False
        # Only now: where nothing took over, the model that failed is the only one there is, and
        # the next request may fare better. So for a moment both are in memory.
        self._failed.append(_Failed(before, reason))
        self._current = after
        _logger.warning(
            "%s on %s failed, and %s on %s goes on. %s",
            before.backend,
            before.device,
            after.backend,
            after.device,
            reason,
        )
        _close(before)
        if self.is_closed():
            after.loaded.close()
        return True


def _on_disk(plan: Plan) -> Plan:
    """The plan without what would be downloaded, which nobody expects of a stream's next token."""
    for row in plan.candidates:
        if row.status == "usable" and row.artifact and row.artifact.state == "to fetch":
            reason = "it is not fetched in the middle of a generation"
            fix = f'To have it here beforehand, pass backend="{row.backend}" to phirt.pull.'
            plan = plan.without(row, row.rejected("model", reason, fix))
    return plan


def _close(selection: Selection) -> None:
    """Give up a model; a runtime that is broken may not even let go of it."""
    try:
        selection.loaded.close()
    except Exception as error:
        _logger.info("%s did not close: %s", selection.backend, _sentence(error))


def _sentence(error: Exception) -> str:
    text = first_line(error)
    return text if isinstance(error, PhirtError) else f"{type(error).__name__}: {text}"
