"""The narrow waist: what the decode loop asks of a runtime, and nothing more.

Everything above (loop, processors, samplers, text) is written once against these
protocols; everything below (one adapter per runtime) implements them. What a runtime
cannot do is *data* (`Capabilities`, `Session.floor`, `Session.can_extend`) which the
caller checks before it calls; it is never discovered by catching an exception.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from phirt.types import Artifact, FloatArray

__all__ = [
    "Accept",
    "Availability",
    "Backend",
    "Capabilities",
    "LoadOptions",
    "LoadedModel",
    "Logits",
    "ModelInfo",
    "Placement",
    "Reject",
    "Session",
]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the loop must know about loaded weights.

    Attributes:
        vocab_size: Number of logits per position. Token ids are below it.
        context_length: The most tokens that one session may hold.
        eos_token_ids: Stop ids named by the model's own configuration.
        weights_id: Identifies the weights: KV caches are valid only within one.
        rope_boundary: Length at which the rotary embedding changes regime (LongRoPE),
            or None. Crossing it needs a new session and one whole prefill.
        window: Attention window in tokens, or None for full attention.
    """

    vocab_size: int
    context_length: int
    eos_token_ids: frozenset[int]
    weights_id: str
    rope_boundary: int | None = None
    window: int | None = None


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What sessions of a loaded model can do beyond prefill and decode.

    Attributes:
        truncate: ``Session.truncate`` works, down to ``Session.floor``.
        verify: ``Session.verify`` works: logits of every position in one run.
        interrupt: ``Session.interrupt`` ends a call that is running.
    """

    truncate: bool = False
    verify: bool = False
    interrupt: bool = False


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the graph really runs, read back from the runtime after the load.

    Attributes:
        device: Device name in phirt's words, such as ``"cpu"``.
        provider: The runtime's own name for it.
        nodes: Number of graph nodes per provider; empty where the runtime cannot tell.
    """

    device: str
    provider: str
    nodes: Mapping[str, int] = field(default_factory=dict)


class Logits(Protocol):
    """Logits of one or more positions. They may stay on the device until asked for."""

    def numpy(self) -> FloatArray:
        """The logits on the host, shape (n, vocab), float32.

        The array is the caller's to write to, and may be a buffer that the session's next
        call overwrites: the loop's processors work in place and copy nothing, and a caller
        that keeps the values copies them first.
        """


class Session(Protocol):
    """One sequence and its KV cache, on one device.

    A session is used by one thread at a time; only `interrupt` may be called from
    another. After `close`, and after any call that raised, every method but `close`
    raises `SessionClosedError`.
    """

    @property
    def length(self) -> int:
        """Tokens in the cache."""

    @property
    def floor(self) -> int:
        """The smallest length that `truncate` can reach now."""

    @property
    def can_extend(self) -> bool:
        """Whether `prefill` may be called on a cache that is not empty."""

    def prefill(self, token_ids: Sequence[int]) -> Logits:
        """Append one or more tokens and return the logits of the last position."""

    def decode(self, token_id: int) -> Logits:
        """Append one token and return its logits, shape (1, vocab)."""

    def verify(self, token_ids: Sequence[int]) -> Logits:
        """Append tokens and return the logits of every one of them (capability ``verify``)."""

    def truncate(self, length: int) -> None:
        """Forget every token from ``length`` on (capability ``truncate``)."""

    def interrupt(self) -> None:
        """End the call that is running, if any, from any thread (capability ``interrupt``).

        The interrupted call raises `SessionClosedError`; the session is then closed to
        everything but `close`.
        """

    def close(self) -> None:
        """Free the cache. Calling it again does nothing."""


class LoadedModel(Protocol):
    """Weights on one device."""

    @property
    def info(self) -> ModelInfo:
        """What the loop must know about the weights."""

    @property
    def capabilities(self) -> Capabilities:
        """What its sessions can do."""

    @property
    def concurrency(self) -> Literal["parallel", "serial", "owner"]:
        """How sessions may run at once.

        ``parallel``: from any threads at once; ``serial``: one call at a time;
        ``owner``: every call from the one thread that loaded the model.
        """

    def new_session(self, *, max_length: int, expected_length: int) -> Session:
        """Start a sequence.

        Args:
            max_length: Most tokens that it will ever hold; fixes the rope regime.
            expected_length: Tokens to allocate for now; the cache grows in buckets
                up to ``max_length``.

        Raises:
            OutOfMemoryError: The KV cache cannot be allocated.
        """

    def placement(self) -> Placement:
        """Where the graph really runs: proof, not a wish."""

    def close(self) -> None:
        """Free the weights once the last session has ended. Idempotent."""


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to load, beyond what and where.

    Attributes:
        threads: Threads within one operator, or None for the runtime's default.
        spinning: Whether idle worker threads spin between two steps: faster alone,
            rude on a busy machine. None for the backend's measured default.
        extra: Settings of one runtime, by that runtime's own names.
    """

    threads: int | None = None
    spinning: bool | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Availability:
    """What a probe found out about one device.

    Attributes:
        device: Device name, such as ``"cpu"``.
        status: ``found`` (listed), ``loads`` (a session opens) or ``ran`` (a graph ran);
            ``missing`` (not installed) or ``broken`` (installed, and fails).
        reason: What was seen, in one sentence.
        fix: What the user can do about it, or None.
    """

    device: str
    status: Literal["found", "loads", "ran", "missing", "broken"]
    reason: str
    fix: str | None = None


@dataclass(frozen=True, slots=True)
class Accept:
    """The backend can load this artifact on this device."""


@dataclass(frozen=True, slots=True)
class Reject:
    """The backend cannot load this artifact on this device.

    Attributes:
        reason: Why not, in one sentence.
        fix: What the user can do about it, or None.
    """

    reason: str
    fix: str | None = None


class Backend(Protocol):
    """A stateless adapter to one runtime."""

    name: ClassVar[str]

    def probe(self) -> list[Availability]:
        """What this machine offers to the runtime. Never raises for a missing runtime."""

    def accepts(self, artifact: Artifact, device: str) -> Accept | Reject:
        """Whether `load` would take this artifact on this device, without loading it."""

    def load(self, artifact: Artifact, device: str, options: LoadOptions) -> LoadedModel:
        """Put the weights on the device."""
