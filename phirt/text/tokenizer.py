"""Token ids from text and back: the model's own ``tokenizer.json``.

The work is done by Hugging Face's `tokenizers`. This wrapper fixes what would otherwise
depend on the file or the process: nothing is truncated or padded, damaged files and wrong
arguments raise phirt's errors, and only `tokenizers.Tokenizer.encode` is used, never the
batch calls: those start a thread pool, which makes a later fork warn and lose parallelism.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phirt.errors import ModelFormatError, ModelNotFoundError

if TYPE_CHECKING:
    import tokenizers

__all__ = ["Tokenizer"]

# The largest tokenizer.json of a published model (vocabularies of 260,000) has about 35 MB.
_MAX_FILE_BYTES = 256 * 2**20


@contextmanager
def _library_errors(what: str) -> Iterator[None]:
    """Turn the library's own errors into `ModelFormatError`, but not those of ids as arguments.

    It raises plain Exception and, where a damaged file contradicts itself, a Rust panic,
    which is a BaseException of a class that it does not export.
    """
    try:
        yield
    except (TypeError, OverflowError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelFormatError(f"{what}: {error}. Convert or download the model again.") from error


class Tokenizer:
    """A model's tokenizer. Safe to use from many threads at once.

    Args:
        backend: The tokenizer to wrap. Truncation and padding are switched off in it.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._special_ids = frozenset(
            token_id
            for token_id, token in backend.get_added_tokens_decoder().items()
            if token.special
        )
        self._vocab_size = backend.get_vocab_size(with_added_tokens=True)

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a ``tokenizer.json``.

        Raises:
            ModelNotFoundError: There is no such file.
            ModelFormatError: The file is damaged, too large, or not a tokenizer.
        """
        path = Path(path)
        if not path.is_file():
            raise ModelNotFoundError(
                f"Tokenizer file '{path}' was not found. A model folder needs a tokenizer.json; "
                "convert or download the model again."
            )
        if (size := path.stat().st_size) > _MAX_FILE_BYTES:
            raise ModelFormatError(
                f"Tokenizer file '{path}' has {size:,} bytes; the most that phirt reads is "
                f"{_MAX_FILE_BYTES:,}."
            )
        import tokenizers  # `import phirt` stays light

        with _library_errors(f"Tokenizer file '{path}' cannot be read"):
            return cls(tokenizers.Tokenizer.from_buffer(path.read_bytes()))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added tokens included; the model's logits may have more columns."""
        return self._vocab_size

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that `decode` skips by default: BOS, EOS, role markers."""
        return self._special_ids

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``. Added tokens written in the text become their ids.

        Args:
            text: What to encode, of any length.
            add_special_tokens: Whether the tokenizer adds its own (BOS...). False for a
                rendered chat, whose template has written them.

        Raises:
            TypeError: ``text`` is not a string.
            ValueError: ``text`` holds a lone surrogate, which no encoding can carry.
            ModelFormatError: The tokenizer cannot encode this text (no unknown token).
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, not {type(text).__name__}.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text holds a lone surrogate ({text[error.start]!r} at index {error.start}): "
                "that is not a character. Decode its source with the right encoding, or "
                "errors='replace'."
            ) from error
        with _library_errors("The model's tokenizer cannot encode the text"):
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids, as they stand: spaces are not cleaned up.

        Equals `transformers`' ``decode(..., clean_up_tokenization_spaces=False)``. Ids that the
        tokenizer does not have (a model's vocabulary may be padded) decode to nothing; bytes
        that are not UTF-8 decode to U+FFFD.

        Raises:
            TypeError: An id is not an integer.
            ValueError: An id is negative or above 2**32 - 1.
            ModelFormatError: The tokenizer's decoder fails on these tokens.
        """
        try:
            with _library_errors("The model's tokenizer cannot decode the ids"):
                return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)
        except OverflowError as error:
            raise ValueError(
                f"token ids must lie in 0 to 2**32 - 1; found {min(token_ids)} to {max(token_ids)}."
            ) from error

    def count(self, text: str, *, add_special_tokens: bool = True) -> int:
        """Number of tokens of ``text``; raises what `encode` raises."""
        return len(self.encode(text, add_special_tokens=add_special_tokens))

    def token_to_id(self, token: str) -> int | None:
        """Id of a token in the tokenizer's own spelling (``"Ġthe"``), or None."""
        return self._backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """Token in the tokenizer's own spelling, or None if there is no such id."""
        return self._backend.id_to_token(token_id) if 0 <= token_id < 2**32 else None

    def has_ids_of(self, other: Tokenizer) -> bool:
        """Whether a token has the same id here as in another tokenizer, for all tokens."""
        return self is other or bool(self._backend.get_vocab() == other._backend.get_vocab())

    def decoder_config(self) -> dict[str, Any]:
        """The ``decoder`` section of the tokenizer.json; empty if it has none."""
        decoder = self._backend.decoder
        if decoder is None:
            return {}
        config: dict[str, Any] = json.loads(decoder.__getstate__())
        return config
