"""Backends that fail in one way each, for a process that can be spared.

They are plugins: an entry point leads a child to them, as `plugin` of test_survey.py makes it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from phirt.backends.base import HostLogits
from phirt.backends.reference import ReferenceBackend
from phirt.errors import DeviceNotAvailableError, DevicePlacementError, OutOfMemoryError
from phirt.protocols import LoadOptions
from phirt.types import Artifact, Availability, FloatArray

HOURS = 10_000


class Sound(ReferenceBackend):
    """Works, and says so only where it was tried."""

    name: ClassVar[str] = "faulty"

    def probe(self) -> list[Availability]:
        return [Availability("cpu", "found", "It is there.", version="faulty 1.0")]


class Chatty(Sound):
    """Prints where an answer might be expected, past Python's own streams too."""

    def probe(self) -> list[Availability]:
        sys.stdout.write('{"outcome": "listed", "listing": []}\n')
        os.write(1, b"\xff\x00 garbage\n")
        os.write(2, b"W0000 a warning of a C++ library\n")
        return super().probe()


class ProbeRaises(Sound):
    def probe(self) -> list[Availability]:
        raise RuntimeError("the driver is too old")


class ProbeAborts(Sound):
    def probe(self) -> list[Availability]:
        os.write(2, b"terminate called after throwing an instance of 'std::bad_alloc'\n")
        os.abort()


class ProbeIsIllegal(Sound):
    def probe(self) -> list[Availability]:
        signal.raise_signal(signal.SIGILL)
        return []


class ProbeHangs(Sound):
    def probe(self) -> list[Availability]:
        time.sleep(HOURS)
        return []


class ProbeExits(Sound):
    def probe(self) -> list[Availability]:
        sys.exit(7)


class ProbeLies(Sound):
    def probe(self) -> list[Availability]:
        status: Any = "excellent"
        return [Availability("cpu", status, "It is there.")]


class ProbeSurveys(Sound):
    """Asks phirt what phirt is asking it."""

    def probe(self) -> list[Availability]:
        from phirt.dispatch.survey import Survey

        Survey().machine()
        return super().probe()


class TrialIsIllegal(Sound):
    def load(self, artifact: Artifact, device: str, options: LoadOptions) -> Any:
        signal.raise_signal(signal.SIGILL)


class TrialHangs(Sound):
    def load(self, artifact: Artifact, device: str, options: LoadOptions) -> Any:
        time.sleep(HOURS)


class TrialRaises(Sound):
    def load(self, artifact: Artifact, device: str, options: LoadOptions) -> Any:
        raise OSError("the device is busy")


class TrialFindsNoMemory(Sound):
    def load(self, artifact: Artifact, device: str, options: LoadOptions) -> Any:
        raise OutOfMemoryError("Something else has the memory.")


class TrialFindsNothing(Sound):
    def load(self, artifact: Artifact, device: str, options: LoadOptions) -> Any:
        raise DeviceNotAvailableError("No device answers.")


class TrialIsElsewhere(Sound):
    def load(self, artifact: Artifact, device: str, options: LoadOptions) -> Any:
        raise DevicePlacementError("The graph runs on the CPU.")


class ReadsNothing(Sound):
    formats: ClassVar[tuple[str, ...]] = ("a format of its own",)


class OffByAFactor(Sound):
    """Computes logits that are right but for a factor."""

    factor: ClassVar[float] = 3.0

    def load(self, artifact: Artifact, device: str, options: LoadOptions) -> Any:
        return _Scaled(super().load(artifact, device, options), self.factor)


class NotANumber(OffByAFactor):
    factor: ClassVar[float] = float("nan")


class _Scaled:
    """A loaded model or a session whose logits are multiplied."""

    def __init__(self, inner: Any, factor: float) -> None:
        self._inner = inner
        self._factor = factor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def new_session(self, **lengths: int) -> _Scaled:
        return _Scaled(self._inner.new_session(**lengths), self._factor)

    def prefill(self, token_ids: Sequence[int], *, needs_logits: bool = True) -> HostLogits:
        return self._scale(self._inner.prefill(token_ids, needs_logits=needs_logits).numpy())

    def decode(self, token_id: int) -> HostLogits:
        return self._scale(self._inner.decode(token_id).numpy())

    def _scale(self, logits: FloatArray) -> HostLogits:
        return HostLogits((logits * np.float32(self._factor)).astype(np.float32))
