"""Makes tiny GGUF files of the Llama family: random weights, a real tokenizer, a fixed seed.

The same arguments give the same bytes. The weights follow llama.cpp's convention, as its
converter would have written them, so that any reader of GGUF takes the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, TokenType
from gguf.quants import quantize
from numpy.typing import NDArray

__all__ = ["CHAT_TEMPLATE", "write_tiny_llama_gguf"]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Words that become tokens. They make the pre-tokenizer matter: spaces, digits, line ends,
# contractions, letters beyond ASCII.
WORDS = [
    " the", "ing", " and", "  ", "    ", "\n\n", "12", "123", "'s", "'ll", " a", " of", "é", "ü",
    " in", " is", "er", "\t\t", " def", "):", "ation", " 1", "00", "你", "好", "в", "при", " для",
    "ل", "ال", "😀", "👍", "ế", "Việt", " ch", "ก", "!!", "...", " =", "==", "/*", "HTTP", " World",
    "hello", " hello", "Hello", "self", " return", "ß", "ñ", "tion", " that", " with", "ll", "ed",
]  # fmt: skip

# What gguf can read but not write: any bytes are valid blocks, but the half-precision scales
# among them must be of a sane size. Their byte offsets, as in ggml-common.h.
_SCALES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def write_tiny_llama_gguf(
    path: Path,
    *,
    architecture: Literal["llama", "qwen2", "qwen3", "phi3", "gemma3"] = "llama",
    encoding: str = "F32",
    encodings: Mapping[str, str] | None = None,
    seed: int = 0,
    layers: int = 2,
    hidden: int = 64,
    intermediate: int | None = None,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 300,
    context_length: int = 256,
    tied: bool = True,
    tokenizer: Literal["gpt2", "llama"] = "gpt2",
    pre: str = "smollm",
    rope_factors: Sequence[float] | None = None,
    chat_template: str | None = CHAT_TEMPLATE,
    metadata: Mapping[str, int | float | bool | str | None] | None = None,
) -> Path:
    """Write a tiny Llama, or a relative of it, to ``path`` and return it.

    Args:
        path: The file to write.
        architecture: ``general.architecture``. phi3 has LongRoPE, the long factors for the
            second half of its context; gemma3 a window of an eighth of it, in every layer but
            each sixth.
        encoding: Encoding of the matrices; norms are F32. K-quants need rows of 256, and one
            layer to stay under a megabyte.
        encodings: Encodings of the matrices whose names contain a key.
        seed: Seed of the weights.
        layers: Decoder blocks.
        hidden: Width; a multiple of the encoding's block.
        intermediate: Width of the MLP; twice ``hidden`` by default.
        heads: Query heads.
        kv_heads: Key and value heads.
        vocab: Tokens; at least 262.
        context_length: What the metadata claims.
        tied: Leave the LM head out.
        tokenizer: Byte-level BPE ("gpt2") or SentencePiece-style ("llama").
        pre: ``tokenizer.ggml.pre`` of byte-level BPE. One of the llama3 names also brings
            that family's special tokens.
        rope_factors: The tensor rope_freqs.weight, hidden / heads / 2 values.
        chat_template: ``tokenizer.chat_template``, or None.
        metadata: Keys to add, to replace, or (None) to leave out.
    """
    writer = GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_block_count(layers)
    writer.add_context_length(context_length)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(intermediate or 2 * hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab)
    if architecture == "phi3":
        _add_longrope(writer, pairs=hidden // heads // 2, context_length=context_length)
    if architecture == "gemma3":
        writer.add_sliding_window(context_length // 8)
    if tokenizer == "gpt2":
        _add_byte_level(writer, vocab, pre)
    else:
        _add_sentencepiece(writer, vocab, architecture)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    _override(writer, metadata or {})
    weights = _Weights(
        writer, architecture, encoding=encoding, encodings=encodings or {}, seed=seed
    )
    weights.add_model(
        layers=layers,
        hidden=hidden,
        intermediate=intermediate or 2 * hidden,
        head=hidden // heads,
        keys=hidden // heads * kv_heads,
        vocab=vocab,
        tied=tied,
    )
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(rope_factors, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class _Weights:
    """Random weights whose layers keep the size of what passes through them."""

    def __init__(
        self,
        writer: GGUFWriter,
        architecture: str,
        *,
        encoding: str,
        encodings: Mapping[str, str],
        seed: int,
    ) -> None:
        self._writer = writer
        self._architecture = architecture
        self._encoding = encoding
        self._encodings = encodings
        self._random = np.random.default_rng(seed)

    def add_model(
        self,
        *,
        layers: int,
        hidden: int,
        intermediate: int,
        head: int,
        keys: int,
        vocab: int,
        tied: bool,
    ) -> None:
        self._matrix("token_embd", vocab, hidden)
        for index in range(layers):
            block = f"blk.{index}"
            self._norm(f"{block}.attn_norm", hidden)
            if self._architecture == "phi3":
                self._matrix(f"{block}.attn_qkv", hidden + 2 * keys, hidden)
            else:
                self._matrix(f"{block}.attn_q", hidden, hidden)
                self._matrix(f"{block}.attn_k", keys, hidden)
                self._matrix(f"{block}.attn_v", keys, hidden)
            self._add_extras(block, {"q": hidden, "k": keys, "v": keys}, head=head)
            self._matrix(f"{block}.attn_output", hidden, hidden)
            self._norm(f"{block}.ffn_norm", hidden)
            if self._architecture == "phi3":
                self._matrix(f"{block}.ffn_up", 2 * intermediate, hidden)
            else:
                self._matrix(f"{block}.ffn_gate", intermediate, hidden)
                self._matrix(f"{block}.ffn_up", intermediate, hidden)
            self._matrix(f"{block}.ffn_down", hidden, intermediate)
            if self._architecture == "gemma3":
                self._norm(f"{block}.post_attention_norm", hidden)
                self._norm(f"{block}.post_ffw_norm", hidden)
        self._norm("output_norm", hidden)
        if not tied:
            self._matrix("output", vocab, hidden)

    def _add_extras(self, block: str, rows: Mapping[str, int], *, head: int) -> None:
        """What Qwen or Gemma has and Llama has not."""
        if self._architecture == "qwen2":
            for part, count in rows.items():
                bias = 0.1 * self._random.standard_normal(count)
                self._writer.add_tensor(f"{block}.attn_{part}.bias", bias.astype(np.float32))
        if self._architecture in {"qwen3", "gemma3"}:
            self._norm(f"{block}.attn_q_norm", head)
            self._norm(f"{block}.attn_k_norm", head)

    def _norm(self, name: str, width: int) -> None:
        values = 1 + 0.1 * self._random.standard_normal(width)
        self._writer.add_tensor(f"{name}.weight", values.astype(np.float32))

    def _matrix(self, name: str, rows: int, columns: int) -> None:
        chosen = next((e for key, e in self._encodings.items() if key in name), self._encoding)
        encoding = GGMLQuantizationType[chosen]
        if chosen in _SCALES:
            encoded = self._random_blocks(encoding, rows, columns)
        else:
            values = self._random.standard_normal((rows, columns)) / np.sqrt(columns)
            encoded = quantize(values.astype(np.float32), encoding)
        self._writer.add_tensor(f"{name}.weight", encoded, raw_dtype=encoding)

    def _random_blocks(
        self, encoding: GGMLQuantizationType, rows: int, columns: int
    ) -> NDArray[np.uint8]:
        length, nbytes = GGML_QUANT_SIZES[encoding]
        blocks = self._random.integers(0, 256, (rows, columns // length, nbytes), dtype=np.uint8)
        for offset in _SCALES[encoding.name]:
            scales = self._random.uniform(1e-4, 3e-4, blocks.shape[:2]).astype("<f2")
            blocks[:, :, offset : offset + 2] = scales[..., None].view(np.uint8)
        return blocks.reshape(rows, -1)


def _add_longrope(writer: GGUFWriter, *, pairs: int, context_length: int) -> None:
    writer.add_sliding_window(0)
    writer.add_rope_scaling_orig_ctx_len(context_length // 2)
    # As llama.cpp's converter computes it: the long factors begin at half of the context.
    factor = math.sqrt(1 + math.log(2) / math.log(context_length // 2))
    writer.add_rope_scaling_attn_factors(factor)
    for name, last in (("long", 6.0), ("short", 1.5)):
        divisors = np.linspace(1, last, pairs, dtype=np.float32)
        writer.add_tensor(f"rope_factors_{name}.weight", divisors)


def _override(writer: GGUFWriter, metadata: Mapping[str, int | float | bool | str | None]) -> None:
    for key, value in metadata.items():
        writer.kv_data[0].pop(key, None)
        match value:
            case None:
                continue
            case bool():
                kind = GGUFValueType.BOOL
            case int():
                kind = GGUFValueType.INT64
            case float():
                kind = GGUFValueType.FLOAT32
            case str():
                kind = GGUFValueType.STRING
        writer.add_key_value(key, value, kind)


def _add_byte_level(writer: GGUFWriter, vocab: int, pre: str) -> None:
    llama3 = pre in ("llama-bpe", "llama3", "llama-v3")
    special = (
        ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|endoftext|>"]
        if llama3
        else ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    )
    special.append("<think>")
    symbols = _byte_symbols()
    tokens = special + list(symbols.values())
    merges: dict[tuple[str, str], int] = {}
    for word in WORDS:
        pieces = _join([symbols[byte] for byte in word.encode("utf-8")], merges)
        while len(pieces) > 1 and len(tokens) < vocab:
            merges[pieces[0], pieces[1]] = len(merges)
            tokens.append(pieces[0] + pieces[1])
            pieces = _join(pieces, merges)
    tokens += [f"<|unused_{index}|>" for index in range(vocab - len(tokens))]
    types = [TokenType.CONTROL] * (len(special) - 1) + [TokenType.USER_DEFINED]
    types += [
        TokenType.UNUSED if token.startswith("<|unused") else TokenType.NORMAL
        for token in tokens[len(special) :]
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    if llama3:
        writer.add_add_bos_token(True)
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
    else:
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        writer.add_pad_token_id(2)


def _join(pieces: list[str], merges: Mapping[tuple[str, str], int]) -> list[str]:
    """Apply merges, best first. New ones are made on top, so that every token is reachable."""
    while True:
        pairs = [pair for pair in pairwise(pieces) if pair in merges]
        if not pairs:
            return pieces
        index = list(pairwise(pieces)).index(min(pairs, key=lambda pair: merges[pair]))
        pieces = [*pieces[:index], pieces[index] + pieces[index + 1], *pieces[index + 2 :]]


def _byte_symbols() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + index) for index, byte in enumerate(hidden)
    }


# What a chat is marked with in the families whose tokenizers are SentencePiece's.
_TURNS = {
    "phi3": ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"],
    "gemma3": ["<start_of_turn>", "<end_of_turn>"],
}


def _add_sentencepiece(writer: GGUFWriter, vocab: int, architecture: str) -> None:
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.BYTE] * 256
    tokens.append("<think>")
    types.append(TokenType.USER_DEFINED)
    turns = _TURNS.get(architecture, [])
    tokens += turns
    types += [TokenType.CONTROL] * len(turns)
    pieces: list[str] = []
    for word in WORDS:
        spelled = word.replace(" ", "\u2581")
        pieces += [spelled[:end] for end in range(2, len(spelled) + 1)]
    letters = sorted({letter for piece in pieces for letter in piece} - {"\n", "\t"})
    letters += [letter for letter in "abcdefghijklmnopqrstuvwxyz" if letter not in letters]
    merged = [piece for piece in dict.fromkeys(pieces) if set(piece) <= set(letters)]
    room = vocab - len(tokens) - len(letters)
    # As SentencePiece does: merged pieces first, by falling score, then single characters.
    ordinary = (merged[:room] if room > 0 else []) + letters
    ordinary = ordinary[: vocab - len(tokens)]
    scores = [0.0] * len(tokens) + [-float(rank) for rank in range(len(ordinary))]
    tokens += ordinary
    types += [TokenType.NORMAL] * len(ordinary)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens + [f"<unused{i}>" for i in range(vocab - len(tokens))])
    writer.add_token_scores(scores + [0.0] * (vocab - len(scores)))
    writer.add_token_types(types + [TokenType.UNUSED] * (vocab - len(types)))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    if architecture == "gemma3":
        writer.add_add_space_prefix(False)
