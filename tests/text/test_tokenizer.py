"""The tokenizer: exact, complete, and with errors of its own."""

# ruff: noqa: S311 (random texts, not secrets)

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from phirt.errors import ModelFormatError, ModelNotFoundError
from phirt.text.tokenizer import Tokenizer
from tests.hard_strings import HARD_STRINGS
from tests.text.tiny_tokenizers import byte_level, sentencepiece

KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte level": byte_level,
    "sentencepiece": sentencepiece,
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return Tokenizer(KINDS[request.param]())


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tokenizer.json"
    byte_level().save(str(path))
    return path


def test_encode_adds_the_special_tokens_unless_told_not_to(file):
    tokenizer = Tokenizer.from_file(file)
    start = tokenizer.token_to_id("<|start|>")
    hello = tokenizer.token_to_id("hello")
    assert tokenizer.encode("hello") == [start, hello]
    assert tokenizer.encode("hello", add_special_tokens=False) == [hello]
    assert tokenizer.count("hello") == 2
    assert tokenizer.count("hello", add_special_tokens=False) == 1


def test_decode_skips_special_tokens_unless_told_not_to(file):
    tokenizer = Tokenizer.from_file(str(file))
    ids = tokenizer.encode("hello<|end|><tool>")
    assert tokenizer.decode(ids) == "hello<tool>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|start|>hello<|end|><tool>"


def test_vocabulary_and_special_ids(file):
    tokenizer = Tokenizer.from_file(file)
    assert tokenizer.vocab_size == 256 + 7 + 2 + 2
    assert {tokenizer.id_to_token(i) for i in tokenizer.special_ids} == {"<|start|>", "<|end|>"}
    assert tokenizer.token_to_id("no such token") is None
    assert tokenizer.id_to_token(tokenizer.vocab_size) is None
    assert tokenizer.id_to_token(-1) is None
    assert tokenizer.id_to_token(2**32) is None


def test_ids_beyond_the_vocabulary_decode_to_nothing(tokenizer):
    ids = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.decode([*ids, tokenizer.vocab_size + 5]) == tokenizer.decode(ids)


@pytest.mark.parametrize("text", HARD_STRINGS.values(), ids=HARD_STRINGS.keys())
def test_hard_strings_survive(tokenizer, text):
    # SentencePiece puts a space before the text and takes one away again.
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_truncation_and_padding_of_the_file_are_switched_off(tmp_path):
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))["truncation"] is not None
    assert len(Tokenizer.from_file(tmp_path / "tokenizer.json").encode("z" * 20)) == 1 + 20


@pytest.mark.parametrize("text", ["a\ud800b", "\udfff", "\ud83d\ude00"])
def test_a_lone_surrogate_is_refused(tokenizer, text):
    with pytest.raises(ValueError, match=r"lone surrogate .* at index"):
        tokenizer.encode(text)


@pytest.mark.parametrize("text", [b"bytes", None, ["list"], 7])
def test_text_must_be_a_string(tokenizer, text):
    with pytest.raises(TypeError, match="text must be a str, not"):
        tokenizer.encode(text)


@pytest.mark.parametrize("token_id", [-1, 2**32])
def test_ids_out_of_range_are_refused(tokenizer, token_id):
    with pytest.raises(ValueError, match="token ids must lie in 0 to"):
        tokenizer.decode([1, token_id])


def test_ids_must_be_integers(tokenizer):
    with pytest.raises(TypeError):
        tokenizer.decode(["a"])


def test_text_without_a_token_is_a_typed_error():
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"known": 0}))
    with pytest.raises(ModelFormatError, match="cannot encode the text"):
        Tokenizer(backend).encode("unknown")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"'.*tokenizer\.json' was not found"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")
    with pytest.raises(ModelNotFoundError):
        Tokenizer.from_file(tmp_path)  # a folder


def test_a_file_cut_anywhere_is_refused(file):
    whole = file.read_bytes()
    for size in range(0, len(whole) - 1, 7):
        file.write_bytes(whole[:size])
        with pytest.raises(ModelFormatError, match="cannot be read"):
            Tokenizer.from_file(file)


def test_flipped_bits_never_crash(file):
    whole = file.read_bytes()
    choose = random.Random(7)
    refused = 0
    for _ in range(500):
        data = bytearray(whole)
        data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
        file.write_bytes(data)
        try:
            Tokenizer.from_file(file).encode("hello")
        except ModelFormatError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{}", id="no model"),
        pytest.param(b"[" * 100_000, id="nested lists"),
        pytest.param(b'{"a":' * 100_000, id="nested objects"),
        pytest.param(b'{"version": 1' + b"0" * 100_000 + b"}", id="huge integer"),
        pytest.param(b"\xff\xfe\x00", id="not UTF-8"),
    ],
)
def test_other_json_is_refused(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ModelFormatError, match="cannot be read"):
        Tokenizer.from_file(path)


def test_a_huge_file_is_refused_unread(tmp_path):
    path = tmp_path / "tokenizer.json"
    with path.open("wb") as stream:
        stream.truncate(257 * 2**20)  # sparse
    with pytest.raises(ModelFormatError, match="269,484,032 bytes"):
        Tokenizer.from_file(path)


def _long_texts():
    choose = random.Random(13)
    return {
        "one letter": "a" * 1_000_000,
        "merging letters": "helo" * 250_000,
        "random letters": "".join(choose.choices("abcdehlo", k=1_000_000)),
        "CJK": "".join(chr(choose.randrange(0x4E00, 0x9FFF)) for _ in range(333_333)),
        "emoji": "".join(chr(choose.randrange(0x1F300, 0x1F640)) for _ in range(250_000)),
        "random bytes": choose.randbytes(1_000_000).decode("utf-8", "replace"),
        "newlines": "\n" * 1_000_000,
    }


LONG_TEXTS = _long_texts()


@pytest.mark.parametrize("text", LONG_TEXTS.values(), ids=LONG_TEXTS.keys())
def test_a_megabyte_without_a_space_takes_at_most_two_seconds(tokenizer, text):
    started = time.perf_counter()
    ids = tokenizer.encode(text)
    assert time.perf_counter() - started < 5 * 2  # five times slack
    assert tokenizer.decode(ids) == text


@pytest.mark.model
def test_a_megabyte_without_a_space_on_the_real_tokenizer(smollm2):
    for name, text in LONG_TEXTS.items():
        started = time.perf_counter()
        ids = smollm2.tokenizer.encode(text)
        assert time.perf_counter() - started < 5 * 2, name
        # Its vocabulary lacks some control characters, which vanish, in transformers as well.
        if name != "random bytes":
            assert smollm2.tokenizer.decode(ids) == text, name


def test_threads_share_a_tokenizer(tokenizer):
    texts = list(HARD_STRINGS.values()) * 4
    alone = [tokenizer.encode(text) for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tokenizer.encode, texts)) == alone


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_encoding_after_a_fork_neither_warns_nor_hangs(file):
    program = f"""if True:
        import os, sys
        from phirt.text.tokenizer import Tokenizer
        tokenizer = Tokenizer.from_file({str(file)!r})
        before = tokenizer.encode("hello world")
        child = os.fork()
        if child == 0:
            os._exit(0 if tokenizer.encode("hello world") == before else 9)
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    environment = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.oracle
@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_text_equal_those_of_transformers(kind, tmp_path):
    import transformers

    path = tmp_path / "tokenizer.json"
    KINDS[kind]().save(str(path))
    ours = Tokenizer.from_file(path)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    choose = random.Random(3)
    for name, text in HARD_STRINGS.items():
        ids = ours.encode(text)
        assert ids == theirs.encode(text), name
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(
            text, add_special_tokens=False
        ), name
        choose.shuffle(ids)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(
                ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
            ), name
