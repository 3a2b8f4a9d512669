"""Backends of a graphics card that is not there, each with one fault, over onnxruntime on the CPU.

A plugin of the temporary distribution that tests/test_dispatch_faults.py installs takes one of
them, in this process and in the children that it is asked in.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any, ClassVar

import numpy as np

from phirt.backends.base import HostLogits
from phirt.backends.onnxruntime import OnnxRuntimeBackend
from phirt.backends.placement import place_nodes
from phirt.errors import BackendRuntimeError, OutOfMemoryError
from phirt.protocols import Accept, Availability, LoadOptions, Logits, Placement, Reject
from phirt.types import Artifact, Hardware

HOURS = 10_000
FACTOR = 3.0

loads: list[str] = []
"""The models that this process has loaded on the card, by the names of their folders."""


class Working(OnnxRuntimeBackend):
    """Offers a card, and computes what it should."""

    name: ClassVar[str] = "faulty"

    def probe(self) -> list[Availability]:
        hardware = Hardware(
            native="CARD 0",
            name="Faultless 9000",
            vendor="nvidia",
            memory_bytes=8 << 30,
            driver=os.environ.get("FAULTY_DRIVER", "570.1"),
            pci="0000:65:00.0",
            discrete=True,
        )
        return [Availability("cuda", "found", "It is there.", None, "faulty 1.0", hardware)]

    def accepts(self, artifact: Artifact, device: str) -> Accept | Reject:
        return super().accepts(artifact, "cpu")

    def load(self, artifact: Artifact, device: str, options: LoadOptions) -> Any:
        loads.append(artifact.path.name)
        return OnCard(super().load(artifact, "cpu", options))


class OnCard:
    """A loaded model that is said to be on the card."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def placement(self) -> Placement:
        return Placement(device="cuda", provider="CardExecutionProvider")

    def new_session(self, **lengths: int) -> Any:
        return OnCardSession(self, self.inner.new_session(**lengths))

    def answer(self, logits: Logits) -> Logits:
        """What a call of one of its sessions gives."""
        return logits


class OnCardSession:
    def __init__(self, model: OnCard, inner: Any) -> None:
        self.model, self.inner = model, inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def prefill(self, token_ids: Any, *, needs_logits: bool = True) -> Logits:
        return self.model.answer(self.inner.prefill(token_ids, needs_logits=needs_logits))

    def decode(self, token_id: int) -> Logits:
        return self.model.answer(self.inner.decode(token_id))


def is_trial(artifact: Artifact) -> bool:
    return "trial_model" in artifact.path.parts


class ProbeRaises(Working):
    def probe(self) -> list[Availability]:
        raise RuntimeError("the driver is too old")


class ProbeIsIllegal(Working):
    def probe(self) -> list[Availability]:
        signal.raise_signal(signal.SIGILL)
        return []


class ProbeHangs(Working):
    def probe(self) -> list[Availability]:
        time.sleep(HOURS)
        return []


class SessionRaises(Working):
    """As an adapter that does not make phirt's errors of its runtime's."""

    def load(self, artifact: Artifact, device: str, options: LoadOptions) -> Any:
        raise OSError("libcard.so.1: cannot open shared object file: No such file or directory")


class SessionRaisesLater(Working):
    """The tiny model loads, the real one does not."""

    def load(self, artifact: Artifact, device: str, options: LoadOptions) -> Any:
        if is_trial(artifact):
            return super().load(artifact, device, options)
        raise RuntimeError("the card fell off the bus")


class SessionIsIllegal(Working):
    def load(self, artifact: Artifact, device: str, options: LoadOptions) -> Any:
        signal.raise_signal(signal.SIGILL)


class SessionHangs(Working):
    def load(self, artifact: Artifact, device: str, options: LoadOptions) -> Any:
        time.sleep(HOURS)


class SessionExits(Working):
    def load(self, artifact: Artifact, device: str, options: LoadOptions) -> Any:
        sys.exit(3)


class ProvenOnCpu(Working):
    """Falls back to the CPU, and finds out, as phirt's own adapters do."""

    def load(self, artifact: Artifact, device: str, options: LoadOptions) -> Any:
        nodes = [("CPUExecutionProvider", "MatMulNBits"), ("CPUExecutionProvider", "Add")]
        place_nodes(nodes, device=device, provider="CardExecutionProvider")


class ProvenOnCpuLater(ProvenOnCpu):
    """The tiny model runs on the card, the real one does not."""

    def load(self, artifact: Artifact, device: str, options: LoadOptions) -> Any:
        if is_trial(artifact):
            return Working.load(self, artifact, device, options)
        return super().load(artifact, device, options)


class SilentlyOnCpu(Working):
    """Falls back to the CPU, and does not raise."""

    def load(self, artifact: Artifact, device: str, options: LoadOptions) -> Any:
        return OnnxRuntimeBackend.load(self, artifact, "cpu", options)


class SilentlyOnCpuLater(SilentlyOnCpu):
    def load(self, artifact: Artifact, device: str, options: LoadOptions) -> Any:
        if is_trial(artifact):
            return Working.load(self, artifact, device, options)
        return super().load(artifact, device, options)


class Scaled(OnCard):
    factor: ClassVar[float] = FACTOR

    def answer(self, logits: Logits) -> Logits:
        return HostLogits((logits.numpy() * np.float32(self.factor)).astype(np.float32))


class Infinite(Scaled):
    factor: ClassVar[float] = float("inf")


class OffByAFactor(Working):
    wrong: ClassVar[type[Scaled]] = Scaled

    def load(self, artifact: Artifact, device: str, options: LoadOptions) -> Any:
        return self.wrong(super().load(artifact, device, options))


class NotFinite(OffByAFactor):
    wrong: ClassVar[type[Scaled]] = Infinite


class OffByAFactorLater(OffByAFactor):
    """Right for the tiny model, wrong for the real one: the canary's to find."""

    def load(self, artifact: Artifact, device: str, options: LoadOptions) -> Any:
        if is_trial(artifact) or os.environ.get("FAULTY_DRIVER"):
            return Working.load(self, artifact, device, options)
        return super().load(artifact, device, options)


class NoMemory(Working):
    def load(self, artifact: Artifact, device: str, options: LoadOptions) -> Any:
        raise OutOfMemoryError("Something else has the card's memory.")


class Dying(OnCard):
    """Lost after some calls: the canary has made eight of them before a first generation."""

    calls_left = 8 + 4

    def answer(self, logits: Logits) -> Logits:
        self.calls_left -= 1
        if self.calls_left < 0:
            raise BackendRuntimeError("the card was lost")
        return logits


class DiesInUse(Working):
    def load(self, artifact: Artifact, device: str, options: LoadOptions) -> Any:
        return Dying(super().load(artifact, device, options))


class DyingRaw(Dying):
    """As a session that does not make phirt's errors of its runtime's."""

    def answer(self, logits: Logits) -> Logits:
        try:
            return super().answer(logits)
        except BackendRuntimeError as error:
            raise RuntimeError(str(error)) from None


class DiesInUseRaw(Working):
    def load(self, artifact: Artifact, device: str, options: LoadOptions) -> Any:
        return DyingRaw(super().load(artifact, device, options))
