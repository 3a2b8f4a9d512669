"""The random numbers of one request: a pure function of seed and token position."""

from __future__ import annotations

import secrets

import numpy as np

__all__ = ["RandomStream", "sample_seed"]

_BLOCK = 256


class RandomStream:
    """One uniform number per generated token, from the counter-based Philox4x64-10.

    The number of a position does not depend on which others were asked for, so a request
    that is greedy for some tokens, or whose parameters change on the way, keeps its
    stream. The bits are taken raw, because numpy promises the stability of bit
    generators, and not of the distributions made from them.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".

    Args:
        seed: The key, in [0, 2**64); None draws one from the system.

    Attributes:
        seed: The key in use: with it the stream can be repeated.
    """

    __slots__ = ("_block", "_values", "seed")

    def __init__(self, seed: int | None = None) -> None:
        self.seed = secrets.randbits(64) if seed is None else seed
        self._block = -1
        self._values: list[float] = []

    def uniform(self, position: int) -> float:
        """The number in [0, 1) of the generated token at ``position``, counted from 0."""
        block, offset = divmod(position, _BLOCK)
        if block != self._block:
            # One step of the counter yields four numbers.
            source = np.random.Philox(key=self.seed, counter=block * _BLOCK // 4)
            # The usual 53 bits of a double: the upper bits of each 64.
            self._values = ((source.random_raw(_BLOCK) >> 11) * 2.0**-53).tolist()
            self._block = block
        return self._values[offset]


def sample_seed(seed: int, index: int) -> int:
    """The seed of one of several samples of a request, in [0, 2**64).

    Sample 0 has the request's own. The others' come from the request's key too, at counters
    that no token position reaches (``index * 2**64``), so that a sample's seed depends on
    nothing but the request's seed and its own number.

    Args:
        seed: The request's, in [0, 2**64).
        index: Which sample, from 0.
    """
    if index == 0:
        return seed
    return int(np.random.Philox(key=seed, counter=index << 64).random_raw())
