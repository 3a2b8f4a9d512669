"""The tokenizer inside a GGUF file, as a `tokenizers.Tokenizer`.

A GGUF file holds the vocabulary and names the rest: byte-level BPE ("gpt2") with a
pre-tokenizer known by name, or SentencePiece-style BPE ("llama") whose merges follow from
the pieces' scores. The result gives the ids that `transformers`' own converter gives; where
that one loses text or tokens, the comments say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from gguf.constants import TokenType
from numpy.typing import NDArray
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import BPE

from phirt.build.gguf.file import GgufFile
from phirt.build.gguf.merges import merges_from_scores, parse_merges
from phirt.errors import ModelFormatError, UnsupportedModelError

__all__ = ["GgufTokenizer", "read_tokenizer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTokenizer:
    """A tokenizer and what the file says about using it.

    Attributes:
        tokenizer: Text to ids and back; its post-processor adds BOS and EOS where the model
            wants them. ``tokenizer.save(path)`` writes ``tokenizer.json``.
        bos_token: Text of the beginning-of-sequence token, or None.
        eos_token: Text of the end-of-sequence token, or None.
        unk_token: Text of the unknown token, or None.
        pad_token: Text of the padding token, or None.
        chat_template: Source of the chat template (Jinja), or None. It is the file's, and not
            to be trusted: only the sandbox in ``phirt.text`` renders it.
    """

    tokenizer: Tokenizer
    bos_token: str | None
    eos_token: str | None
    unk_token: str | None
    pad_token: str | None
    chat_template: str | None


@dataclass(frozen=True, slots=True)
class _PreTokenizer:
    """What a value of ``tokenizer.ggml.pre`` stands for.

    Attributes:
        split: Pattern whose matches are the words that merges stay within, or None for GPT-2's,
            which `tokenizers` has built in.
        whole_words: Take a word that is a token as that token, whatever the merges say
            (``ignore_merges``).
        add_bos: Whether text starts with BOS where the file does not say.
    """

    split: str | None = None
    whole_words: bool = False
    add_bos: bool = False


# Patterns: the models' own tokenizer.json, quoted as "original regex" in llama.cpp's
# src/llama-vocab.cpp; whole_words and add_bos: the same file, where it matches the names.
_LLAMA3 = _PreTokenizer(
    split=(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    whole_words=True,
    add_bos=True,
)
_TEKKEN = _PreTokenizer(
    split=(
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    whole_words=True,
    add_bos=True,
)
_GPT_4O = _PreTokenizer(
    split=(
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
)
# Qwen's own tokenizer.json also composes characters first (NFC); llama.cpp and transformers'
# GGUF reader do not.
_QWEN2 = _PreTokenizer(
    split=(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
)
_PRE_TOKENIZERS = {
    "gpt-2": _PreTokenizer(),
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    # SmolLM's own tokenizer.json and llama.cpp also set every digit apart before GPT-2's
    # pattern; transformers' GGUF reader does not, and its ids are the ones promised here.
    "smollm": _PreTokenizer(),
    "qwen2": _QWEN2,  # and Qwen 2.5 and 3
    "tekken": _TEKKEN,
    "gpt-4o": _GPT_4O,  # and Phi-4-mini
}

_MODELS = ("gpt2", "llama")

# Those of Phi-3's added tokens that leave the white space after them alone.
_KEEPS_SPACES = frozenset({"<unk>", "<s>", "<|endoftext|>"})


def read_tokenizer(file: GgufFile, *, tokens: Sequence[str]) -> GgufTokenizer:
    """Build the tokenizer that a GGUF file describes.

    Args:
        file: The file.
        tokens: Its vocabulary (`GgufCheckpoint.tokens`).

    Raises:
        UnsupportedModelError: The kind of tokenizer or its pre-tokenizer is not known here.
        ModelFormatError: Vocabulary, merges, scores or special tokens contradict each other.
    """
    return _Converter(file, tokens).convert()


class _Converter:
    """Reads one file's keys and assembles the tokenizer."""

    def __init__(self, file: GgufFile, tokens: Sequence[str]) -> None:
        self._file = file
        self._tokens = tokens
        self._vocab = {token: index for index, token in enumerate(tokens)}
        if len(self._vocab) != len(tokens):
            doubled = next(t for i, t in enumerate(tokens) if self._vocab[t] != i)
            self._fail(f"token {doubled!r:.80} occurs twice in the vocabulary")

    def convert(self) -> GgufTokenizer:
        model = self._file.string("tokenizer.ggml.model")
        if model == "gpt2":
            tokenizer, add_bos = self._byte_level()
        elif model == "llama":
            tokenizer, add_bos = self._sentencepiece()
        else:
            raise UnsupportedModelError(
                f"{self._file.path.name}: tokenizer.ggml.model is {model!r:.80}; phirt converts "
                f"{' and '.join(_MODELS)}."
            )
        named = {role: self._named(role) for role in ("bos", "eos", "unknown", "padding")}
        self._add_special(tokenizer, {token for token in named.values() if token is not None})
        self._add_post_processor(
            tokenizer, bos=named["bos"], eos=named["eos"], add_bos_by_default=add_bos
        )
        return GgufTokenizer(
            tokenizer=tokenizer,
            bos_token=named["bos"],
            eos_token=named["eos"],
            unk_token=named["unknown"],
            pad_token=named["padding"],
            chat_template=self._file.string("tokenizer.chat_template"),
        )

    def _byte_level(self) -> tuple[Tokenizer, bool]:
        name = self._file.string("tokenizer.ggml.pre")
        pre = _PRE_TOKENIZERS.get(name or "")
        if pre is None:
            raise UnsupportedModelError(
                f"{self._file.path.name}: tokenizer.ggml.pre is {name!r:.80}, and phirt knows how "
                f"{', '.join(_PRE_TOKENIZERS)} split text. Another split gives other tokens, so "
                "it does not guess."
            )
        merges = self._merges()
        if merges is None:
            self._fail("tokenizer.ggml.merges is missing")
        tokenizer = Tokenizer(BPE(vocab=self._vocab, merges=merges, ignore_merges=pre.whole_words))
        if pre.split is None:
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(pre.split), behavior="isolated"),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer, pre.add_bos

    def _sentencepiece(self) -> tuple[Tokenizer, bool]:
        if "tokenizer.ggml.precompiled_charsmap" in self._file.header.metadata:
            raise UnsupportedModelError(
                f"{self._file.path.name}: a SentencePiece tokenizer that normalizes text "
                "(tokenizer.ggml.precompiled_charsmap) is not supported."
            )
        merges = self._merges()
        if merges is None:
            merges = merges_from_scores(self._vocab, self._scores(), name=self._file.path.name)
        # transformers' GGUF reader sets no unk_token, so that text which neither a piece nor a
        # byte token covers disappears; and it reads add_space_prefix but does not pass it on.
        unk = self._named("unknown")
        tokenizer = Tokenizer(
            BPE(vocab=self._vocab, merges=merges, fuse_unk=True, byte_fallback=True, unk_token=unk)
        )
        prefix = self._file.flag("tokenizer.ggml.add_space_prefix") is not False
        if prefix and self._is_phi3:
            # As in Phi-3's own tokenizer.json, and as llama.cpp does: after added tokens too,
            # and before a space.
            tokenizer.normalizer = normalizers.Sequence(
                [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            )
        else:
            tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
                replacement="▁", prepend_scheme="first" if prefix else "never", split=False
            )
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        if prefix:
            steps.append(decoders.Strip(content=" ", left=1))
        tokenizer.decoder = decoders.Sequence(steps)
        return tokenizer, True  # llama.cpp and transformers: BOS unless the file says otherwise

    def _merges(self) -> list[tuple[str, str]] | None:
        lines = self._file.strings("tokenizer.ggml.merges")
        if lines is None:
            return None
        return parse_merges(lines, self._vocab, name=self._file.path.name)

    def _scores(self) -> NDArray[np.float32]:
        scores = self._file.numbers("tokenizer.ggml.scores")
        if scores is None:
            self._fail("tokenizer.ggml.scores is missing, and there are no merges")
        if len(scores) != len(self._tokens):
            self._fail(f"{len(scores):,} scores for {len(self._tokens):,} tokens")
        return scores.astype(np.float32)

    def _add_special(self, tokenizer: Tokenizer, named: set[str]) -> None:
        """Make control tokens special, and user-defined ones tokens of their own.

        Both are matched in the text as they are spelled, before anything is split. (In a
        byte-level vocabulary transformers' GGUF reader drops those with a character outside
        GPT-2's alphabet, such as a space or a full-width bar.)
        """
        types = self._file.numbers("tokenizer.ggml.token_type")
        if types is not None and len(types) != len(self._tokens):
            self._fail(f"{len(types):,} token types for {len(self._tokens):,} tokens")
        kinds = [int(TokenType.NORMAL)] * len(self._tokens) if types is None else types.tolist()
        special = (TokenType.CONTROL, TokenType.UNKNOWN)
        takes_spaces = self._is_phi3
        added = [
            AddedToken(
                token,
                normalized=False,
                special=kind in special or token in named,
                rstrip=takes_spaces and token not in _KEEPS_SPACES,
            )
            for token, kind in zip(self._tokens, kinds, strict=True)
            if token and (kind in special or kind == TokenType.USER_DEFINED or token in named)
        ]
        tokenizer.add_tokens(added)

    @property
    def _is_phi3(self) -> bool:
        """Whether this is Phi-3's SentencePiece vocabulary.

        Its added tokens take the white space that follows them: the line end after every
        ``<|end|>`` of a chat is no token. Its files do not say so; llama.cpp knows them by the
        model's name (llama-vocab.cpp, where it sets attributes of tokens).
        """
        return (
            self._file.string("general.architecture") == "phi3"
            and self._file.string("tokenizer.ggml.model") == "llama"
        )

    def _add_post_processor(
        self, tokenizer: Tokenizer, *, bos: str | None, eos: str | None, add_bos_by_default: bool
    ) -> None:
        add_bos = self._file.flag("tokenizer.ggml.add_bos_token")
        add_bos = add_bos_by_default if add_bos is None else add_bos
        add_eos = self._file.flag("tokenizer.ggml.add_eos_token") or False
        first = bos if add_bos else None
        last = eos if add_eos else None
        around = {token: self._vocab[token] for token in (first, last) if token is not None}
        if not around:
            return
        if any(":" in token or token.startswith("$") for token in around):
            raise UnsupportedModelError(
                f"{self._file.path.name}: BOS or EOS is spelled {' or '.join(around)!r:.80}, and "
                "the tokenizers library cannot add tokens spelled with ':' or '$'."
            )
        single = [t for t in (first, "$A:0", last) if t is not None]
        second = [t for t in (first, "$B:1", last) if t is not None]
        pair = single + [t if t.startswith("$") else f"{t}:1" for t in second]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=pair, special_tokens=list(around.items())
        )

    def _named(self, role: str) -> str | None:
        token_id = self._file.token_id(role, vocab_size=len(self._tokens))
        return None if token_id is None else self._tokens[token_id]

    def _fail(self, problem: str) -> NoReturn:
        raise ModelFormatError(f"{self._file.path.name}: {problem}. Use another file.")
