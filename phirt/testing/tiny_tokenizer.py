"""A byte-level BPE tokenizer of 320 tokens, as the documents that Hugging Face reads."""

from __future__ import annotations

from typing import Any

__all__ = [
    "EOS_TOKEN_ID",
    "PAD_TOKEN_ID",
    "VOCAB_SIZE",
    "tokenizer_config_document",
    "tokenizer_document",
]

# Joined in this order; "Ġ" is the space, as byte-level vocabularies spell it.
_MERGES = """
Ġ t|Ġ a|h e|i n|r e|o n|Ġt he|e r|Ġ s|a t|Ġ w|Ġ o|e n|Ġ c|i t|i s|a n|o r|e s|Ġ b|e d|Ġ f|in g
Ġ p|o u|Ġa n|a l|a r|Ġt o|Ġ m|Ġo f|Ġ in|Ġ d|Ġ h|Ġan d|i c|l e|a s|Ġt h|i on|o m|l l|en t|Ġ n|Ġ l
s t|Ġ re|v e|Ġ e|r o|l y|Ġb e|Ġ g|Ġ is|i l|l o|Ġ y|Ġy ou|e t|u r|o l
"""
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _byte_characters() -> list[str]:
    """The character that stands for each byte, in the order of the characters.

    Printable bytes of Latin-1 stand for themselves, the others for the code points from 256
    on, in order (GPT-2's table).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = 256 - len(printable)
    return [chr(code) for code in [*sorted(printable), *range(256, 256 + others)]]


_PAIRS = [
    tuple(pair.split(" ")) for line in _MERGES.strip().splitlines() for pair in line.split("|")
]
_WORDS = [*_byte_characters(), *("".join(pair) for pair in _PAIRS), *_SPECIAL]

VOCAB_SIZE = len(_WORDS)
"""Tokens: 256 bytes, what the merges make, and the special ones at the end."""
PAD_TOKEN_ID = _WORDS.index("<|endoftext|>")
"""Id of ``<|endoftext|>``, which also serves as the beginning of a sequence."""
EOS_TOKEN_ID = _WORDS.index("<|im_end|>")
"""Id of ``<|im_end|>``, which ends an answer."""


def tokenizer_document() -> dict[str, Any]:
    """The contents of tokenizer.json."""
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": _WORDS.index(word), "content": word, **special, "special": True}
            for word in _SPECIAL
        ],
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "add_prefix_space": False},
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {word: index for index, word in enumerate(_WORDS)},
            "merges": [list(pair) for pair in _PAIRS],
        },
    }


def tokenizer_config_document() -> dict[str, Any]:
    """The contents of tokenizer_config.json, with a chat template in ChatML."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": _WORDS[PAD_TOKEN_ID],
        "eos_token": _WORDS[EOS_TOKEN_ID],
        "pad_token": _WORDS[PAD_TOKEN_ID],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 256,
        "chat_template": _CHAT_TEMPLATE,
    }
