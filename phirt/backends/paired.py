"""Two loaded models as one: long prefills run on the first, everything else on the second.

Which runtime is fastest at a prompt and which at single tokens are two questions, and a KV
cache is portable (capability ``kv``): it is moved where the next call belongs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from phirt.backends.base import BaseModel, BaseSession
from phirt.backends.execution import Parallel
from phirt.errors import BackendError, BackendRuntimeError, UnsupportedModelError
from phirt.protocols import (
    CAPABILITIES,
    Capabilities,
    KVCache,
    KVLayer,
    Lack,
    LoadedModel,
    Logits,
    ModelInfo,
    Placement,
    Session,
)

__all__ = ["PREFILL_FROM", "PairedModel"]

PREFILL_FROM = 32
"""Fewest tokens of a prefill that is worth a hand-over, where nobody says another number.

SmolLM2 in int8 on two cores: the hand-over took 3 ms and 40 µs a token, and OpenVINO prefilled
32 tokens 137 ms sooner than onnxruntime. Below some tens of tokens what is won is in the noise,
and two caches are allocated for it.
"""

_LARGEST_SHARE = 8
"""Held tokens for each new one, up to which a cache is moved back for a prefill.

There and back it is moved twice, for 80 µs a token that it holds; a token that was prefilled
elsewhere saved 1.4 ms at the least. That is even at 17 held tokens for each new one.
"""


class PairedModel(BaseModel):
    """A `phirt.protocols.LoadedModel` over two others of one decoder, which it owns.

    Their weights must be conversions of one source, which is for the caller to know: that the
    one's keys and values then serve the other is measured (docs/two-runtimes.md), and their
    ``weights_id`` may differ. The pair's own caches are of both, so that its ``weights_id`` is
    neither's where these differ.

    Args:
        prefill: Runs prefills of many tokens.
        decode: Runs everything else.
        prefill_from: Fewest tokens of a call that ``prefill`` runs.

    Attributes:
        prefill: As given.
        decode: As given.
        prefill_from: As given; a change counts for calls that come after it.

    Raises:
        BackendError: Caches cannot leave the one, or cannot enter the other.
        UnsupportedModelError: They are not of one decoder.
    """

    def __init__(
        self, prefill: LoadedModel, decode: LoadedModel, *, prefill_from: int = PREFILL_FROM
    ) -> None:
        self.prefill = prefill
        self.decode = decode
        self.prefill_from = prefill_from
        for part, model in (("prefill", prefill), ("decode", decode)):
            if not model.capabilities.kv:
                raise BackendError(
                    f"The runtime for {part} cannot hand a KV cache over: "
                    f"{model.capabilities.lacks['kv'].reason}. Name another one."
                )
        super().__init__(
            info=_info_of(prefill.info, decode.info),
            capabilities=_capabilities_of(prefill.capabilities, decode.capabilities),
            execution=Parallel(),  # each of the two sees to its own calls
        )

    @property
    def concurrency(self) -> Literal["parallel", "serial", "owner"]:
        """``parallel`` where both are; else ``serial``, which they see to themselves."""
        both = {self.prefill.concurrency, self.decode.concurrency}
        return "parallel" if both == {"parallel"} else "serial"

    def placement(self) -> Placement:
        """Where both run, that of the prefill first; nodes are counted over both graphs."""
        first, second = self.prefill.placement(), self.decode.placement()
        nodes: dict[str, int] = {}
        for placement in (first, second):
            for provider, count in placement.nodes.items():
                nodes[provider] = nodes.get(provider, 0) + count
        return Placement(
            device="+".join(dict.fromkeys((first.device, second.device))),
            provider=f"{first.provider}+{second.provider}",
            nodes=nodes,
        )

    def _new_session(self, *, max_length: int, expected_length: int) -> PairedSession:
        return PairedSession(self, max_length=max_length, expected_length=expected_length)

    def _unload(self) -> None:
        try:
            self.prefill.close()
        finally:
            self.decode.close()


@dataclass(frozen=True, slots=True)
class _Active:
    """Where the cache of a sequence is now."""

    model: LoadedModel
    session: Session


class PairedSession(BaseSession):
    """One sequence, whose cache is in a session of either model, never in both.

    A call of at least ``PairedModel.prefill_from`` tokens goes to the model for prefills, and so
    do those that go on with a prompt there. Single tokens and `verify` go to the other. The cache
    follows when the next call comes, so that the first token need not wait for it.

    Args:
        model: The pair.
        max_length: The most tokens that it may hold.
        expected_length: Tokens to allocate for at first.
    """

    def __init__(self, model: PairedModel, *, max_length: int, expected_length: int) -> None:
        super().__init__(model, max_length=max_length)
        self._pair = model
        self._expected = min(expected_length, max_length)
        # Written under _state_lock, where an interruption reads it.
        self._active: _Active | None = None

    @property
    def floor(self) -> int:
        """The smallest length that `truncate` can reach now."""
        active = self._active
        return self._regime_floor() if active is None else active.session.floor

    @property
    def can_extend(self) -> bool:
        """Whether `prefill` may be called on a cache that is not empty."""
        active = self._active
        return active is None or active.session.can_extend

    def _append(self, token_ids: Sequence[int], *, every_position: bool) -> Logits:
        session = self._session_on(self._model_for(len(token_ids), every_position=every_position))
        if every_position:
            return session.verify(token_ids)
        if len(token_ids) == 1 and self._length:
            return session.decode(token_ids[0])
        return session.prefill(token_ids)

    def _append_only(self, token_ids: Sequence[int]) -> Logits:
        if len(token_ids) == 1:
            return self._append(token_ids, every_position=False)
        session = self._session_on(self._model_for(len(token_ids), every_position=False))
        return session.prefill(token_ids, needs_logits=False)

    def _model_for(self, count: int, *, every_position: bool) -> LoadedModel:
        """The model that a call of ``count`` tokens belongs to."""
        pair, active, total = self._pair, self._active, self._length + count
        window = self._info.window
        # A window that has rolled on leaves a cache that no other runtime takes.
        if every_position or count == 1 or (window is not None and total >= window):
            return pair.decode
        if active is not None and active.model is pair.prefill:
            return pair.prefill  # more of a prompt that began there
        is_long = count >= pair.prefill_from and count * _LARGEST_SHARE >= self._length
        return pair.prefill if is_long else pair.decode

    def _session_on(self, model: LoadedModel) -> Session:
        """A session of the model that holds the cache, which is moved there if need be."""
        active = self._active
        if active is None:
            return self._open(model)
        if active.model is model:
            return active.session
        cache = active.session.export_kv()
        # Freed before the other is made, so that there are two copies at a time and not three.
        with self._state_lock:
            self._active = None
        active.session.close()
        session = self._open(model)
        try:
            session.import_kv(replace(cache, weights_id=model.info.weights_id))
        except ValueError as error:
            raise BackendRuntimeError(f"The KV cache could not be handed over: {error}") from error
        return session

    def _open(self, model: LoadedModel) -> Session:
        session = model.new_session(
            max_length=self._max_length, expected_length=max(self._expected, self._length)
        )
        with self._state_lock:
            if self._state == "open":
                self._active = _Active(model, session)
                return session
        session.close()
        raise BackendRuntimeError("The call was ended while the cache was on its way.")

    def _truncate(self, length: int) -> None:
        if self._active is not None:
            self._active.session.truncate(length)

    def _export_kv(self) -> Sequence[KVLayer]:
        return self._held().export_kv().layers

    def _import_kv(self, cache: KVCache) -> None:
        session = self._session_on(self._pair.decode)
        session.import_kv(replace(cache, weights_id=self._pair.decode.info.weights_id))

    def _interrupt(self) -> None:
        # Between two sessions there is none; `_open` sees the state then.
        if self._active is not None:
            self._active.session.interrupt()

    def _free(self) -> None:
        with self._state_lock:
            active, self._active = self._active, None
        if active is not None:
            active.session.close()

    def _held(self) -> Session:
        assert self._active is not None  # noqa: S101  # as it holds tokens
        return self._active.session


def _info_of(prefill: ModelInfo, decode: ModelInfo) -> ModelInfo:
    """What holds for both; their weights_ids may differ, and nothing else that matters."""
    for name in ("vocab_size", "rope_boundary", "window"):
        found, wanted = getattr(prefill, name), getattr(decode, name)
        if found != wanted:
            raise UnsupportedModelError(
                f"The two runtimes have different models: {name} is {found} for prefill and "
                f"{wanted} for decode. Both must be conversions of one checkpoint."
            )
    return replace(
        decode,
        context_length=min(prefill.context_length, decode.context_length),
        eos_token_ids=prefill.eos_token_ids | decode.eos_token_ids,
        weights_id=_joint_id(prefill.weights_id, decode.weights_id),
    )


def _joint_id(prefill: str, decode: str) -> str:
    if prefill == decode:
        return decode
    return "pair:" + hashlib.sha256(f"{prefill}\0{decode}".encode()).hexdigest()


def _capabilities_of(prefill: Capabilities, decode: Capabilities) -> Capabilities:
    """What both can do; ``verify`` is the decoder's alone."""
    lacks: dict[str, Lack] = {
        "batch": Lack("not yet", "a batch would run on the runtime for decode alone")
    }
    parts: Mapping[str, Sequence[Capabilities]] = {"verify": [decode], "batch": []}
    for name in CAPABILITIES:
        for part in parts.get(name, [prefill, decode]):
            if name in part.lacks:
                lacks.setdefault(name, part.lacks[name])
    have = {name: name not in lacks for name in CAPABILITIES}
    return Capabilities(**have, lacks=lacks)
