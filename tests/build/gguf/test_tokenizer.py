"""The tokenizer inside a GGUF file, where the answer can be worked out by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import TokenType
from tokenizers import Tokenizer

from phirt.build.gguf.checkpoint import GgufCheckpoint
from phirt.build.gguf.file import GgufFile
from phirt.build.gguf.merges import merges_from_scores, parse_merges
from phirt.build.gguf.tokenizer import GgufTokenizer, read_tokenizer
from phirt.errors import ModelFormatError, UnsupportedModelError
from tests.tiny_gguf import CHAT_TEMPLATE, write_tiny_llama_gguf

Read = Callable[..., GgufTokenizer]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Write a tiny file and return its tokenizer."""

    def read(**options: Any) -> GgufTokenizer:
        path = write_tiny_llama_gguf(tmp_path / "model.gguf", layers=1, **options)
        with GgufCheckpoint(path) as checkpoint:
            return read_tokenizer(checkpoint.file, tokens=checkpoint.tokens)

    return read


@pytest.fixture
def read_vocabulary(tmp_path: Path) -> Read:
    """Write nothing but a vocabulary and return its tokenizer."""

    def read(
        tokens: Sequence[str], *, types: Sequence[int] | None = None, **keys: Any
    ) -> GgufTokenizer:
        writer = gguf.GGUFWriter(tmp_path / "vocab.gguf", "llama")
        writer.add_tokenizer_model(keys.pop("model", "gpt2"))
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(list(tokens))
        writer.add_token_merges(keys.pop("merges", ["a b"]))
        if types is not None:
            writer.add_token_types(list(types))
        for key, value in keys.items():
            getattr(writer, f"add_{key}")(value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with GgufFile(tmp_path / "vocab.gguf") as file:
            return read_tokenizer(file, tokens=tokens)

    return read


def ids(found: GgufTokenizer, text: str, *, special: bool = True) -> list[int]:
    encoded: list[int] = found.tokenizer.encode(text, add_special_tokens=special).ids
    return encoded


def pieces(found: GgufTokenizer, text: str) -> list[str]:
    encoded: list[str] = found.tokenizer.encode(text, add_special_tokens=False).tokens
    return encoded


def test_named_tokens_and_template_are_exposed(read: Read) -> None:
    found = read()
    assert (found.bos_token, found.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (found.unk_token, found.pad_token) == ("<|endoftext|>", "<|im_end|>")
    assert found.chat_template == CHAT_TEMPLATE


def test_a_file_without_them_has_none(read: Read) -> None:
    roles = ("bos", "eos", "unknown", "padding")
    found = read(
        chat_template=None, metadata={f"tokenizer.ggml.{role}_token_id": None for role in roles}
    )
    assert found.chat_template is None
    assert {found.bos_token, found.eos_token, found.unk_token, found.pad_token} == {None}


@pytest.mark.parametrize("tokenizer", ["gpt2", "llama"])
def test_text_survives_the_round_trip(read: Read, tokenizer: str) -> None:
    found = read(tokenizer=tokenizer, vocab=420)
    for text in ("two  spaces", "Tiếng Việt, 你好 👍🏽\n\t12 345 ", ""):
        assert found.tokenizer.decode(ids(found, text)) == text


def test_the_serialized_tokenizer_is_the_same(read: Read) -> None:
    found = read()
    again = Tokenizer.from_str(found.tokenizer.to_str())
    assert again.encode("hello <think> 12").ids == ids(found, "hello <think> 12")


class TestAddedTokens:
    """Control and user-defined tokens stay whole; only control tokens are special."""

    def test_they_stay_whole_inside_text(self, read: Read) -> None:
        found = read()
        assert pieces(found, "a<|im_end|>b<think>a") == ["a", "<|im_end|>", "b", "<think>", "a"]

    def test_user_defined_tokens_are_not_special(self, read: Read) -> None:
        found = read()
        special = {
            token.content: token.special
            for token in found.tokenizer.get_added_tokens_decoder().values()
        }
        assert special == {
            "<|endoftext|>": True, "<|im_start|>": True, "<|im_end|>": True, "<think>": False,
        }  # fmt: skip
        assert found.tokenizer.decode(ids(found, "<|im_end|><think>")) == "<think>"

    def test_what_the_metadata_names_is_special_whatever_its_type(
        self, read_vocabulary: Read
    ) -> None:
        found = read_vocabulary(["a", "b", "ab", "<end>"], eos_token_id=3)
        assert found.tokenizer.get_added_tokens_decoder()[3].special
        assert ids(found, "a<end>b") == [0, 3, 1]

    def test_spelling_outside_the_byte_alphabet_is_kept(self, read_vocabulary: Read) -> None:
        # As DeepSeek's distilled Llamas have them. transformers' GGUF reader drops these.
        tokens = ["a", "b", "ab", "<｜User｜>", "[ x ]"]  # noqa: RUF001
        types = [TokenType.NORMAL] * 3 + [TokenType.CONTROL, TokenType.USER_DEFINED]
        found = read_vocabulary(tokens, types=types)
        assert ids(found, "ab<｜User｜>[ x ]b") == [2, 3, 4, 1]  # noqa: RUF001
        assert found.tokenizer.get_vocab_size() == 5


class TestBosAndEos:
    """A post-processor adds them where the file, or its family, says so."""

    def test_flags_of_the_file(self, read: Read) -> None:
        flags = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
        assert ids(read(metadata=flags), "!")[0::2] == [1, 2]

    def test_none_without_flags(self, read: Read) -> None:
        assert len(ids(read(), "!")) == 1

    @pytest.mark.parametrize(
        ("options", "added"),
        [
            ({"pre": "llama-bpe"}, True),
            ({"pre": "llama3"}, True),
            ({"pre": "smollm"}, False),
            ({"pre": "gpt-2"}, False),
            ({"tokenizer": "llama"}, True),
        ],
    )
    def test_the_family_decides_where_the_flag_is_missing(
        self, read: Read, options: dict[str, str], added: bool
    ) -> None:
        found = read(**options, metadata={"tokenizer.ggml.add_bos_token": None})
        assert (found.tokenizer.num_special_tokens_to_add(is_pair=False) == 1) is added

    def test_a_rendered_chat_gets_none(self, read: Read) -> None:
        found = read(tokenizer="llama")
        assert ids(found, "!", special=False) == ids(found, "!")[1:]

    def test_nothing_is_added_for_a_token_the_file_does_not_name(self, read: Read) -> None:
        found = read(tokenizer="llama", metadata={"tokenizer.ggml.bos_token_id": None})
        assert found.tokenizer.num_special_tokens_to_add(is_pair=False) == 0

    def test_a_spelling_that_the_library_cannot_add_is_refused(self, read_vocabulary: Read) -> None:
        with pytest.raises(UnsupportedModelError, match="<a:b>"):
            read_vocabulary(["a", "b", "ab", "<a:b>"], bos_token_id=3, add_bos_token=True)


class TestPreTokenizers:
    """What merges may join: digits, spaces and line ends differ between families."""

    @pytest.mark.parametrize(
        ("pre", "text", "expected"),
        [
            ("gpt-2", "12345", ["123", "4", "5"]),
            ("gpt-2", "x\n\n1", ["x", "Ċ", "Ċ", "1"]),
            ("llama-bpe", "12345", ["123", "4", "5"]),
            ("llama-bpe", "x\n\n1", ["x", "ĊĊ", "1"]),
            ("gpt-4o", "12345", ["123", "4", "5"]),
            ("gpt-4o", "x\n\n1", ["x", "ĊĊ", "1"]),
            ("tekken", "12345", ["1", "2", "3", "4", "5"]),
            ("tekken", "x\n\n1", ["x", "ĊĊ", "1"]),
        ],
    )
    def test_split(self, read: Read, pre: str, text: str, expected: list[str]) -> None:
        assert pieces(read(pre=pre, vocab=420), text) == expected

    def test_llama_3_takes_a_whole_word_whatever_the_merges(self, read_vocabulary: Read) -> None:
        tokens = ["a", "b", "c", "ab", "bc", "abc"]
        merges = ["b c", "a b", "ab c"]  # "abc" is a, bc by these: no merge joins the two
        by_merges = read_vocabulary(tokens, merges=merges)
        assert pieces(by_merges, "abc") == ["a", "bc"]
        whole = read_vocabulary(tokens, merges=merges, tokenizer_pre="llama-bpe")
        assert pieces(whole, "abc") == ["abc"]

    @pytest.mark.parametrize("pre", ["default", "deepseek-llm", "poro-chat", None])
    def test_an_unknown_one_is_refused_by_name(self, read: Read, pre: str | None) -> None:
        with pytest.raises(UnsupportedModelError, match=f"tokenizer.ggml.pre is {pre!r}"):
            read(metadata={"tokenizer.ggml.pre": pre})

    def test_an_unknown_kind_of_tokenizer_is_refused_by_name(self, read: Read) -> None:
        with pytest.raises(UnsupportedModelError, match=r"tokenizer\.ggml\.model is 'bert'"):
            read(metadata={"tokenizer.ggml.model": "bert"})


class TestSentencePiece:
    """Metaspace, byte fallback, and merges from scores."""

    def test_a_space_comes_first(self, read: Read) -> None:
        found = read(tokenizer="llama", vocab=420)
        assert pieces(found, "hello")[0].startswith("▁")
        assert found.tokenizer.decode(ids(found, "hello")) == "hello"

    def test_no_space_where_the_file_says_so(self, read: Read) -> None:
        # transformers' GGUF reader reads this flag and does not act on it.
        found = read(
            tokenizer="llama", vocab=420, metadata={"tokenizer.ggml.add_space_prefix": False}
        )
        assert pieces(found, "hello") == ["hello"]
        assert found.tokenizer.decode(ids(found, " hello")) == " hello"

    def test_phi3_s_come_first_everywhere_and_vanish_after_its_added_tokens(
        self, read: Read
    ) -> None:
        found = read(tokenizer="llama", architecture="phi3", vocab=420)

        def names(text: str) -> list[str | None]:
            return [found.tokenizer.id_to_token(i) for i in ids(found, text, special=False)]

        assert names("<|user|>\nhello<|end|>\n<|assistant|>\n") == [
            "<|user|>", "\u2581hello", "<|end|>", "<|assistant|>",
        ]  # fmt: skip
        assert names("<s> hello") == ["<s>", "\u2581\u2581", "hello"]

    def test_gemma3_has_none(self, read: Read) -> None:
        found = read(tokenizer="llama", architecture="gemma3", vocab=420)
        assert pieces(found, "hello<end_of_turn> hello") == [
            "hello", "<end_of_turn>", "\u2581hello",
        ]  # fmt: skip

    def test_what_is_no_piece_falls_back_to_bytes(self, read: Read) -> None:
        found = read(tokenizer="llama", vocab=420)
        assert pieces(found, "☃")[1:] == ["<0xE2>", "<0x98>", "<0x83>"]

    def test_what_is_no_byte_either_is_unknown(self, read_vocabulary: Read) -> None:
        found = read_vocabulary(
            ["<unk>", "a", "b", "ab"],
            types=[TokenType.UNKNOWN] + [TokenType.NORMAL] * 3,
            model="llama",
            unk_token_id=0,
            add_space_prefix=False,
        )
        assert ids(found, "ab☃☃a") == [3, 0, 1]

    def test_text_normalization_is_refused(self, read_vocabulary: Read) -> None:
        with pytest.raises(UnsupportedModelError, match="precompiled_charsmap"):
            read_vocabulary(["a", "b", "ab"], model="llama", precompiled_charsmap=b"\x00\x01")


class TestMerges:
    """Merges are read from lines, or follow from scores."""

    def test_every_cut_into_two_tokens_is_a_merge_best_score_first(self) -> None:
        vocab = {"a": 0, "b": 1, "ab": 2, "ba": 3, "aba": 4}
        scores = np.array([-9, -9, -2, -1, -3], dtype=np.float32)
        assert merges_from_scores(vocab, scores, name="x") == [
            ("b", "a"),
            ("a", "b"),
            ("ab", "a"),  # of one piece: the longer left part first
            ("a", "ba"),
        ]

    def test_the_order_of_scores_is_not_that_of_ids(self) -> None:
        vocab = {"a": 0, "aa": 1, "b": 2, "bb": 3}
        scores = np.array([0, -5, 0, -4], dtype=np.float32)
        assert merges_from_scores(vocab, scores, name="x") == [("b", "b"), ("a", "a")]

    def test_a_score_must_be_finite(self) -> None:
        with pytest.raises(ModelFormatError, match="score is NaN or infinite"):
            merges_from_scores({"a": 0}, np.array([np.nan], dtype=np.float32), name="x")

    def test_an_absurd_piece_is_refused_before_it_is_cut(self) -> None:
        with pytest.raises(ModelFormatError, match="100,000 characters"):
            merges_from_scores({"a" * 100_000: 0}, np.zeros(1, dtype=np.float32), name="x")

    @pytest.mark.parametrize("line", ["ab", "a", " ab", "a c", "c a", "b a", "a b c", ""])
    def test_a_line_that_joins_nothing_is_an_error(self, line: str) -> None:
        with pytest.raises(ModelFormatError, match="merge 1"):
            parse_merges(["a b", line], {"a": 0, "b": 1, "ab": 2, "": 3}, name="x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": ["a", "b", "ab", "a"]}, "token 'a' occurs twice"),
        ({"types": [1, 1]}, "2 token types for 3 tokens"),
        ({"bos_token_id": 3}, "bos_token_id is 3, and the vocabulary has 3"),
    ],
)
def test_a_vocabulary_that_contradicts_itself_is_an_error(
    read_vocabulary: Read, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelFormatError, match=message):
        read_vocabulary(**({"tokens": ["a", "b", "ab"]} | options))


@pytest.mark.parametrize(
    ("tokenizer", "key"), [("gpt2", "tokenizer.ggml.merges"), ("llama", "tokenizer.ggml.scores")]
)
def test_a_vocabulary_that_lacks_its_order_is_an_error(
    read: Read, tokenizer: str, key: str
) -> None:
    with pytest.raises(ModelFormatError, match=f"{key} is missing"):
        read(tokenizer=tokenizer, metadata={key: None})
