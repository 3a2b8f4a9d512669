"""Sequences on a decoder graph: their bindings, rebound at each step only where they change."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from phirt.backends.base import BaseSession, HostLogits, Positions
from phirt.backends.onnxruntime.cache import GrowingCache, SharedCache
from phirt.backends.onnxruntime.errors import translate
from phirt.backends.onnxruntime.logits import DeviceLogits
from phirt.protocols import KVCache, KVLayer, Logits
from phirt.types import FloatArray, IntArray

if TYPE_CHECKING:
    from phirt.backends.onnxruntime.adapter import OrtModel

__all__ = ["GrowingSession", "OrtSession", "SharedSession"]

_MASK_BUCKET = 256


class OrtSession(BaseSession):
    """What both kinds of cache have in common: inputs, logits, and the run.

    Args:
        model: The loaded model.
        max_length: The most tokens that it may hold.
    """

    def __init__(self, model: OrtModel, *, max_length: int) -> None:
        super().__init__(model, max_length=max_length)
        self._model = model
        self._inference = model.inference
        self._binding = self._inference.io_binding()
        self._run_options = model.run_options()
        graph = model.graph
        self._token = np.zeros((1, 1), np.int64)
        self._token_value = model.ort.OrtValue.ortvalue_from_numpy(self._token)
        self._position = np.zeros((1, 1), np.int64)
        self._position_value = model.ort.OrtValue.ortvalue_from_numpy(self._position)
        self._keep = np.ones(1, np.int64)
        self._keep_value = model.ort.OrtValue.ortvalue_from_numpy(self._keep)
        self._logits = np.zeros((1, 1, graph.vocab_size), graph.logits_type.storage)
        self._logits_value = model.memory.place(self._logits, graph.logits_type)
        self._mask = np.ones((1, 0), np.int64)
        # What the binding holds now, so that a step rebinds only what changes.
        self._bound_token = False
        self._bound_logits = False
        self._bound_keep = 0
        self._bound_branch: bool | None = None

    def _append(self, token_ids: Sequence[int], *, every_position: bool) -> Logits:
        return self._in_runs(token_ids, which="every" if every_position else "last")

    def _append_only(self, token_ids: Sequence[int]) -> Logits:
        return self._in_runs(token_ids, which="none")

    def _in_runs(self, token_ids: Sequence[int], *, which: Positions) -> Logits:
        """Run the tokens, no more of them at once than the load allows."""
        if len(token_ids) == 1:
            return self._step(token_ids, self._length, which=which)
        limit = self._model.tokens_per_run
        # Graphs choose LongRoPE's factors by the length of each run, so that the first call
        # of a long session cannot be run in parts.
        is_first_of_long = self._regime == "long" and self._length == 0
        # For all runs at once: what grows between two of them takes over what was there before.
        self._make_room(len(token_ids))
        past = self._length
        if which != "every" and not is_first_of_long:
            done = self._run_in_floats(token_ids if which == "none" else token_ids[:-1])
            past, token_ids = past + done, token_ids[done:]
            if not token_ids:
                return self._no_logits()
        count = len(token_ids)
        if limit is None or count <= limit or is_first_of_long:
            return self._step(token_ids, past, which=which)
        parts = []
        for start in range(0, count, limit):
            part = token_ids[start : start + limit]
            wanted = "none" if which == "last" and start + limit < count else which
            logits = self._step(part, past + start, which=wanted)
            if which == "every":
                parts.append(logits.numpy().copy())
        return HostLogits(np.concatenate(parts)) if parts else logits

    def _step(self, token_ids: Sequence[int], past: int, *, which: Positions) -> Logits:
        """Run tokens that follow ``past`` others."""
        count = len(token_ids)
        if which == "none" and not self._model.can_skip_logits:
            which = "last"
        self._bind_cache(past, count)
        self._bind_inputs(token_ids, past)
        in_place = self._bind_logits(count, which=which)
        try:
            self._inference.run_with_iobinding(self._binding, self._run_options)
            self._keep_cache()
        except Exception as error:
            raise translate(error, f"running {count} tokens") from error
        if which == "none":
            return self._no_logits()
        return self._take_logits(in_place=in_place, every_position=which == "every")

    def _make_room(self, count: int) -> None:
        """Have room for so many tokens more."""

    def _no_logits(self) -> Logits:
        return HostLogits(np.empty((0, self._model.graph.vocab_size), np.float32))

    def _run_in_floats(self, token_ids: Sequence[int]) -> int:  # noqa: ARG002  # another cache can
        """Run tokens with float activations, where the load asks for it; how many were run."""
        return 0

    def _bind_inputs(self, token_ids: Sequence[int], past: int) -> None:
        graph, binding = self._model.graph, self._binding
        count, total = len(token_ids), past + len(token_ids)
        if count == 1:
            self._token[0, 0] = token_ids[0]
            self._position[0, 0] = past
            if not self._bound_token:
                binding.bind_ortvalue_input(graph.input_ids, self._token_value)
                if graph.position_ids is not None:
                    binding.bind_ortvalue_input(graph.position_ids, self._position_value)
        else:
            binding.bind_cpu_input(graph.input_ids, np.array(token_ids, np.int64)[None])
            if graph.position_ids is not None:
                positions: IntArray = np.arange(past, total, dtype=np.int64)[None]
                binding.bind_cpu_input(graph.position_ids, positions)
        # A device's input is copied when it is bound, so that it must be bound again.
        self._bound_token = count == 1 and self._model.memory.on_host
        if graph.attention_mask is not None:
            binding.bind_cpu_input(graph.attention_mask, self._mask_of(total))
        if graph.use_cache_branch is not None and self._bound_branch != (past > 0):
            binding.bind_cpu_input(graph.use_cache_branch, np.array([past > 0]))
            self._bound_branch = past > 0

    def _mask_of(self, total: int) -> IntArray:
        """The mask of a sequence of ``total`` tokens, (1, width)."""
        if total > self._mask.shape[1]:
            width = -(-total // _MASK_BUCKET) * _MASK_BUCKET
            self._mask = np.ones((1, width), np.int64)
        return self._mask[:, :total]

    def _bind_logits(self, count: int, *, which: Positions) -> bool:
        """Bind the output, and say whether it is the session's own one-row buffer."""
        graph, binding, memory = self._model.graph, self._binding, self._model.memory
        # Graphs slice from minus so many on: from +count on there is no position left, and the
        # LM head has no rows to compute.
        keep = {"none": -count, "last": 1, "every": count}[which]
        if graph.num_logits_to_keep is not None and keep != self._bound_keep:
            # An input with a default is bound as a value: binding it by its array looks
            # for it among the required inputs only.
            self._keep[0] = keep
            binding.bind_ortvalue_input(graph.num_logits_to_keep, self._keep_value)
            self._bound_keep = keep
        one_row = which != "none" and (count == 1 or (which == "last" and graph.prunes_logits))
        if not one_row:
            # onnxruntime allocates it, since its shape is the graph's to know.
            binding.bind_output(graph.logits, memory.device_type, memory.device_id)
        elif not self._bound_logits:
            binding.bind_ortvalue_output(graph.logits, self._logits_value)
        self._bound_logits = one_row
        return one_row

    def _take_logits(self, *, in_place: bool, every_position: bool) -> Logits:
        element, memory = self._model.graph.logits_type, self._model.memory
        if in_place and memory.on_host:
            return HostLogits(element.to_float32(self._logits[0]))
        # Outputs are listed in the order in which they were first bound: the cache when
        # the session was made, the logits after it.
        value = self._logits_value if in_place else self._binding.get_outputs()[-1]
        if not memory.on_host:
            return DeviceLogits(self._model, value, every_position=every_position)
        stored = memory.read(value, element)[0]
        rows = stored if every_position else stored[-1:]
        return HostLogits(np.ascontiguousarray(element.to_float32(rows)))

    def _interrupt(self) -> None:
        self._run_options.terminate = True

    def _let_go(self) -> None:
        """Let go of the bindings, and of what WebGPU keeps until something is read back."""
        memory, element = self._model.memory, self._model.graph.logits_type
        if not memory.on_host:
            with contextlib.suppress(Exception):  # a lost device has nothing to let go of
                memory.read(self._logits_value, element)
        self._binding = self._inference = None

    def _check_layers(self, cache: KVCache) -> list[FloatArray]:
        """The cache's keys and values in the order of the graph's inputs."""
        graph = self._model.graph
        wanted = (graph.kv_heads, cache.length, graph.head_size)
        found = [array for layer in cache.layers for array in (layer.key, layer.value)]
        if len(found) != len(graph.past) or any(array.shape != wanted for array in found):
            shapes = sorted({array.shape for array in found})
            raise ValueError(
                f"The cache holds {len(found)} tensors of shapes {shapes[:3]}; this model needs "
                f"{len(graph.past)} of {wanted}: a window that has rolled on cannot be taken over."
            )
        return found

    @abc.abstractmethod
    def _bind_cache(self, past: int, count: int) -> None:
        """Bind past and present for ``count`` tokens after ``past`` others."""

    @abc.abstractmethod
    def _keep_cache(self) -> None:
        """Take over what the run made of the cache."""


class SharedSession(OrtSession):
    """A sequence in one row of a shared buffer.

    Args:
        model: The loaded model.
        max_length: The most tokens that it may hold.
        expected_length: Tokens to make room for now.
        cache: The buffer, or None for one of its own.
        row: Its row there.
    """

    def __init__(
        self,
        model: OrtModel,
        *,
        max_length: int,
        expected_length: int = 0,
        cache: SharedCache | None = None,
        row: int = 0,
    ) -> None:
        super().__init__(model, max_length=max_length)
        self._cache = cache or SharedCache(
            model.graph,
            model.memory,
            rows=1,
            limit=max_length,
            least=model.least_capacity,
        )
        self._row = row
        self._bound_version = 0
        self._reserve(min(expected_length, max_length))

    @property
    def row(self) -> int:
        """Its row of the buffer."""
        return self._row

    def _reserve(self, length: int) -> None:
        self._cache.reserve(length, [self._length])

    def _bind_cache(self, past: int, count: int) -> None:
        if past + count > self._cache.capacity:
            self._reserve(past + count)
        if self._bound_version != self._cache.version:
            self._cache.bind(self._binding, self._row, 1)
            self._bound_version = self._cache.version

    def _make_room(self, count: int) -> None:
        if self._length + count > self._cache.capacity:
            self._reserve(self._length + count)

    def _run_in_floats(self, token_ids: Sequence[int]) -> int:
        prefill = self._model.float_prefill
        if prefill is None or len(token_ids) < prefill.least:
            return 0
        count, step = len(token_ids), self._model.tokens_per_run or len(token_ids)
        for start in range(0, count, step):
            part = token_ids[start : start + step]
            try:
                past = self._length + start
                prefill.run(part, past, self._cache, self._row, self._run_options)
            except Exception as error:
                raise translate(error, f"running {count} tokens in floats") from error
        return count

    def _keep_cache(self) -> None:
        """Nothing to do: it was written in place."""

    def _truncate(self, length: int) -> None:
        """Nothing to do: what lies beyond the length is never read, and is overwritten."""

    def _export_kv(self) -> Sequence[KVLayer]:
        return as_layers(self._cache.read(self._row, self._length))

    def _import_kv(self, cache: KVCache) -> None:
        layers = self._check_layers(cache)
        self._reserve(cache.length)
        self._cache.write(self._row, layers)

    def _free(self) -> None:
        self._cache.release()
        self._let_go()


class GrowingSession(OrtSession):
    """A sequence whose keys and values each step makes anew."""

    def __init__(self, model: OrtModel, *, max_length: int) -> None:
        super().__init__(model, max_length=max_length)
        self._cache = GrowingCache(model.graph, model.memory)

    def _bind_cache(self, past: int, count: int) -> None:  # noqa: ARG002  # another cache needs it
        self._cache.bind(self._binding)

    def _keep_cache(self) -> None:
        # The cache's outputs were the first that were ever bound.
        self._cache.take(self._binding.get_outputs()[: len(self._model.graph.present)])

    def _truncate(self, length: int) -> None:
        self._cache.truncate(length)

    def _export_kv(self) -> Sequence[KVLayer]:
        return as_layers(self._cache.read())

    def _import_kv(self, cache: KVCache) -> None:
        self._cache.write(self._check_layers(cache))

    def _free(self) -> None:
        self._cache.release()
        self._let_go()


def as_layers(arrays: Sequence[FloatArray]) -> list[KVLayer]:
    """Keys and values in turn, as layers that begin at position 0."""
    pairs = zip(arrays[::2], arrays[1::2], strict=True)
    return [KVLayer(start=0, key=key, value=value) for key, value in pairs]
