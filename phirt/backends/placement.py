"""What counts as running on a device, and what is said where a model does not.

Of a graph's nodes, no product of matrices and no attention may be elsewhere; the others
(shapes, lengths and masks of a few integers) may, whatever their number: providers leave them
on the CPU on purpose. Of weights and results, no byte may. docs/placement.md tells why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from phirt.backends.onnx_nodes import is_heavy
from phirt.errors import DevicePlacementError
from phirt.protocols import Placement

__all__ = ["place_bytes", "place_nodes"]


def place_nodes(nodes: Iterable[tuple[str, str]], *, device: str, provider: str) -> Placement:
    """Where a graph runs, by the execution provider of each of its nodes.

    Args:
        nodes: Provider and operator of each node, as onnxruntime tells.
        device: The device that was asked for.
        provider: The provider that it means.

    Raises:
        DevicePlacementError: A node of the heavy kinds is elsewhere, or none is known to be
            on the device; the message has the share of nodes that is elsewhere.
    """
    found = list(nodes)
    counts = Counter(name for name, _ in found)
    heavy = Counter(operator for name, operator in found if name != provider and is_heavy(operator))
    if provider in counts and not heavy:
        return Placement(device=device, provider=provider, nodes=dict(counts))
    elsewhere = len(found) - counts[provider]
    listed = ", ".join(f"{count} on {name}" for name, count in counts.items())
    what = (
        f"runs {elsewhere} of {len(found)} nodes ({elsewhere / len(found):.1%}) elsewhere: {listed}"
        if found
        else "does not tell where any node runs, which is no proof"
    )
    if heavy:
        kinds = " and ".join(f"{count} {kind}" for kind, count in sorted(heavy.items()))
        what += f"; off the device are {kinds}, which belong there"
    raise DevicePlacementError(
        f"Device {device!r} was asked for, which is {provider}, but onnxruntime {what}. "
        "Use a graph made for this provider, or another device."
    )


def place_bytes(
    sizes: Mapping[str, int], wanted: Iterable[str], *, device: str, of: str
) -> Placement:
    """Where arrays are, by the bytes that each of the runtime's devices holds.

    Args:
        sizes: Bytes by device, as the runtime names it.
        wanted: The runtime's names that mean the device.
        device: The device that was asked for.
        of: What the arrays are, for the message.

    Raises:
        DevicePlacementError: A byte is elsewhere; the message has the share of bytes that is.
    """
    right = set(wanted)
    strays = sorted(sizes.keys() - right)
    if sizes and not strays:
        return Placement(device=device, provider=", ".join(sorted(sizes)))
    total = sum(sizes.values())
    share = sum(sizes[name] for name in strays) / total if total else 1.0
    raise DevicePlacementError(
        f"Device {device!r} was asked for, but {share:.1%} of the {of} (by bytes) is on "
        f"{', '.join(strays) or 'no device'}. Name the device that you want it on."
    )
