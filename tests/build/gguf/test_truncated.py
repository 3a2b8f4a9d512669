"""A small GGUF file cut at every byte: a typed error, never a crash. Row M8."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import pytest

from phirt.build.gguf.checkpoint import GgufCheckpoint
from phirt.build.gguf.tokenizer import read_tokenizer
from phirt.errors import PhirtError
from tests.tiny_gguf import write_tiny_llama_gguf


def read_everything(path: Path) -> None:
    with GgufCheckpoint(path) as checkpoint:
        read_tokenizer(checkpoint.file, tokens=checkpoint.tokens)
        for name in checkpoint.names():
            checkpoint.tensor(name).float32()


@pytest.mark.parametrize(
    ("architecture", "tokenizer"),
    [("llama", "gpt2"), ("llama", "llama"), ("phi3", "gpt2"), ("gemma3", "gpt2")],
)
def test_cut_at_every_byte(
    tmp_path: Path,
    architecture: Literal["llama", "phi3", "gemma3"],
    tokenizer: Literal["gpt2", "llama"],
) -> None:
    path = write_tiny_llama_gguf(
        tmp_path / "model.gguf",
        architecture=architecture,
        encoding="Q4_0",
        tokenizer=tokenizer,
        vocab=262,
        layers=1,
        hidden=32,
        intermediate=32,
        heads=2,
        kv_heads=1,
        chat_template=None,
    )
    size = path.stat().st_size
    assert size < 16_000
    read_everything(path)
    with GgufCheckpoint(path) as checkpoint:
        end = max(info.offset + info.nbytes for info in checkpoint.file.header.tensors.values())
    for length in range(end - 1, -1, -1):
        os.truncate(path, length)
        with pytest.raises(PhirtError):
            read_everything(path)
