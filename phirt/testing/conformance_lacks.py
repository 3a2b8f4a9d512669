"""What a backend says about itself: capabilities, lacks, devices, models that it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from phirt.devices.names import DeviceName
from phirt.errors import ModelError, PhirtError
from phirt.protocols import LoadOptions, Reject
from phirt.testing.checkpoints import write_tiny_checkpoint
from phirt.testing.conformance_settings import ConformanceSettings
from phirt.testing.subject import Subject, empty_folder, random_ids, read_artifact

__all__ = ["LackConformance"]

_FIRST = 36
# The forms that `Hardware` documents: in others, a device would be taken for two.
_IDENTITIES = {
    "pci": "[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}[.][0-7]",
    "luid": "[0-9a-f]{16}",
    "uuid": "[0-9a-f]{32}",
}


class LackConformance(ConformanceSettings):
    """Declarations are data that a caller relies on, and they are true."""

    def test_declared_lacks(self, subject: Subject) -> None:
        """Calling what is missing raises. The day it works, the declaration has to go.

        Where the lack is this version's, a wrong answer is as good as an error. ``topk`` says
        where a result is computed, not what it is, so there is nothing to call.
        """
        for capability, lack in subject.model.capabilities.lacks.items():
            subject.check(bool(lack.reason.strip()), f"the lack of {capability!r} has no reason")
            outcome = "raises" if capability == "topk" else _outcome(capability, subject)
            declared = f"{capability!r} is declared missing ({lack.kind}: {lack.reason})"
            subject.check(outcome != "works", f"{declared}, and works: declare the capability")
            subject.check(
                outcome == "raises" or lack.kind == "this version",
                f"{declared}, and answers wrongly instead of raising",
            )

    def test_model_info(self, subject: Subject) -> None:
        """What the loop relies on is what the checkpoint says."""
        info, expected = subject.model.info, subject.oracle.info
        for name in ("vocab_size", "context_length", "eos_token_ids", "rope_boundary", "window"):
            found, wanted = getattr(info, name), getattr(expected, name)
            subject.check(found == wanted, f"info.{name} is {found}, not {wanted}")
        subject.check(bool(info.weights_id), "info.weights_id is empty")

    def test_placement(self, subject: Subject) -> None:
        """Where the model runs is where it was asked to."""
        placement = subject.model.placement()
        subject.check(
            placement.device.partition(":")[0] == subject.device.partition(":")[0],
            f"device {subject.device!r} was asked for, placement() says {placement.device!r}",
        )
        subject.check(bool(placement.provider), "placement() names no provider")

    def test_probe(self, subject: Subject) -> None:
        """A backend that has just loaded a model finds its own device, and says what it is."""
        wanted = DeviceName.parse(subject.device)
        found = subject.backend.probe()
        usable = [each for each in found if each.status in {"found", "loads", "ran"}]
        subject.check(
            wanted.is_one_of(each.device for each in usable),
            f"probe() does not find {subject.device!r}: "
            f"{[(each.device, each.status) for each in found]}",
        )
        for each in usable:
            subject.check(bool(each.version), f"probe() gives no version for {each.device!r}")
            for name, form in _IDENTITIES.items():
                value = getattr(each.hardware, name, None)
                subject.check(
                    value is None or re.fullmatch(form, value) is not None,
                    f"probe() gives {each.device!r} the {name} {value!r}, which is not of the "
                    f"form {form}",
                )

    def test_accepts(self, subject: Subject) -> None:
        """What was loaded is accepted; devices and layouts that nobody knows are not."""
        accepts, artifact = subject.backend.accepts, subject.artifact
        verdict = accepts(artifact, subject.device)
        subject.check(not isinstance(verdict, Reject), f"accepts() says {verdict}, and load works")
        for name, verdict in {
            "device": accepts(artifact, "abacus"),
            "layout": accepts(replace(artifact, format="papyrus"), subject.device),
        }.items():
            subject.check(isinstance(verdict, Reject), f"accepts() takes an unknown {name}")
        with pytest.raises(PhirtError):
            subject.backend.load(artifact, "abacus", LoadOptions())

    def test_rejected_models(self, tmp_path: Path) -> None:
        """A model that is declared rejected is refused, when asked and when loaded."""
        backend = self.backend()
        for architecture, lack in self.rejected.items():
            checkpoint = write_tiny_checkpoint(tmp_path / architecture, architecture)
            try:
                folder = self.prepare(checkpoint, empty_folder(tmp_path / f"{architecture}-out"))
                artifact = read_artifact(backend, folder)
            except ModelError:
                continue  # There is not even a folder that the backend could read.
            name = f"{backend.name} x {architecture}"
            verdict = backend.accepts(artifact, self.device)
            try:
                model = backend.load(artifact, self.device, LoadOptions())
            except ModelError:
                assert isinstance(verdict, Reject), f"{name}: load refuses what accepts() takes"
                assert verdict.reason, f"{name}: rejected without a reason"
            else:
                model.close()
                pytest.fail(f"{name}: declared rejected ({lack.kind}: {lack.reason}), and loads")


def _outcome(capability: str, subject: Subject) -> Literal["works", "wrong", "raises"]:
    try:
        _ATTEMPTS[capability](subject)
    except AssertionError:
        return "wrong"
    except (PhirtError, NotImplementedError):
        return "raises"
    return "works"


def _truncate(subject: Subject) -> None:
    ids = random_ids(_FIRST + 2)
    with subject.session(_FIRST + 2) as session:
        session.prefill(ids)
        session.truncate(_FIRST)
        logits = session.decode(ids[_FIRST])
        subject.assert_logits(logits, subject.oracle.logits(ids)[_FIRST : _FIRST + 1], "truncate")


def _verify(subject: Subject) -> None:
    ids = random_ids(_FIRST + 3)
    with subject.session(_FIRST + 3) as session:
        session.prefill(ids[:_FIRST])
        logits = session.verify(ids[_FIRST:])
        subject.assert_logits(logits, subject.oracle.logits(ids)[_FIRST:], "verify")


def _kv(subject: Subject) -> None:
    ids = random_ids(_FIRST + 1)
    with subject.session(_FIRST) as session:
        session.prefill(ids[:_FIRST])
        cache = session.export_kv()
    with subject.session(_FIRST + 1) as session:
        session.import_kv(cache)
        subject.assert_logits(session.decode(ids[-1]), subject.oracle.logits(ids)[-1:], "import_kv")


def _batch(subject: Subject) -> None:
    pool = subject.model.new_pool(slots=2, capacity=_FIRST + 1, expected_length=_FIRST + 1)
    session = pool.acquire()
    ids = random_ids(_FIRST + 1)
    session.prefill(ids[:_FIRST])
    logits = pool.decode([session], ids[-1:])
    subject.assert_logits(logits, subject.oracle.logits(ids)[-1:], "pool decode")
    pool.close()


def _interrupt(subject: Subject) -> None:
    with subject.session(_FIRST) as session:
        session.interrupt()


_ATTEMPTS: dict[str, Callable[[Subject], None]] = {
    "truncate": _truncate,
    "verify": _verify,
    "kv": _kv,
    "batch": _batch,
    "interrupt": _interrupt,
}
