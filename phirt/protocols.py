"""The narrow waist: what the decode loop asks of a runtime, and nothing more.

Everything above (loop, processors, samplers, text) is written once against these
protocols; everything below (one adapter per runtime) implements them. What a runtime
cannot do is *data* (`Capabilities`, `Session.floor`, `Session.can_extend`) which the
caller checks before it calls; it is never discovered by catching an exception.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

from phirt.types import Artifact, Availability, FloatArray, IntArray

__all__ = [
    "CAPABILITIES",
    "KV_PRECISIONS",
    "Accept",
    "Availability",
    "Backend",
    "Capabilities",
    "KVCache",
    "KVLayer",
    "KVPool",
    "Lack",
    "LoadOptions",
    "LoadedModel",
    "Logits",
    "ModelInfo",
    "Placement",
    "Reject",
    "RopeRegime",
    "Session",
    "TopK",
]

RopeRegime: TypeAlias = Literal["short", "long"]
"""Which rotary factors a LongRoPE session uses; fixed for the session's life."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the loop must know about loaded weights.

    Attributes:
        vocab_size: Number of logits per position. Token ids are below it.
        context_length: The most tokens that one session may hold.
        eos_token_ids: Stop ids named by the model's own configuration.
        weights_id: Identifies the weights: KV caches are valid only within one.
        rope_boundary: The longest sequence with the short rotary factors (LongRoPE's
            ``original_max_position_embeddings``), or None. Crossing it needs a new session
            and one whole prefill.
        window: Attention window in tokens, or None for full attention.
    """

    vocab_size: int
    context_length: int
    eos_token_ids: frozenset[int]
    weights_id: str
    rope_boundary: int | None = None
    window: int | None = None

    def regime(self, max_length: int) -> RopeRegime | None:
        """The rotary regime of a session made for ``max_length`` tokens; None without LongRoPE."""
        if self.rope_boundary is None:
            return None
        return "long" if max_length > self.rope_boundary else "short"

    def first_call(self, max_length: int) -> int:
        """Fewest tokens that the first call of a session for ``max_length`` may append."""
        boundary = self.rope_boundary
        return 1 if boundary is None or max_length <= boundary else boundary + 1


@dataclass(frozen=True, slots=True)
class Lack:
    """Why a capability is missing.

    Attributes:
        kind: ``never``: the runtime's nature forbids it; ``not yet``: the runtime could, and
            phirt does not use it so far; ``this version``: the installed runtime fails at it.
        reason: Why, in one sentence.
    """

    kind: Literal["never", "not yet", "this version"]
    reason: str


CAPABILITIES = ("truncate", "verify", "interrupt", "kv", "batch", "topk")
"""The names of the capabilities, in the order in which they are reported."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What sessions of a loaded model can do beyond prefill and decode.

    Each capability is there, or its absence is explained: constructing one without the
    other raises `ValueError`.

    Attributes:
        truncate: ``Session.truncate`` works, down to ``Session.floor``.
        verify: ``Session.verify`` works: logits of every position in one run.
        interrupt: ``Session.interrupt`` ends a call that is running.
        kv: ``Session.export_kv`` and ``Session.import_kv`` work.
        batch: ``LoadedModel.new_pool`` works.
        topk: ``Logits.top`` moves k values to the host, not the vocabulary.
        lacks: For each capability that is missing, why.
    """

    truncate: bool = False
    verify: bool = False
    interrupt: bool = False
    kv: bool = False
    batch: bool = False
    topk: bool = False
    lacks: Mapping[str, Lack] = field(default_factory=dict)

    def __post_init__(self) -> None:
        missing = {name for name in CAPABILITIES if not getattr(self, name)}
        if missing != self.lacks.keys():
            wrong = ", ".join(sorted(missing ^ self.lacks.keys()))
            raise ValueError(
                f"Capabilities: lacks must explain each missing capability and no other: {wrong}"
            )


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

    def top(self, k: int) -> TopK:
        """The k largest logits of each position.

        It works on every backend; with the capability ``topk`` the vocabulary stays on the
        device.

        Raises:
            ValueError: ``k`` is not from 1 to the size of the vocabulary.
        """


@dataclass(frozen=True, slots=True)
class TopK:
    """The largest logits of n positions, largest first; equal ones by ascending id.

    Attributes:
        ids: Token ids, shape (n, k).
        values: Their logits, shape (n, k).
        logsumexp: Logarithm of the sum of the exponentials of *all* logits of the position,
            shape (n,): ``values - logsumexp[:, None]`` are log-probabilities.
    """

    ids: IntArray
    values: FloatArray
    logsumexp: FloatArray


@dataclass(frozen=True, slots=True)
class KVLayer:
    """Keys and values of one layer.

    Attributes:
        start: Position of the first one held: 0, or more where a window has rolled on.
        key: Keys after rotary embedding, shape (kv_heads, positions, head_size), float32.
        value: Values, likewise.
    """

    start: int
    key: FloatArray
    value: FloatArray


@dataclass(frozen=True, slots=True)
class KVCache:
    """The cache of one session, on the host: portable between backends.

    Attributes:
        layers: One entry per decoder block.
        length: Tokens that the session holds; every layer ends there.
        weights_id: `ModelInfo.weights_id` of the model that it is of.
        regime: Which rotary factors its keys were made with; None without LongRoPE.
    """

    layers: tuple[KVLayer, ...]
    length: int
    weights_id: str
    regime: RopeRegime | None = None


class Session(Protocol):
    """One sequence and its KV cache, on one device.

    A session is used by one thread at a time; only `interrupt` may be called from
    another. After `close`, and after a call that failed in the runtime, every method but
    `close` raises `SessionClosedError`. An argument that is refused leaves it as it was.

    With LongRoPE (`ModelInfo.rope_boundary`), a session made for more tokens than the
    boundary is in the long regime: its first call appends more tokens than the boundary,
    and its `floor` is the boundary. Runtimes choose the rotary factors by the length of
    each call, and a shorter first call would mix the regimes.
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

    def prefill(self, token_ids: Sequence[int], *, needs_logits: bool = True) -> Logits:
        """Append one or more tokens and return the logits of the last position.

        Args:
            token_ids: The tokens.
            needs_logits: False where more of the prompt follows: the result is not read, and
                need not be computed.
        """

    def decode(self, token_id: int) -> Logits:
        """Append one token and return its logits, shape (1, vocab)."""

    def verify(self, token_ids: Sequence[int]) -> Logits:
        """Append tokens and return the logits of every one of them (capability ``verify``)."""

    def truncate(self, length: int) -> None:
        """Forget every token from ``length`` on (capability ``truncate``)."""

    def export_kv(self) -> KVCache:
        """A copy of the cache, on the host (capability ``kv``)."""

    def import_kv(self, cache: KVCache) -> None:
        """Take over a cache; the session must be empty (capability ``kv``).

        Raises:
            ValueError: The session is not empty, or the cache is of other weights, of another
                rotary regime or of another shape.
            ContextLengthError: It is longer than the session may become.
        """

    def interrupt(self) -> None:
        """End the call that is running, if any, from any thread (capability ``interrupt``).

        The interrupted call raises `SessionClosedError`; the session is then closed to
        everything but `close`.
        """

    def close(self) -> None:
        """Free the cache. Calling it again does nothing."""


class KVPool(Protocol):
    """Rows of one KV buffer, decoded together (capability ``batch``).

    A pool is used by one thread at a time, and its sessions with it.
    """

    @property
    def slots(self) -> int:
        """Rows."""

    @property
    def capacity(self) -> int:
        """Tokens that each row has room for now."""

    def acquire(self) -> Session:
        """A session on a free row; closing it frees the row.

        Raises:
            ValueError: No row is free.
        """

    def decode(self, sessions: Sequence[Session], token_ids: Sequence[int]) -> Logits:
        """Append one token to each of several sessions in one run.

        Args:
            sessions: Distinct sessions of this pool, each already prefilled; their lengths
                may differ.
            token_ids: One token for each.

        Returns:
            Logits, one row per session, in the order given.
        """

    def reorder(self, sessions: Sequence[Session], sources: Sequence[Session]) -> None:
        """Make each session a copy of its source, all at once (beams, n > 1).

        Args:
            sessions: Distinct sessions of this pool, which are overwritten; empty ones too.
            sources: Sessions of this pool, one for each; one may be named several times.
        """

    def grow(self, capacity: int) -> None:
        """Give every row room for ``capacity`` tokens; never shrinks.

        Raises:
            ContextLengthError: It is more than the pool was made for.
        """

    def close(self) -> None:
        """Close every session and free the buffer. Idempotent."""


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
        ``owner``: every call on the one thread that loaded the model. For the last two
        the adapter sees to it (`phirt.backends.execution`): callers may use any thread.
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

    def new_pool(self, *, slots: int, capacity: int, expected_length: int) -> KVPool:
        """Make a pool (capability ``batch``).

        Args:
            slots: Rows.
            capacity: Most tokens that one row will ever hold; fixes the rope regime.
            expected_length: Tokens to allocate for now.

        Raises:
            OutOfMemoryError: The buffer cannot be allocated.
        """

    def placement(self) -> Placement:
        """Where the graph really runs: proof, not a wish."""

    def close(self) -> None:
        """Free the weights once the last session has ended. Idempotent."""


KV_PRECISIONS: Mapping[str, int] = MappingProxyType({"fp32": 4, "fp16": 2, "int8": 1})
"""The precisions that a KV cache may be asked for in, and the bytes of a key or value in each."""


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to load, beyond what and where.

    Attributes:
        threads: Threads within one operator, or None for the runtime's default.
        spinning: Whether idle worker threads spin between two steps: faster alone,
            rude on a busy machine. None for the backend's measured default.
        pinning: Whether worker threads are bound to a processor each. None as the runtime does.
        kv_precision: How keys and values are kept, one of `KV_PRECISIONS`; None as the backend
            does where nobody asks.
        extra: Settings of one runtime, by that runtime's own names.
    """

    threads: int | None = None
    spinning: bool | None = None
    pinning: bool | None = None
    kv_precision: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


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
    """A stateless adapter to one runtime.

    Attributes:
        name: What users call it.
        formats: The layouts (`Artifact.format`) that it reads, preferred first. A checkpoint
            that is in none of them is converted to the first that phirt can write.
        kv_precisions: Those of `KV_PRECISIONS` that a load may ask for, and the kinds of devices
            on which. Not every artifact need have them: `load` says so.
    """

    name: ClassVar[str]
    formats: ClassVar[tuple[str, ...]]
    kv_precisions: ClassVar[Mapping[str, tuple[str, ...]]]

    def probe(self) -> list[Availability]:
        """What this machine offers to the runtime. Never raises for a missing runtime."""

    def accepts(self, artifact: Artifact, device: str) -> Accept | Reject:
        """Whether `load` would take this artifact on this device, without loading it."""

    def load(self, artifact: Artifact, device: str, options: LoadOptions) -> LoadedModel:
        """Put the weights on the device."""
