"""Text from token ids that arrive one at a time.

`tokenizers.decoders.DecodeStream` does not fit: it cannot be flushed, so a generation that
ends within a character loses its last bytes (on 2,000 random id sequences 361 ended short of
`Tokenizer.decode`), and it decodes its whole window again for each of a run of invalid bytes.

What can be final when depends on the tokenizer's decoder, hence three ways:

- Byte level (GPT-2, Llama 3, Qwen): tokens are bytes, and the text is their UTF-8
  decoding, which Python's incremental decoder does with the same rule for invalid bytes.
- Local decoders (SentencePiece: Llama 2, Phi-3, Gemma): a token's text depends on the token
  and on whether it is the first. It is decoded behind one token of context. Byte
  tokens (``<0xE2>``) are held until their run ends, because a single invalid byte turns the
  whole run into U+FFFD, valid characters before it included.
- Any other decoder: nothing is known to be final before the end, and `flush` returns all.
"""

from __future__ import annotations

import codecs
import copy
from functools import lru_cache
from typing import Any, Protocol, Self

from phirt.text.tokenizer import Tokenizer

__all__ = ["StreamingDetokenizer"]


class StreamingDetokenizer:
    """Turns a stream of token ids into text, each character as soon as it is final.

    The concatenation of all `add` and the `flush` equals
    ``tokenizer.decode(all ids, skip_special_tokens=True)``. No call returns part of a character,
    or U+FFFD for a character that may still become whole. Each token is decoded a bounded
    number of times. One instance serves one sequence.

    Args:
        tokenizer: The tokenizer whose ids will come.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = _open_stream(tokenizer)

    def add(self, token_id: int) -> str:
        """Text that became final with this token; empty if none did."""
        # Special tokens and ids outside the vocabulary decode to nothing, wherever they stand.
        if token_id in self._tokenizer.special_ids:
            return ""
        token = self._tokenizer.id_to_token(token_id)
        return "" if token is None else self._stream.add(token_id, token)

    def flush(self) -> str:
        """The rest of the text, U+FFFD for bytes that never became a character."""
        return self._stream.flush()

    def copy(self) -> StreamingDetokenizer:
        """The same state, to be continued with other tokens."""
        other: StreamingDetokenizer = copy.copy(self)
        other._stream = self._stream.copy()
        return other


class _Stream(Protocol):
    def add(self, token_id: int, token: str) -> str: ...

    def flush(self) -> str: ...

    def copy(self) -> Self: ...


def _open_stream(tokenizer: Tokenizer) -> _Stream:
    config = tokenizer.decoder_config()
    steps = config["decoders"] if config.get("type") == "Sequence" else [config]
    if [step.get("type") for step in steps] == ["ByteLevel"]:
        return _ByteLevelStream()
    if all(_is_local(step) for step in steps):
        return _WindowStream(tokenizer)
    return _HeldStream(tokenizer)


def _is_local(step: dict[str, Any]) -> bool:
    """Whether a decoder step changes each token by itself, or the start of the text."""
    kind = step.get("type")
    if kind == "Strip":  # at the end of the text it would take back what was emitted
        return bool(step["stop"] == 0)
    if kind == "Replace":  # after Fuse, a pattern of several characters may span tokens
        return len(step["pattern"].get("String", "")) == 1
    # A tokenizer without a decoder joins its tokens with spaces: local as well.
    return kind in {None, "ByteFallback", "Fuse", "Metaspace"}


@lru_cache(maxsize=1)
def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, other bytes for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }


class _ByteLevelStream:
    def __init__(self) -> None:
        self._bytes = _byte_of_char()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int, token: str) -> str:  # noqa: ARG002 - the id is for the other streams
        try:
            data = bytes([self._bytes[char] for char in token])
        except KeyError:  # an added token, spelled as it is
            data = token.encode()
        return self._decoder.decode(data)

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)

    def copy(self) -> _ByteLevelStream:
        other: _ByteLevelStream = _ByteLevelStream()
        other._decoder.setstate(self._decoder.getstate())
        return other


class _WindowStream:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []  # emitted; the text of what follows depends on it
        self._context_text = ""
        self._pending: list[int] = []

    def add(self, token_id: int, token: str) -> str:
        self._pending.append(token_id)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return ""
        return self.flush()

    def flush(self) -> str:
        if not self._pending:
            return ""
        window = self._context + self._pending
        emit = self._tokenizer.decode(window)[len(self._context_text) :]
        # The shortest end of the window that has text is context enough: what the start of a
        # text changes (a stripped space) then lies within it. Mostly that is one token.
        for size in range(1, len(window) + 1):
            self._context = window[-size:]
            self._context_text = self._tokenizer.decode(self._context)
            if self._context_text:
                break
        self._pending = []
        return emit

    def copy(self) -> _WindowStream:
        other: _WindowStream = copy.copy(self)
        other._pending = self._pending.copy()
        return other


class _HeldStream:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []

    def add(self, token_id: int, token: str) -> str:  # noqa: ARG002 - as above
        self._ids.append(token_id)
        return ""

    def flush(self) -> str:
        text = self._tokenizer.decode(self._ids)
        self._ids = []
        return text

    def copy(self) -> _HeldStream:
        other: _HeldStream = copy.copy(self)
        other._ids = self._ids.copy()
        return other
