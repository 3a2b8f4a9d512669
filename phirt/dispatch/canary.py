"""Whether a loaded model computes the numbers of its weights: compared once, then remembered.

What a device computes is held against the artifact's canary, or against another backend on
the CPU where the artifact has none. The same artifact, backend, device and versions give the
same numbers again, so that the verdict is kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from phirt._version import __version__
from phirt.devices.names import DeviceName
from phirt.dispatch.machine_dir import machine_dir, read_record, write_record
from phirt.dispatch.measurements import artifact_id
from phirt.errors import ModelError, ModelFormatError, PhirtError
from phirt.models.canary import (
    CANARY_TEXT,
    POSITIONS,
    Canary,
    choose_tokens,
    make_canary,
    mean_kl,
    read_canary,
)
from phirt.models.folder import ModelFolder
from phirt.models.safe_json import JsonFields
from phirt.protocols import LoadedModel, ModelInfo
from phirt.text.tokenizer import Tokenizer
from phirt.types import FloatArray

__all__ = [
    "TOLERANCE",
    "Place",
    "Verdict",
    "canary_logits",
    "check_loaded",
    "forget_verdicts",
    "known_verdict",
    "run_canary",
]

TOLERANCE = 0.02
"""Nats by which a device may differ beyond what rounding the weights makes (docs/canary.md)."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What came of comparing a loaded model with what its weights say.

    Attributes:
        status: ``passed``; ``failed``: it computes wrong numbers; ``unverified``: there was
            nothing to compare it with.
        kl: Mean KL divergence that was found, in nats; None where nothing was compared, or
            the logits were not finite.
        bound: The most that passes, or None where nothing was compared.
        reason: What was seen, in one sentence.
    """

    status: Literal["passed", "failed", "unverified"]
    kl: float | None
    bound: float | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What computes: the same one gives the same numbers again.

    Attributes:
        backend: Name of the backend.
        device: Name of the device.
        version: Of the runtime.
        driver: Version of the device's driver, or None.
        hardware: `hardware_id` of the machine: processors take other kernels, and a store may
            be shared by several machines.
        kv_precision: As in `PlanRequest`.
    """

    backend: str
    device: str
    version: str | None
    driver: str | None
    hardware: str
    kv_precision: str = "auto"


def run_canary(loaded: LoadedModel, canary: Canary) -> float:
    """Mean KL divergence of a loaded model from its original weights, in nats.

    Args:
        loaded: The model.
        canary: Of its artifact.

    Returns:
        The divergence (`mean_kl`); infinite where a logit is not finite.

    Raises:
        ModelFormatError: The canary is of another vocabulary.
        BackendError: The runtime failed.
        DeviceError: The device or its memory does not suffice.
    """
    vocab_size = loaded.info.vocab_size
    if max(*canary.token_ids, int(canary.top_ids.max())) >= vocab_size:
        raise ModelFormatError(
            f"The canary holds ids beyond the model's vocabulary of {vocab_size:,}. Install the "
            "model again."
        )
    return mean_kl(canary, canary_logits(loaded, canary.token_ids))


def canary_logits(loaded: LoadedModel, token_ids: Sequence[int]) -> FloatArray:
    """Logits at the last 8 tokens, shape (8, vocab).

    The first of them are those of a prefill, the others of decode steps: runtimes use other
    kernels for many positions than for one, and both are to be proved.

    Args:
        loaded: The model.
        token_ids: At least 9 ids, few enough for a LongRoPE model's short factors.
    """
    steps = POSITIONS - 1
    session = loaded.new_session(max_length=len(token_ids), expected_length=len(token_ids))
    try:
        # Copies: the next call may overwrite what an earlier one gave.
        rows = [session.prefill(list(token_ids[:-steps])).numpy()[-1].copy()]
        rows += [session.decode(token).numpy()[-1].copy() for token in token_ids[-steps:]]
        return np.stack(rows)
    finally:
        session.close()


def check_loaded(
    loaded: LoadedModel,
    folder: ModelFolder,
    place: Place,
    *,
    reference: Callable[[], LoadedModel | None],
) -> Verdict:
    """Compare a loaded model with what its weights say, unless that was done before.

    What follows from the verdict (another candidate, an error, quarantine) is the caller's.

    Args:
        loaded: The model.
        folder: What it was loaded from.
        place: What it was loaded with.
        reference: Loads the same artifact with another backend on the CPU, or gives None;
            called only where the artifact's canary does not suffice. What it loads is closed
            here.

    Raises:
        ModelFormatError: The canary is damaged.
        BackendError: The runtime failed at it.
        DeviceError: The device or its memory does not suffice.
        StoreError: There is no place for the record (`machine_dir`).
    """
    artifact = folder.artifact
    subject = artifact_id(artifact.weights_id, artifact.format, artifact.precision)
    known = known_verdict(subject, place)
    if known is not None:
        return known
    canary = read_canary(artifact.path, vocab_size=loaded.info.vocab_size)
    if canary is not None and canary.own_kl is not None:
        verdict = _judge(run_canary(loaded, canary), canary, "its original weights")
    elif DeviceName.parse(place.device).kind == "cpu":
        verdict = _unverified("the artifact has no canary, and the CPU is what others are held to")
    else:
        verdict = _compare(loaded, folder, canary, reference)
    _logger.info(
        "Canary of %s with %s on %s: %s", artifact.name, place.backend, place.device, verdict
    )
    if verdict.status != "unverified":  # Something to compare with may turn up.
        _write_verdict(_record_of(subject, place), verdict)
    return verdict


def known_verdict(artifact: str, place: Place) -> Verdict | None:
    """What an earlier comparison found, or None where there was none.

    Args:
        artifact: `artifact_id` of what is, or would be, loaded.
        place: What it is loaded with.

    Raises:
        StoreError: There is no place for the record (`machine_dir`).
    """
    return _read_verdict(_record_of(artifact, place))


def forget_verdicts() -> None:
    """Have every model compared anew when it is loaded next."""
    for record in _records().glob("*.json"):
        with suppress(OSError):
            record.unlink(missing_ok=True)


def _compare(
    loaded: LoadedModel,
    folder: ModelFolder,
    canary: Canary | None,
    reference: Callable[[], LoadedModel | None],
) -> Verdict:
    """Compare with another backend on the CPU."""
    token_ids = canary.token_ids if canary else _encode(folder, loaded.info)
    if token_ids is None:
        return _unverified("the artifact has no canary, and its tokenizer makes none")
    try:
        other = reference()
        if other is None:
            return _unverified("the artifact has no canary, and no backend loads it on the CPU")
        try:
            expected = canary_logits(other, token_ids)
        finally:
            other.close()
    except PhirtError as error:
        return _unverified(f"the artifact has no canary, and loading it on the CPU failed: {error}")
    if not np.isfinite(expected).all():
        return _unverified("the artifact has no canary, and on the CPU its logits are not finite")
    on_cpu = make_canary(token_ids, expected)
    return _judge(run_canary(loaded, on_cpu), on_cpu, "the same weights on the CPU")


def _encode(folder: ModelFolder, info: ModelInfo) -> tuple[int, ...] | None:
    longest = min(info.context_length, info.rope_boundary or info.context_length)
    try:
        encoded = Tokenizer.from_file(folder.tokenizer_path).encode(CANARY_TEXT)
    except ModelError:
        return None
    return choose_tokens(encoded, vocab_size=info.vocab_size, longest=longest)


def _judge(kl: float, canary: Canary, what: str) -> Verdict:
    bound = (canary.own_kl or 0.0) + TOLERANCE
    if not math.isfinite(kl):
        return Verdict(
            status="failed", kl=None, bound=bound, reason="it computes logits that are not finite"
        )
    status: Literal["passed", "failed"] = "passed" if kl <= bound else "failed"
    reason = f"its mean KL divergence from {what} is {kl:.4f} nats; at most {bound:.4f} passes"
    return Verdict(status=status, kl=kl, bound=bound, reason=reason)


def _unverified(reason: str) -> Verdict:
    return Verdict(status="unverified", kl=None, bound=None, reason=reason)


@dataclass(frozen=True, slots=True)
class _Record:
    """Where a verdict is kept, and all that it depends on."""

    path: Path
    key: dict[str, str | None]


def _record_of(artifact: str, place: Place) -> _Record:
    key = {"artifact": artifact, "phirt": __version__, **asdict(place)}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return _Record(_records() / f"{digest}.json", key)


def _records() -> Path:
    return machine_dir() / "canaries"


def _read_verdict(record: _Record) -> Verdict | None:
    """What is kept, or None where nothing is, or it is damaged."""
    document = read_record(record.path)
    if document is None or document.get("key") != record.key:
        return None
    fields = JsonFields(document, source=str(record.path))
    try:
        status = fields.string("status")
        if status not in ("passed", "failed"):
            return None
        return Verdict(
            status="passed" if status == "passed" else "failed",
            kl=fields.optional_number("kl", minimum=0, maximum=math.inf),
            bound=fields.optional_number("bound", minimum=0, maximum=math.inf),
            reason=fields.string("reason"),
        )
    except ModelFormatError:
        return None


def _write_verdict(record: _Record, verdict: Verdict) -> None:
    document: dict[str, Any] = {
        "key": record.key,
        "status": verdict.status,
        "kl": verdict.kl,
        "bound": verdict.bound,
        "reason": verdict.reason,
    }
    write_record(record.path, document)
