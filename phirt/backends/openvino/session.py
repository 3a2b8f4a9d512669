"""A session on OpenVINO: an infer request, whose states are the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from phirt.backends.base import BaseModel, BaseSession, HostLogits
from phirt.backends.openvino.graph import KEEP_INPUT, DecoderGraph, State
from phirt.backends.openvino.runtime import translate
from phirt.errors import BackendRuntimeError
from phirt.protocols import KVCache, KVLayer, Logits
from phirt.types import FloatArray

__all__ = ["OpenVinoSession", "run_once"]

_BUCKET = 256  # tokens; the attention mask is allocated in multiples of it
# Tokens of a prompt that run at once. A graph makes a mask of (tokens, tokens so far), which for
# a whole prompt of 32,000 would take 4 GB; in pieces of this size a prompt is as fast.
_CHUNK = 1024


class OpenVinoSession(BaseSession):
    """One sequence.

    Args:
        model: The model that it is of.
        ov: The module ``openvino``.
        request: An infer request of its own.
        recover: Called after a call that failed, see `run_once`.
        graph: What the request's graph takes and holds.
        max_length: The most tokens that it may hold.
        expected_length: Tokens to allocate for now.
    """

    def __init__(
        self,
        model: BaseModel,
        ov: Any,
        request: Any,
        graph: DecoderGraph,
        *,
        recover: Callable[[], None],
        max_length: int,
        expected_length: int,
    ) -> None:
        super().__init__(model, max_length=max_length)
        self._ov = ov
        self._request = request
        self._graph = graph
        self._recover = recover
        # OpenVINO reads inputs where they lie, and does not keep them alive.
        self._inputs: dict[str, Any] = {}
        self._mask = np.ones((1, 0), np.int64)
        self._reserve(min(expected_length, max_length))
        # Bound once, and changed in place from step to step.
        self._token = np.zeros((1, 1), np.int64)
        self._position = np.zeros((1, 1), np.int64)
        self._keep = np.ones(1, np.int64)
        self._beam = np.zeros(1, np.int32)
        self._bound_one = False
        self._set("beam_idx", self._beam)
        self._set(KEEP_INPUT, self._keep)

    def _append(self, token_ids: Sequence[int], *, every_position: bool) -> Logits:
        count, done = len(token_ids), self._length
        for chunk in self._chunks(token_ids, whole=every_position):
            if self._state == "interrupted":
                raise BackendRuntimeError(f"The call was ended after {done} tokens.")
            try:
                logits = self._run_chunk(chunk, done, every_position=every_position)
            except Exception as error:
                self._recover()
                raise translate(error, f"running {count} tokens after {self._length}") from error
            done += len(chunk)
        if self._state == "interrupted":
            raise BackendRuntimeError(f"The call was ended after {done} tokens.")
        rows = logits[0] if every_position else logits[0, -1:]
        return HostLogits(rows.astype(np.float32, copy=False))

    def _chunks(self, token_ids: Sequence[int], *, whole: bool) -> Iterator[Sequence[int]]:
        """Pieces that run one after the other; ``whole`` if logits of all are wanted."""
        # The first call of a LongRoPE session decides on its factors, and must be long enough.
        first = 0 if self._length else self._info.first_call(self._max_length)
        size = len(token_ids) if whole else max(_CHUNK, first)
        for start in range(0, len(token_ids), size):
            yield token_ids[start : start + size]

    def _run_chunk(self, token_ids: Sequence[int], past: int, *, every_position: bool) -> Any:
        """Run tokens after ``past`` others; the logits are valid until the next call."""
        self._bind(token_ids, past)
        self._keep[0] = len(token_ids) if every_position else 1
        self._request.start_async()
        self._request.wait()
        return self._request.get_tensor("logits").data

    def _bind(self, token_ids: Sequence[int], past: int) -> None:
        count, total = len(token_ids), past + len(token_ids)
        self._reserve(total)
        self._set("attention_mask", self._mask[:, :total])
        if count > 1:
            self._set("input_ids", np.array(token_ids, np.int64)[None])
            self._set("position_ids", np.arange(past, total, dtype=np.int64)[None])
        else:
            self._token[0, 0] = token_ids[0]
            self._position[0, 0] = past
            if not self._bound_one:
                self._set("input_ids", self._token)
                self._set("position_ids", self._position)
        self._bound_one = count == 1

    def _set(self, name: str, array: Any) -> None:
        if name in self._graph.inputs:
            self._request.set_tensor(name, self._ov.Tensor(array, shared_memory=True))
            self._inputs[name] = array

    def _reserve(self, length: int) -> None:
        if self._mask.shape[1] < length:
            self._mask = np.ones((1, -(-length // _BUCKET) * _BUCKET), np.int64)

    def _truncate(self, length: int) -> None:
        try:
            if length == 0:
                self._request.reset_state()
                return
            for state in self._named_states().values():
                kept = np.ascontiguousarray(state.state.data[:, :, :length])
                state.state = self._ov.Tensor(kept)
        except Exception as error:
            self._state = "failed"
            raise translate(error, f"going back to {length} tokens") from error

    def _export_kv(self) -> list[KVLayer]:
        states = self._named_states()

        def read(state: State) -> FloatArray:
            return np.array(states[state.name].state.data[0], np.float32)

        try:
            return [KVLayer(0, read(key), read(value)) for key, value in self._graph.cache]
        except Exception as error:
            raise translate(error, f"copying a cache of {self._length} tokens") from error

    def _import_kv(self, cache: KVCache) -> None:
        values: dict[str, FloatArray] = {}
        if cache.length and len(cache.layers) != len(self._graph.cache):
            raise ValueError(
                f"The cache has {len(cache.layers)} layers; the model has {len(self._graph.cache)}."
            )
        for layer, (key, value) in zip(cache.layers, self._graph.cache, strict=False):
            for state, array in ((key, layer.key), (value, layer.value)):
                wanted = (state.heads, cache.length, state.size)
                if layer.start != 0 or array.shape != wanted:
                    raise ValueError(
                        f"The cache holds {array.shape} from position {layer.start} for "
                        f"{state.name}; the model needs {wanted} from 0."
                    )
                values[state.name] = np.ascontiguousarray(array, np.float32)[None]
        states = self._named_states() if values else {}
        try:
            for name, array in values.items():
                # Half the width where a graph keeps its cache in float16.
                states[name].state = self._ov.Tensor(array.astype(states[name].state.data.dtype))
        except Exception as error:
            raise translate(error, f"taking over a cache of {cache.length} tokens") from error

    def _named_states(self) -> dict[str, Any]:
        return {state.name: state for state in self._request.query_state()}

    def _interrupt(self) -> None:
        """Nothing to do: the state is looked at between two pieces.

        OpenVINO can cancel a running call. But its CPU plugin (2026.4) then fails at later
        calls of the compiled model, and now and then ends the process.
        """

    def _free(self) -> None:
        self._request = None  # This waits for a call that an exception left running.
        self._inputs.clear()


def run_once(request: Any, graph: DecoderGraph, length: int) -> None:
    """Run a prompt of padding on a fresh request, for its effect on the compiled model.

    The CPU plugin keeps the shapes of its last call. After one that ended half-way, out of
    memory, it fails at calls of the lengths that came before (2026.4), until one of
    another length makes it compute all shapes anew.

    Args:
        request: An infer request that nothing else uses.
        graph: What its graph takes.
        length: Tokens.
    """
    inputs = {
        "input_ids": np.zeros((1, length), np.int64),
        "attention_mask": np.ones((1, length), np.int64),
        "position_ids": np.arange(length, dtype=np.int64)[None],
        "beam_idx": np.zeros(1, np.int32),
        KEEP_INPUT: np.ones(1, np.int64),
    }
    request.infer({name: array for name, array in inputs.items() if name in graph.inputs})
