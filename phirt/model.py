"""The face of the library: `load` a model, then `Model.generate` and `Model.stream`."""

from __future__ import annotations

import operator
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast

from phirt.devices.heap import trim_heap
from phirt.devices.names import DeviceName
from phirt.dispatch.registry import formats_of
from phirt.errors import ModelNotFoundError, SessionClosedError, UnsupportedModelError
from phirt.failover import LoadNext, Standby, check_failover
from phirt.generation.loop import DecodeLoop
from phirt.generation.params import GenerationParams
from phirt.generation.params_resolved import GenerationDefaults
from phirt.generation.score import score_tokens
from phirt.models.folder import ModelFolder
from phirt.protocols import LoadedModel, LoadOptions, Placement
from phirt.remote import Announce
from phirt.stream import Generation, TokenStream
from phirt.text.chat import ChatTemplate
from phirt.text.tokenizer import Tokenizer
from phirt.types import Artifact, ChatMessage, FloatArray, Optimize, ProgressCallback, PromptLike

if TYPE_CHECKING:
    from phirt.devices.machine import Trial
    from phirt.dispatch.plan import Plan, PlanCandidate
    from phirt.dispatch.select import Selection
    from phirt.planning import Prepared

__all__ = ["Model", "load"]

_MAX_THREADS = 1024


def load(
    model: str | Path | None = None,
    *,
    device: str = "auto",
    backend: str = "auto",
    precision: str = "auto",
    context: int | None = None,
    optimize: Optimize = "latency",
    threads: int | None = None,
    spinning: bool | None = None,
    options: Mapping[str, Any] | None = None,
    offline: bool = False,
    failover: bool = False,
    tune: bool = False,
    progress: ProgressCallback | None = None,
    announce: Announce | None = None,
) -> Model:
    """Load a model, fetching and converting it first if that has not been done yet.

    Args:
        model: A name (``"smollm2-135m-instruct"``), a hub's name
            (``"org/name[@revision][:subfolder-or-file]"``), a model folder, or a ``.gguf``
            file. None is the small default model.
        device: A device name such as ``"cpu"``; ``"auto"`` chooses. A named device is
            used, or an error is raised.
        backend: A backend name such as ``"onnxruntime"``; ``"auto"`` chooses.
        precision: How a checkpoint (a ``.gguf`` file, a folder of safetensors) is converted
            to what the backend reads: ``"fp32"``, ``"fp16"``, ``"bf16"``, ``"int8"``,
            ``"int4"``, ``"exact"`` (its own quantized values, repacked), or ``"auto"``: see
            docs/precision.md. A folder that the backend reads as it is has the precision
            that it was built with.
        context: Tokens of prompt and answer that there must be memory for; None for 2,048,
            or the model's own limit if that is less. It bounds nothing: memory is taken as
            it is needed.
        optimize: What ``"auto"`` chooses for, where speeds were measured: ``"latency"``,
            ``"prefill"`` or ``"throughput"``, as for `phirt.plan`.
        threads: Threads within one operator; None for what was measured best, or else the
            runtime's default.
        spinning: Whether idle threads spin while they wait for work: True is best on a
            machine that does nothing else, False on a busy one; None for what was measured
            best, or else a brief spin, which costs little on either.
        options: Settings of one runtime, by the names that the page of its backend gives;
            they need a named ``backend``.
        offline: Never touch the network; so does the environment variable
            ``HF_HUB_OFFLINE``.
        failover: Where the backend fails in the middle of a generation, go on with the next
            candidate of the plan: see docs/failover.md. Needs ``"auto"`` as ``device`` or
            ``backend``.
        tune: Time every candidate first that was not measured on this machine yet, and
            choose by that: minutes, once. `phirt.tune` does the same, and tells what came.
        progress: Called as a download or a conversion advances.
        announce: Called with a `phirt.PullPlan` before something is downloaded. What it
            raises ends the load.

    Returns:
        The model. Close it, or use it as a context manager, to free its weights.

    Raises:
        ModelError: The model cannot be found, read, trusted or run.
        BackendError: The backend is unknown, missing or broken, or failed.
        DeviceError: The device is not there, or its memory does not suffice.
        TypeError: An argument is of a wrong type.
        ValueError: A name is malformed or a setting out of range.
    """
    # Imported here: `import phirt` should stay quick.
    from phirt.dispatch.candidates import check_offered, machine_for
    from phirt.dispatch.plan import PlanRequest
    from phirt.dispatch.select import PlanLoader
    from phirt.planning import check_settings, name_of, prepare

    check_settings(model, precision=precision, context=context, optimize=optimize)
    _check_threads(threads, spinning)
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(f"options must be a mapping of names to values, not {options!r}")
    if options and backend == "auto":
        raise ValueError(
            f"options={dict(options)!r} are settings of one runtime: name its backend as well"
        )
    DeviceName.parse(device)
    if failover:
        check_failover(device=device, backend=backend)
    machine = machine_for(backend)
    check_offered(machine, device=device, backend=backend)
    request = PlanRequest(
        model=name_of(model),
        device=device,
        backend=backend,
        precision=precision,
        optimize=optimize,
    )

    def planned() -> Prepared:
        return prepare(
            model,
            machine=machine,
            request=request,
            context=context,
            offline=offline,
            progress=progress,
        )

    started = time.perf_counter()
    prepared = planned()
    if tune:
        # Imported here: few loads measure.
        from phirt.tuning import time_candidates

        if time_candidates(prepared, announce=announce):
            started = time.perf_counter()
            prepared = planned()
    find_folder = _FolderFinder(prepared, announce, started=started)
    loader = PlanLoader(
        machine,
        find_folder,
        LoadOptions(threads=threads, spinning=spinning, extra=dict(options or {})),
        try_first=_try_first,
        refusals=prepared.refusals,
    )
    with _explain_removal(find_folder.located):
        selection = loader.load(prepared.plan)
        try:
            load_next = loader.load_next if failover else None
            return Model(selection, started=find_folder.started, load_next=load_next)
        except BaseException:
            selection.loaded.close()
            raise


class _FolderFinder:
    """Finds or makes the folders of candidates, one load long.

    Attributes:
        started: When the load started, by `time.perf_counter`. A download or a conversion
            happens once, and is no part of it.
        located: The folders, in the order in which they were found.
    """

    def __init__(self, prepared: Prepared, announce: Announce | None, *, started: float) -> None:
        self._forms = prepared.forms
        self._announce = announce
        self.started = started
        self.located: list[Path] = []

    def __call__(self, candidate: PlanCandidate) -> ModelFolder:
        assert candidate.artifact is not None  # noqa: S101  # as that of all that are usable
        folder = self._forms.obtain(
            candidate.artifact,
            formats=formats_of(candidate.backend),
            device=DeviceName.parse(candidate.device).kind,
            announce=self._announce,
        )
        if candidate.artifact.state != "here":
            self.started = time.perf_counter()
        self.located.append(folder.artifact.path)
        return folder


def _try_first(backend: str, device: str) -> Trial:
    from phirt.dispatch.survey import Survey

    return Survey().trial(backend, device)


@contextmanager
def _explain_removal(located: Sequence[Path]) -> Iterator[None]:
    """Say that a model was removed, where that is behind whatever a runtime raised."""
    try:
        yield
    except Exception as error:
        if located and not located[-1].exists():
            raise ModelNotFoundError(
                f"The model at {located[-1]} was removed while it was being loaded."
            ) from error
        raise


def _check_threads(threads: object, spinning: object) -> None:
    if spinning is not None and not isinstance(spinning, bool):
        raise TypeError(f"spinning must be True, False or None, not {spinning!r}")
    if threads is None:
        return
    if isinstance(threads, bool) or not isinstance(threads, int):
        raise TypeError(f"threads must be an int or None, not {threads!r}")
    if not 1 <= threads <= _MAX_THREADS:
        raise ValueError(f"threads={threads} must be from 1 to {_MAX_THREADS}, or None")


class Model:
    """A loaded model. It may be used from many threads at once.

    Made by `load`. Each call of `generate` or `stream` is a request of its own, with its
    own KV cache.
    """

    def __init__(
        self, selection: Selection, *, started: float, load_next: LoadNext | None = None
    ) -> None:
        self._standby = Standby(selection, load_next)
        self._recover = self._standby.recover if load_next is not None else None
        folder = selection.folder
        self._defaults = GenerationDefaults.from_config(folder.generation_defaults)
        self._tokenizer = Tokenizer.from_file(folder.tokenizer_path)
        trim_heap()  # of what parsing left
        self._template = (
            None
            if folder.chat_template is None
            else ChatTemplate(folder.chat_template, **folder.special_tokens)
        )
        # The tokenizer's own end token counts too: a folder's configurations may disagree.
        end = folder.special_tokens.get("eos_token")
        end_id = None if end is None else self._tokenizer.token_to_id(end)
        self._eos_token_ids = frozenset() if end_id is None else frozenset({end_id})
        self._load_s = time.perf_counter() - started

    @property
    def _loaded(self) -> LoadedModel:
        return self._standby.current.loaded

    @property
    def _folder(self) -> ModelFolder:
        return self._standby.current.folder

    @property
    def name(self) -> str:
        """What the model is called: its catalog name, or that of its folder or file."""
        return self._folder.artifact.name

    @property
    def backend(self) -> str:
        """Name of the backend that runs it."""
        return self._standby.current.backend

    @property
    def device(self) -> str:
        """Name of the device that it runs on."""
        return self._standby.current.device

    @property
    def plan(self) -> Plan:
        """What was considered when it was loaded, and why it runs where it runs."""
        return self._standby.current.plan

    @property
    def placement(self) -> Placement:
        """Where its graph really runs, as the runtime tells."""
        return self._loaded.placement()

    @property
    def loaded(self) -> LoadedModel:
        """Its weights on their device, reduced to logits: what the decode loop drives."""
        return self._loaded

    @property
    def artifact(self) -> Artifact:
        """What it was loaded from: folder, format, and the identity of the weights."""
        return self._folder.artifact

    @property
    def path(self) -> Path:
        """The folder that it was loaded from."""
        return self._folder.artifact.path

    @property
    def precision(self) -> str | None:
        """How its weights are stored, where that is known."""
        return self._folder.artifact.precision

    @property
    def context_length(self) -> int:
        """Most tokens that prompt and output may have together."""
        return self._loaded.info.context_length

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to token ids and back."""
        return self._tokenizer

    @property
    def chat_template(self) -> ChatTemplate | None:
        """Renders chats as the model was trained on them, if it is a chat model."""
        return self._template

    @property
    def generation_defaults(self) -> GenerationDefaults:
        """What the model's own configuration says about sampling."""
        return self._defaults

    def generate(
        self, prompt: PromptLike, *, params: GenerationParams | None = None, **overrides: Any
    ) -> Generation:
        """Generate until a stop, and return all of it.

        Args:
            prompt: Raw text, a chat (a list of ``{"role": ..., "content": ...}``), or a
                list of token ids.
            params: How to generate; None for the model's own defaults.
            **overrides: Single parameters, by `GenerationParams`' names, over ``params``.

        Raises:
            ContextLengthError: Prompt and ``max_new_tokens`` exceed the context.
            GenerationError: The generation cannot go on.
            BackendRuntimeError: The runtime failed.
            TypeError: An unknown parameter, or one of a wrong type.
            ValueError: A parameter or token id out of range.
        """
        with self.stream(prompt, params=params, **overrides) as stream:
            for _ in stream:
                pass
            return stream.result

    def stream(
        self, prompt: PromptLike, *, params: GenerationParams | None = None, **overrides: Any
    ) -> TokenStream:
        """Generate token by token, as the stream is iterated.

        Arguments and errors are those of `generate`. Arguments are checked now; errors of
        the run are raised by the iteration.
        """
        if self._standby.is_closed():
            raise SessionClosedError(f"Model {self.name!r} is closed; load it again.")
        if overrides or params is None:
            params = (params or GenerationParams()).merge(**overrides)
        loop = DecodeLoop(
            self._loaded,
            self.encode(prompt),
            params,
            defaults=self._defaults,
            eos_token_ids=self._eos_token_ids,
            recover=self._recover,
        )
        return TokenStream(loop, self._tokenizer, load_s=self._load_s)

    def encode(self, prompt: PromptLike) -> list[int]:
        """The token ids that a prompt stands for.

        Text gets the tokenizer's own special tokens; a chat gets those of its template and
        no others; a list of ids is taken as it is.

        Raises:
            UnsupportedModelError: The prompt is a chat and the model has no template.
            TypeError: The prompt is none of the three.
        """
        kind = _kind_of(prompt)
        if kind == "text":
            return self._tokenizer.encode(cast("str", prompt))
        if kind == "ids":
            return [operator.index(token) for token in cast("list[int]", prompt)]
        if self._template is None:
            raise UnsupportedModelError(
                f"Model {self.name!r} has no chat template. Pass its prompt as text."
            )
        messages = cast("list[ChatMessage]", prompt)
        text = self._template.render(messages, add_generation_prompt=True)
        return self._tokenizer.encode(text, add_special_tokens=False)

    def score(self, prompt: PromptLike) -> FloatArray:
        """Log-probability of each token of a text, given those before it.

        Args:
            prompt: As for `generate`; n tokens, at least two.

        Returns:
            Natural log-probabilities, shape (n - 1,); the first token has none.

        Raises:
            UnsupportedModelError: The loaded graph cannot give logits of every position.
            ContextLengthError: The prompt is longer than the context.
        """
        return score_tokens(self._loaded, self.encode(prompt))

    def close(self) -> None:
        """Free the weights once the last stream has ended. Calling it again does nothing."""
        self._standby.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"<phirt.Model {self.name!r}: {self.precision or 'unknown precision'}, "
            f"{self.backend} on {self.device}>"
        )


def _kind_of(prompt: object) -> Literal["text", "chat", "ids"]:
    if isinstance(prompt, str):
        return "text"
    if isinstance(prompt, Sequence) and not isinstance(prompt, bytes | bytearray):
        if all(isinstance(item, Mapping) for item in prompt):
            return "chat" if prompt else "ids"
        if all(isinstance(item, Integral) for item in prompt):
            return "ids"
        kinds = " and ".join(sorted({type(item).__name__ for item in prompt}))
        found = f"{type(prompt).__name__} of {kinds}"
    else:
        found = type(prompt).__name__
    raise TypeError(
        "A prompt is a string, a list of chat messages ({'role': ..., 'content': ...}) or a list "
        f"of token ids, not {found}"
    )
