"""A causal language model of transformers, driven one call at a time."""

from __future__ import annotations

import inspect
import re
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np

from phirt.backends.base import BaseModel, BaseSession
from phirt.backends.execution import InTurn
from phirt.backends.native_errors import first_line
from phirt.backends.placement import place_bytes
from phirt.backends.transformers.cache import InterruptedRun, LayerShape, SessionCache
from phirt.backends.transformers.devices import native_names
from phirt.errors import (
    BackendRuntimeError,
    OutOfMemoryError,
    UnsupportedModelError,
)
from phirt.models.folder import ModelFolder
from phirt.protocols import (
    Capabilities,
    KVCache,
    KVLayer,
    Lack,
    Logits,
    ModelInfo,
    Placement,
    TopK,
)
from phirt.types import FloatArray

__all__ = ["TransformersModel", "translate"]

_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|not enough memory|bad.?alloc",
    re.IGNORECASE,
)
# transformers 5.24 renamed the argument of every model. It takes the older name too, until 5.40,
# with a warning at each call.
_CACHE_ARGUMENTS = ("cache", "past_key_values")
_CAPABILITIES = Capabilities(
    truncate=True,
    verify=True,
    interrupt=True,
    kv=True,
    topk=True,
    lacks={"batch": Lack("not yet", "phirt gives transformers one sequence at a time so far")},
)


def translate(error: BaseException, doing: str) -> BackendRuntimeError | OutOfMemoryError:
    """Say in phirt's words what torch or transformers raised; the caller chains the original."""
    kind = type(error).__name__
    # torch.OutOfMemoryError is a RuntimeError, and so is what the CPU's allocator raises.
    if (
        isinstance(error, MemoryError)
        or kind == "OutOfMemoryError"
        or _OUT_OF_MEMORY.search(str(error))
    ):
        return OutOfMemoryError(
            f"Out of memory while {doing}: {first_line(error)}. Ask for fewer tokens, or load a "
            "smaller model."
        )
    return BackendRuntimeError(f"transformers failed while {doing}: {kind}: {first_line(error)}")


class TransformersModel(BaseModel):
    """A module on one device.

    Args:
        torch: The module.
        transformers: The module.
        network: The causal language model, on its device.
        folder: The folder that its weights are from.
        device: The device asked for, in phirt's words.
        threads: Threads within one operator; None for torch's setting.
    """

    def __init__(
        self,
        torch: Any,
        transformers: Any,
        network: Any,
        *,
        folder: ModelFolder,
        device: str,
        threads: int | None,
    ) -> None:
        self.torch = torch
        self.transformers = transformers
        self.network = network
        self.threads = threads
        self.device = next(network.parameters()).device
        self._names = native_names(torch, device)
        weights = _bytes_by_device([*network.parameters(), *network.buffers()])
        self._placement = place_bytes(weights, self._names, device=device, of="weights")
        self._accepted = frozenset(inspect.signature(network.forward).parameters)
        self._cache_argument = _cache_argument(network, self._accepted)
        self.shapes, vocab_size = self._try_out()
        facts = folder.facts
        super().__init__(
            info=ModelInfo(
                vocab_size=vocab_size,
                context_length=facts.context_length,
                eos_token_ids=frozenset(facts.eos_token_ids),
                weights_id=folder.artifact.weights_id,
                rope_boundary=facts.rope_boundary,
                window=facts.window,
            ),
            capabilities=_CAPABILITIES,
            # Modules have state that a forward pass changes (LongRoPE's frequencies), and one
            # pass already uses every core.
            execution=InTurn(),
            native=network,
        )

    def placement(self) -> Placement:
        """The device of the weights and of a first result; every tensor was looked at."""
        return self._placement

    def forward(
        self, token_ids: Sequence[int], *, start: int, cache: Any, every_position: bool
    ) -> Any:
        """Logits of the last or of every position, shape (n, vocab), on the device.

        Args:
            token_ids: The tokens.
            start: Position of the first.
            cache: transformers' cache, which they are appended to.
            every_position: Whether to compute every position's logits.
        """
        torch = self.torch
        count = len(token_ids)
        with torch.inference_mode(), self._threads():
            positions = torch.arange(start, start + count, device=self.device)[None]
            # One sequence without padding needs no attention mask of its own; transformers
            # makes the causal one, and the window's, from the cache's length.
            optional = {"position_ids": positions, "logits_to_keep": 0 if every_position else 1}
            output = self.network(
                input_ids=torch.tensor([list(token_ids)], device=self.device),
                use_cache=True,
                return_dict=True,
                **{self._cache_argument: cache},
                **{key: value for key, value in optional.items() if key in self._accepted},
            )
            logits = output.logits[0]
            return logits if every_position else logits[-1:]

    def _try_out(self) -> tuple[list[LayerShape], int]:
        """Run one token, and see what each layer caches and how many logits there are."""
        cache = self.transformers.DynamicCache()
        try:
            logits = self.forward([0], start=0, cache=cache, every_position=False)
        except Exception as error:
            raise translate(error, "trying the model out on one token") from error
        layers = cache.layers
        if not layers or any(layer.keys is None for layer in layers):
            raise UnsupportedModelError(
                f"{type(self.network).__name__} does not cache keys and values for each of its "
                "layers, which phirt needs. Pass another model."
            )
        held = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
        results = _bytes_by_device([logits, *held])
        place_bytes(results, self._names, device=self._placement.device, of="first result")
        return [LayerShape.of(layer) for layer in layers], logits.shape[-1]

    def _threads(self) -> AbstractContextManager[None]:
        if self.threads is None:
            return nullcontext()
        return _process_threads.set_to(self.threads, self.torch)

    def _new_session(self, *, max_length: int, expected_length: int) -> TransformersSession:
        return TransformersSession(self, max_length=max_length, expected_length=expected_length)

    def _unload(self) -> None:
        self.network = None
        # torch keeps freed device memory for itself; other runtimes may need it.
        if self.device.type != "cpu":
            getattr(self.torch, self.device.type).empty_cache()


class _ProcessThreads:
    """torch's number of threads, which is the process's: a model's own during its calls."""

    def __init__(self) -> None:
        # Reentrant: a garbage collection while it is held may do anything.
        self._lock = threading.RLock()
        self._users = 0
        self._before = 0

    @contextmanager
    def set_to(self, count: int, torch: Any) -> Iterator[None]:
        """Use so many threads, and afterwards as many as before the first of such calls."""
        with self._lock:
            # What is found during another model's call is that model's number.
            if self._users == 0:
                self._before = torch.get_num_threads()
            self._users += 1
        torch.set_num_threads(count)
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                torch.set_num_threads(self._before)


_process_threads = _ProcessThreads()


def _cache_argument(network: Any, accepted: frozenset[str]) -> str:
    """The name by which a forward pass takes a cache from its caller."""
    for name in _CACHE_ARGUMENTS:
        if name in accepted:
            return name
    raise UnsupportedModelError(
        f"{type(network).__name__} takes no KV cache from its caller, which phirt needs. "
        "Pass another model."
    )


def _bytes_by_device(tensors: Iterable[Any]) -> Counter[str]:
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[str(tensor.device)] += tensor.numel() * tensor.element_size()
    return sizes


class TransformersSession(BaseSession):
    """One sequence, in buffers of its own."""

    def __init__(self, model: TransformersModel, *, max_length: int, expected_length: int) -> None:
        super().__init__(model, max_length=max_length)
        self._model = model
        self._cache = SessionCache(
            model.torch, model.transformers, model.shapes, max_length=max_length
        )
        self._interrupted = self._cache.interrupted
        self._reserve(min(expected_length, max_length))

    def _append(self, token_ids: Sequence[int], *, every_position: bool) -> Logits:
        count = len(token_ids)
        self._reserve(self._length + count)
        try:
            values = self._model.forward(
                token_ids,
                start=self._length,
                cache=self._cache.native,
                every_position=every_position,
            )
        except InterruptedRun as error:
            raise BackendRuntimeError("The forward pass was interrupted.") from error
        except Exception as error:
            raise translate(error, f"running {count} tokens") from error
        return _TorchLogits(self._model.torch, values)

    def _reserve(self, length: int) -> None:
        try:
            self._cache.reserve(length)
        except (MemoryError, RuntimeError) as error:
            raise translate(error, f"allocating a KV cache for {length} tokens") from error

    def _truncate(self, length: int) -> None:
        self._cache.truncate(length)

    def _interrupt(self) -> None:
        self._interrupted.set()

    def _export_kv(self) -> list[KVLayer]:
        return self._cache.export()

    def _import_kv(self, cache: KVCache) -> None:
        try:
            self._cache.take_over(cache)
        except (MemoryError, RuntimeError) as error:
            raise translate(error, f"taking over a KV cache of {cache.length} tokens") from error

    def _free(self) -> None:
        del self._cache


class _TorchLogits:
    """Logits on the device.

    Args:
        torch: The module.
        values: Shape (n, vocab), of any floating dtype.
    """

    __slots__ = ("_torch", "_values")

    def __init__(self, torch: Any, values: Any) -> None:
        self._torch = torch
        self._values = values

    def numpy(self) -> FloatArray:
        """The logits, shape (n, vocab), float32."""
        array: FloatArray = self._values.to("cpu", self._torch.float32).numpy()
        return array

    def top(self, k: int) -> TopK:
        """The k largest logits of each position, chosen on the device."""
        vocab_size = self._values.shape[1]
        if not 1 <= k <= vocab_size:
            raise ValueError(f"k={k} must be from 1 to the vocabulary's size, {vocab_size}")
        torch = self._torch
        with torch.inference_mode():
            logits = self._values.float()
            values, ids = (part.cpu().numpy() for part in logits.topk(k, dim=1))
            total = logits.logsumexp(dim=1).cpu().numpy()
        # Equal ones by ascending id, which torch does not promise.
        order = np.lexsort((ids, -values), axis=1)
        return TopK(
            np.take_along_axis(ids, order, axis=1),
            np.take_along_axis(values, order, axis=1),
            total,
        )
