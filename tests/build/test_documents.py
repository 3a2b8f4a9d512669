"""The documents of a model folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE

from phirt.build.documents import write_tokenizer


@pytest.mark.parametrize(
    ("middle", "expected"),
    [("\u0120", ["a \u0120", "a\u0120 a"]), (" ", [["a", " "], ["a ", "a"]])],
    ids=["strings", "pairs, where a piece has a space"],
)
def test_a_written_tokenizer_says_the_same(middle: str, expected: object, tmp_path: Path) -> None:
    pieces = ["a", middle, f"a{middle}", f"a{middle}a"]
    merges = [("a", middle), (f"a{middle}", "a")]
    tokenizer = Tokenizer(BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=merges))
    tokenizer.decoder = decoders.Fuse()
    path = tmp_path / "tokenizer.json"
    write_tokenizer(path, tokenizer)

    assert json.loads(path.read_text(encoding="utf-8"))["model"]["merges"] == expected
    again = Tokenizer.from_file(str(path))
    assert again.encode(f"aa{middle}aa").ids == tokenizer.encode(f"aa{middle}aa").ids == [0, 3, 0]
    assert again.to_str() == tokenizer.to_str()
