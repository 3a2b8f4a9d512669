"""Tokenizers that transformers does not read from GGUF the way their models mean them.

llama.cpp is the oracle: it knows Phi-3's by the model's name, Phi-4-mini's by that of its
pre-tokenizer, and Gemma's by its flags.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

from phirt.build.gguf.checkpoint import GgufCheckpoint
from phirt.build.gguf.tokenizer import read_tokenizer
from tests.build.gguf.llama_cpp import LlamaCpp
from tests.hard_strings import HARD_STRINGS, random_strings
from tests.tiny_gguf import write_tiny_llama_gguf

pytestmark = pytest.mark.oracle

FILES: dict[str, dict[str, Any]] = {
    "phi3": {
        "architecture": "phi3",
        "tokenizer": "llama",
        "layers": 1,
        "metadata": {"general.name": "Phi-3-tiny"},
    },
    "phi4": {"architecture": "phi3", "pre": "gpt-4o", "layers": 1},
    "gemma3": {"architecture": "gemma3", "tokenizer": "llama", "layers": 7},
}


@pytest.fixture(params=FILES)
def path(request, tmp_path):
    options = FILES[request.param]
    return write_tiny_llama_gguf(tmp_path / "model.gguf", vocab=420, **options)


def test_token_ids(path):
    with GgufCheckpoint(path) as checkpoint:
        ours = read_tokenizer(checkpoint.file, tokens=checkpoint.tokens).tokenizer
    added = [token.content for token in ours.get_added_tokens_decoder().values()]
    strings = dict(HARD_STRINGS)
    strings["a chat"] = "<|user|>\nHello<|end|>\n<|assistant|>\n<start_of_turn>user\n hi "
    strings["words in capitals"] = "HelloWorld DON'T it'LL ABCdef 12345 a/b//\n/ x=='ÉCOLEécole' Ωω"
    strings["spaces around added tokens"] = "".join(f"a {token} \n b{token}c" for token in added)
    strings |= {
        f"random {index}": text
        for index, text in enumerate(random_strings(1000, seed=0, added_tokens=added))
    }
    with LlamaCpp(path) as theirs:
        for name, text in strings.items():
            # After Phi-3's added tokens, llama.cpp knows no white space beyond ASCII.
            plain = re.sub(r"\s", lambda space: space[0] if space[0].isascii() else " ", text)
            assert ours.encode(plain).ids == theirs.encode(plain), name
