"""Small tokenizers of the two kinds that models use, complete enough for any text."""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

__all__ = ["byte_level", "sentencepiece"]


def _byte_alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level(added: Sequence[str] = ("<tool>", "😀🎉")) -> tokenizers.Tokenizer:
    """GPT-2's kind: every byte is a token, a few merges, two special tokens, and ``added``."""
    merges = [
        ("h", "e"),
        ("l", "l"),
        ("he", "ll"),
        ("hell", "o"),
        ("Ġ", "w"),
        ("ð", "Ł"),
        ("a", "a"),
    ]
    words = [*_byte_alphabet(), *("".join(merge) for merge in merges)]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|start|>", "<|end|>"])
    tokenizer.add_tokens([AddedToken(content, special=False) for content in added])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", tokenizer.token_to_id("<|start|>"))]
    )
    return tokenizer


def sentencepiece(*, strip: int = 1) -> tokenizers.Tokenizer:
    """Llama 2's kind: spaces as U+2581, unknown characters as byte tokens."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = [("▁", "h"), ("l", "l"), ("▁", "▁"), ("▁▁", "▁▁"), ("h", "e")]
    words += [*"▁hello wrd\n.é", *("".join(merge) for merge in merges), "<0xzz>", "\ufffd"]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token=words[0], fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", strip, 0),
        ]
    )
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    return tokenizer
