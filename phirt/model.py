"""The face of the library: `Model.generate` and `Model.stream`; `phirt.load` makes models."""

from __future__ import annotations

import operator
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast

from phirt.alternatives import generate_several
from phirt.devices.heap import trim_heap
from phirt.errors import SessionClosedError, UnsupportedModelError
from phirt.failover import LoadNext, Standby
from phirt.generation.draft_model import ModelDrafter
from phirt.generation.failover import Takeover
from phirt.generation.loop import DecodeLoop
from phirt.generation.params import GenerationParams
from phirt.generation.params_resolved import GenerationDefaults
from phirt.generation.prefix import PrefixCache
from phirt.generation.score import score_tokens
from phirt.generation.several import SeveralSequences
from phirt.generation.sharing import MOST_ROWS, SharedModel, can_share
from phirt.generation.speculation import StepCosts
from phirt.many import run_streams
from phirt.models.folder import ModelFolder
from phirt.prefix_files import load_prefix, save_prefix
from phirt.prefixes import bytes_per_token
from phirt.protocols import LoadedModel, Placement
from phirt.stream import Generation, TokenStream
from phirt.text.chat import ChatTemplate
from phirt.text.tokenizer import Tokenizer
from phirt.types import Artifact, ChatMessage, FloatArray, PromptLike

if TYPE_CHECKING:
    from phirt.dispatch.plan import Plan
    from phirt.dispatch.select import Selection

__all__ = ["Model"]


class Model:
    """A loaded model. It may be used from many threads at once.

    Made by `load`. Each call of `generate` or `stream` is a request of its own, with its
    own KV cache, which the next request that begins with the same tokens goes on from.
    """

    def __init__(
        self,
        selection: Selection,
        *,
        started: float,
        prefixes: PrefixCache | None = None,
        load_next: LoadNext | None = None,
    ) -> None:
        self._standby = Standby(selection, load_next)
        self._recover = self._take_over if load_next is not None else None
        self._prefixes = prefixes
        self._step_costs = StepCosts()
        self._shared: SharedModel | None = None
        self._sharing = threading.Lock()
        # Those whose tokens were compared with this model's.
        self._assistants: weakref.WeakSet[Model] = weakref.WeakSet()
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
        """Name of the backend that runs it; of two, that for prefill, ``+``, that for decode."""
        return self._standby.current.backend

    @property
    def device(self) -> str:
        """Name of the device that it runs on; of two that differ, as `backend` has them."""
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
    def kv_precision(self) -> str:
        """What its KV cache was asked for in; ``"auto"`` for what its backend does by itself."""
        return self.plan.kv_precision

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
        self,
        prompt: PromptLike,
        *,
        params: GenerationParams | None = None,
        assistant_model: Model | None = None,
        **overrides: Any,
    ) -> Generation:
        """Generate until a stop, and return all of it.

        With ``n`` above 1, the other sequences are the result's ``alternatives``.

        Args:
            prompt: Raw text, a chat (a list of ``{"role": ..., "content": ...}``), or a
                list of token ids.
            params: How to generate; None for the model's own defaults.
            assistant_model: A smaller model with the same tokens, whose guesses this one judges:
                another speed, the same choices. It stays the caller's to close.
            **overrides: Single parameters, by `GenerationParams`' names, over ``params``.

        Raises:
            UnsupportedModelError: The assistant model has other tokens.
            UnsupportedParameterError: One of the two models cannot take part in guessing.
            ContextLengthError: Prompt and ``max_new_tokens`` exceed the context.
            GenerationError: The generation cannot go on.
            BackendRuntimeError: The runtime failed.
            TypeError: An unknown parameter, or one of a wrong type.
            ValueError: A parameter or token id out of range, or parameters that contradict
                each other.
        """
        params = self._params_for(params, overrides)
        if params.is_several:
            if assistant_model is not None:
                raise ValueError(
                    "assistant_model guesses the tokens of one sequence, and num_beams or n asks "
                    "for several: leave one of them out"
                )
            return self._generate_several(self.encode(prompt), params)
        with self.stream(prompt, params=params, assistant_model=assistant_model) as stream:
            for _ in stream:
                pass
            return stream.result

    def generate_many(
        self,
        prompts: Sequence[PromptLike],
        *,
        params: GenerationParams | None = None,
        **overrides: Any,
    ) -> list[Generation]:
        """Generate for many prompts at once, where the backend can in shared steps.

        Each result is what `generate` returns for its prompt. Where a seed is given, all
        prompts have it.

        Args:
            prompts: As for `generate`; at most 32 run at once, and the others follow.
            params: How to generate; None for the model's own defaults.
            **overrides: Single parameters, by `GenerationParams`' names, over ``params``.

        Returns:
            One result a prompt, in their order.

        Raises:
            Exception: As `generate`. The first failure ends all of them; bad arguments are
                refused before anything runs.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts must be a sequence of prompts, not a single string")
        streams = [self.stream(prompt, params=params, **overrides) for prompt in prompts]
        return run_streams(streams, most=MOST_ROWS)

    def _generate_several(self, prompt_ids: list[int], params: GenerationParams) -> Generation:
        request = SeveralSequences(
            self._loaded,
            prompt_ids,
            params,
            defaults=self._defaults,
            eos_token_ids=self._eos_token_ids,
        )
        return generate_several(
            request, self._tokenizer, prompt_length=len(prompt_ids), load_s=self._load_s
        )

    def _params_for(
        self, params: GenerationParams | None, overrides: Mapping[str, Any]
    ) -> GenerationParams:
        self._check_open()
        params = GenerationParams() if params is None else params
        if not isinstance(params, GenerationParams):
            raise TypeError(f"params must be a GenerationParams, not {type(params).__name__}")
        return params.merge(**overrides) if overrides else params

    def stream(
        self,
        prompt: PromptLike,
        *,
        params: GenerationParams | None = None,
        assistant_model: Model | None = None,
        **overrides: Any,
    ) -> TokenStream:
        """Generate token by token, as the stream is iterated.

        Arguments and errors are those of `generate`, but that a stream is one sequence:
        ``num_beams`` and ``n`` above 1 are a ValueError. Arguments are checked now; errors of
        the run are raised by the iteration.
        """
        params = self._params_for(params, overrides)
        loop = DecodeLoop(
            self._driven(self._loaded),
            self.encode(prompt),
            params,
            defaults=self._defaults,
            eos_token_ids=self._eos_token_ids,
            recover=self._recover,
            prefixes=self._prefixes,
            drafter=None if assistant_model is None else self._drafter_of(assistant_model),
            step_costs=self._step_costs,
        )
        return TokenStream(loop, self._tokenizer, load_s=self._load_s)

    def _drafter_of(self, assistant: Model) -> ModelDrafter:
        if not isinstance(assistant, Model):
            raise TypeError(f"assistant_model must be a Model, not {type(assistant).__name__}")
        if assistant not in self._assistants:
            if not assistant.tokenizer.has_ids_of(self._tokenizer):
                raise UnsupportedModelError(
                    f"The assistant model {assistant.name!r} has other tokens than {self.name!r}, "
                    "so that its guesses mean something else. Use one of the same family."
                )
            self._assistants.add(assistant)
        return ModelDrafter(assistant.loaded)

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

    def save_prefix(self, prompt: PromptLike, path: str | Path) -> int:
        """Compute a prompt's KV cache, or what is not kept of it, and write it to a file.

        Another process loads it with `load_prefix` and need not compute it. The file is
        safetensors and holds the token ids, too: see docs/two-runtimes.md.

        Args:
            prompt: As for `generate`: a system prompt, a document, a chat so far.
            path: The file; what is there is replaced, at once and whole.

        Returns:
            How many tokens the prompt has.

        Raises:
            UnsupportedModelError: The runtime cannot give its caches away.
            ContextLengthError: The prompt is longer than the context.
            ValueError: It is empty, or a token id is out of range.
            OSError: The file cannot be written.
        """
        self._check_open()
        token_ids = self.encode(prompt)
        save_prefix(self._driven(self._loaded), self._prefixes, token_ids, Path(path))
        return len(token_ids)

    def load_prefix(self, path: str | Path) -> int:
        """Take over the KV cache of a file, for prompts that begin with the same tokens.

        It is kept as those of ended requests are, within ``prefix_cache_bytes``.

        Args:
            path: What `save_prefix` wrote, with a model of the same weights.

        Returns:
            How many tokens it holds.

        Raises:
            ModelNotFoundError: There is no such file.
            ModelFormatError: It is damaged.
            UnsupportedModelError: It is of other weights, or the runtime cannot take it over.
            ContextLengthError: It holds more tokens than the context.
            ValueError: The model keeps no caches, or none of that size.
        """
        self._check_open()
        model, size = self._driven(self._loaded), bytes_per_token(self._folder)
        return load_prefix(model, self._prefixes, Path(path), bytes_per_token=size)

    def _check_open(self) -> None:
        if self._standby.is_closed():
            raise SessionClosedError(f"Model {self.name!r} is closed; load it again.")

    def close(self) -> None:
        """Free the weights once the last stream has ended. Calling it again does nothing."""
        if self._prefixes is not None:
            self._prefixes.close()
        self._standby.close()
        with self._sharing:
            if self._shared is not None:
                self._shared.close()

    def _take_over(self, failed: LoadedModel, error: Exception, *, tokens: int) -> Takeover | None:
        if isinstance(failed, SharedModel):
            failed = failed.model
        takeover = self._standby.recover(failed, error, tokens=tokens)
        model = self._driven(self._loaded)
        if self._prefixes is not None:
            # The kept sessions of a model that was given up keep its weights in memory.
            self._prefixes.forget(except_of=model)
        return takeover and replace(takeover, model=self._driven(takeover.model))

    def _driven(self, loaded: LoadedModel) -> LoadedModel:
        """A loaded model as requests drive it: together, where it can run several at once."""
        if not can_share(loaded):
            return loaded
        with self._sharing:
            if self._shared is None or self._shared.model is not loaded:
                self._shared = SharedModel(loaded)
            return self._shared

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
