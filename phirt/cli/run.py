"""``phirt run``: answer a prompt, from the arguments or from stdin, or chat."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import phirt
from phirt.cli.announce import Announcer
from phirt.cli.arguments import UsageError
from phirt.cli.chat import chat
from phirt.cli.progress import ProgressBars
from phirt.cli.terminal import is_terminal
from phirt.errors import PhirtError

if TYPE_CHECKING:
    from phirt import Generation, Model
    from phirt.types import ChatMessage

__all__ = ["run"]

_logger = logging.getLogger(__name__)


def run(arguments: argparse.Namespace) -> None:
    """Carry out ``phirt run``.

    Raises:
        UsageError: The arguments make no sense, on their own or together.
        PhirtError: The model cannot be loaded or cannot go on.
        KeyboardInterrupt: Ctrl-C, outside a chat.
    """
    # Whatever is wrong with the arguments is said before a model is fetched for them.
    overrides = _overrides(arguments)
    prompt = _prompt(arguments)
    with _load(arguments) as model:
        _logger.info("%s on %s through %s", model.name, model.device, model.backend)
        if prompt is None:
            _chat(model, overrides)
        elif arguments.json:
            _print_json(model, _as_model_reads(model, prompt, raw=arguments.raw), overrides)
        else:
            _print_stream(model, _as_model_reads(model, prompt, raw=arguments.raw), overrides)


@contextmanager
def _wrong_usage() -> Iterator[None]:
    """Within: a ValueError is a mistake in the arguments, unless it is a PhirtError too."""
    try:
        yield
    except PhirtError:
        raise
    except ValueError as error:
        raise UsageError(" ".join(str(error).split())) from error


def _overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    """The generation parameters that were given; the others are the model's to say."""
    # The options of a generation are named as the fields of GenerationParams are.
    names = {field.name for field in fields(phirt.GenerationParams)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    overrides = {name: value for name, value in given.items() if value is not None}
    with _wrong_usage():
        phirt.GenerationParams(**overrides)
    return overrides


def _prompt(arguments: argparse.Namespace) -> str | None:
    """The prompt, or None for a chat."""
    if arguments.prompt is not None:
        return str(arguments.prompt)
    if is_terminal(sys.stdin):
        for option in ("json", "raw"):
            if getattr(arguments, option):
                raise UsageError(f"--{option} needs a prompt, as an argument or on stdin")
        return None
    return _piped()


def _piped() -> str:
    """All of stdin, less the line end that `echo` adds."""
    # A byte order mark is what Windows editors and shells put before UTF-8.
    data = sys.stdin.buffer.read() if sys.stdin is not None else b""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"stdin is not UTF-8 text: byte {error.start} is not") from error
    text = text.replace("\r\n", "\n").removesuffix("\n")
    if not text:
        raise UsageError("stdin is empty: give a prompt, as an argument or on stdin")
    return text


@contextmanager
def _load(arguments: argparse.Namespace) -> Iterator[Model]:
    with _wrong_usage(), ProgressBars() as bars:
        model = phirt.load(
            arguments.model,
            device=arguments.device,
            backend=arguments.backend,
            precision=arguments.precision,
            kv_precision=arguments.kv_precision,
            prefill=arguments.prefill,
            decode=arguments.decode,
            offline=arguments.offline,
            progress=bars,
            announce=Announcer(bars, yes=arguments.yes),
        )
    with model:
        yield model


def _as_model_reads(model: Model, prompt: str, *, raw: bool) -> str | list[ChatMessage]:
    if raw or model.chat_template is None:
        return prompt
    return [{"role": "user", "content": prompt}]


def _print_stream(model: Model, prompt: str | list[ChatMessage], overrides: dict[str, Any]) -> None:
    with _wrong_usage():
        stream = model.stream(prompt, **overrides)
    last = "\n"
    try:
        with stream:
            for token in stream:
                last = token.text or last
                sys.stdout.write(token.text)
                sys.stdout.flush()
    finally:
        # However it ended, what follows (a message, a prompt) starts on a line of its own.
        if not last.endswith("\n"):
            sys.stdout.write("\n")
    _report(stream.result)


def _print_json(model: Model, prompt: str | list[ChatMessage], overrides: dict[str, Any]) -> None:
    with _wrong_usage():
        result = model.generate(prompt, **overrides)
    answer = {
        "text": result.text,
        "token_ids": list(result.token_ids),
        "finish_reason": result.finish_reason,
        "model": model.name,
        "backend": model.backend,
        "device": model.device,
        "usage": asdict(result.usage),
        "timings": asdict(result.timings),
    }
    print(json.dumps(answer, ensure_ascii=False))
    _report(result)


def _report(result: Generation) -> None:
    if result.finish_reason == "context":
        _logger.warning("the answer ends here because the model's context is full")
    usage, timings = result.usage, result.timings
    _logger.info(
        "%d prompt tokens, %d of them cached; first token after %s; %d tokens at %s; finished: %s",
        usage.prompt_tokens,
        usage.cached_tokens,
        _unless_none(timings.ttft_s, "{:.3f} s"),
        usage.completion_tokens,
        _unless_none(timings.decode_tokens_per_s, "{:.1f} tokens/s"),
        result.finish_reason,
    )


def _unless_none(value: float | None, form: str) -> str:
    return "(not measured)" if value is None else form.format(value)


def _chat(model: Model, overrides: dict[str, Any]) -> None:
    if model.chat_template is None:
        raise UsageError(f"{model.name} has no chat template, so it cannot chat: give a prompt")
    chat(model, overrides)
