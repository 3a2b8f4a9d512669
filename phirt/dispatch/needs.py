"""The memory that a candidate needs, against what is free where it would lie."""

from __future__ import annotations

from phirt.devices.machine import Machine
from phirt.devices.names import DeviceName
from phirt.dispatch.fit import predict_memory
from phirt.dispatch.plan import MemoryNeed, PlannedArtifact
from phirt.dispatch.ranking import Tier, tier_of
from phirt.dispatch.shape import ModelShape
from phirt.types import Availability

__all__ = ["memory_need"]


def memory_need(
    artifact: PlannedArtifact,
    shape: ModelShape,
    *,
    backend: str,
    offer: Availability,
    machine: Machine,
    context: int,
    threads: int | None = None,
    kv_precision: str = "auto",
) -> MemoryNeed | None:
    """What an artifact is predicted to take on a device; None where its size is not known.

    Args:
        artifact: The artifact.
        shape: The decoder's sizes.
        backend: Name of the backend.
        offer: The device, as the backend lists it.
        machine: The record of the machine.
        context: Tokens of context.
        threads: As in `LoadOptions`.
        kv_precision: As in `PlanRequest`.
    """
    size = artifact.bytes
    if size is None and artifact.precision is not None:
        size = shape.weights_bytes(artifact.precision)
    if size is None:
        return None
    return predict_memory(
        shape,
        backend=backend,
        device_kind=DeviceName.parse(offer.device).kind,
        layout=artifact.format,
        precision=artifact.precision,
        weights_bytes=size,
        context=context,
        threads=threads,
        kv_precision=kv_precision,
        free=_free(machine, offer),
    )


def _free(machine: Machine, offer: Availability) -> int | None:
    """What is free where a device keeps the weights.

    Of a device with memory of its own only the whole is known. One without it shares the
    host's, and its runtime may say how much of that it can have.
    """
    hardware, host = offer.hardware, machine.memory.free
    if tier_of(offer, machine) is not Tier.GPU:
        return host
    if hardware is None or hardware.memory_bytes is None:
        return None
    return min(hardware.memory_bytes, host) if hardware.discrete is False else hardware.memory_bytes
