"""The same GGUF file read by transformers: the same tensors, the same token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phirt.build.gguf.checkpoint import GgufCheckpoint
from phirt.build.gguf.tokenizer import read_tokenizer
from tests.hard_strings import HARD_STRINGS, random_strings
from tests.tiny_gguf import write_tiny_llama_gguf

pytestmark = pytest.mark.oracle


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def their_model(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)


def their_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.parametrize("encoding", ["F32", "Q4_1", "Q6_K"])
@pytest.mark.parametrize("tied", [True, False])
def test_tensors(tmp_path: Path, encoding: str, tied: bool) -> None:
    path = write_tiny_llama_gguf(
        tmp_path / "model.gguf",
        encoding=encoding,
        tied=tied,
        layers=1,
        hidden=256,
        intermediate=256,
        heads=8,
        kv_heads=2,
    )
    theirs = {name: tensor.numpy() for name, tensor in their_model(path).state_dict().items()}
    with GgufCheckpoint(path) as checkpoint:
        ours = {name: checkpoint.tensor(name).float32() for name in checkpoint.names()}
    if tied:
        np.testing.assert_array_equal(
            theirs.pop("lm_head.weight"), ours["model.embed_tokens.weight"]
        )
    assert set(ours) == set(theirs)
    for name, values in ours.items():
        np.testing.assert_array_equal(values, theirs[name], err_msg=name)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
@pytest.mark.parametrize("encoding", ["F32", "Q4_1"])
def test_tensors_of_qwen(tmp_path: Path, architecture: Any, encoding: str) -> None:
    """Biases or norms of heads, and no rows in another order."""
    path = write_tiny_llama_gguf(
        tmp_path / "model.gguf",
        architecture=architecture,
        encoding=encoding,
        pre="qwen2",
        layers=2,
        hidden=256,
        heads=2,  # transformers takes heads of 128 for granted in qwen3
        kv_heads=1,
    )
    theirs = {name: tensor.numpy() for name, tensor in their_model(path).state_dict().items()}
    del theirs["lm_head.weight"]  # tied
    with GgufCheckpoint(path) as checkpoint:
        ours = {name: checkpoint.tensor(name).float32() for name in checkpoint.names()}
        config = checkpoint.config
    assert (config.architecture, config.head_size) == (architecture, 128)
    assert (config.qkv_bias, config.qk_norm) == (architecture == "qwen2", architecture == "qwen3")
    assert set(ours) == set(theirs)
    for name, values in ours.items():
        np.testing.assert_array_equal(values, theirs[name], err_msg=name)


def test_configuration(tmp_path: Path) -> None:
    path = write_tiny_llama_gguf(tmp_path / "model.gguf", layers=3)
    theirs = their_model(path).config
    with GgufCheckpoint(path) as checkpoint:
        ours = checkpoint.config
    assert ours.vocab_size == theirs.vocab_size
    assert ours.hidden_size == theirs.hidden_size
    assert ours.intermediate_size == theirs.intermediate_size
    assert ours.num_layers == theirs.num_hidden_layers
    assert ours.num_heads == theirs.num_attention_heads
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_size == theirs.head_dim
    assert ours.context_length == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings


def assert_same_ids(path: Path) -> None:
    """Ids of hard and random strings, with the special tokens that the model adds to text."""
    with GgufCheckpoint(path) as checkpoint:
        ours = read_tokenizer(checkpoint.file, tokens=checkpoint.tokens)
    theirs = their_tokenizer(path)
    added = [token.content for token in ours.tokenizer.get_added_tokens_decoder().values()]
    strings = dict(HARD_STRINGS)
    strings["all added tokens"] = "".join(f"{token} x{token}" for token in added)
    strings |= {
        f"random {index}": text
        for index, text in enumerate(random_strings(2000, seed=0, added_tokens=added))
    }
    for name, text in strings.items():
        ids = ours.tokenizer.encode(text).ids
        assert ids == theirs(text)["input_ids"], name
        assert ours.tokenizer.decode(ids, skip_special_tokens=False) == theirs.decode(ids), name
    assert ours.bos_token == theirs.bos_token
    assert ours.eos_token == theirs.eos_token
    assert ours.unk_token == theirs.unk_token
    assert ours.pad_token == theirs.pad_token
    assert ours.chat_template == theirs.chat_template


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"pre": "gpt-2"}, id="gpt-2"),
        pytest.param({"pre": "smollm"}, id="smollm"),
        pytest.param({"pre": "llama-bpe"}, id="llama-bpe"),
        pytest.param(
            {"pre": "tekken", "metadata": {"tokenizer.ggml.add_bos_token": True}}, id="tekken"
        ),
        pytest.param({"pre": "qwen2", "architecture": "qwen2"}, id="qwen2"),
        pytest.param({"pre": "qwen2", "architecture": "qwen3"}, id="qwen3"),
        pytest.param({"tokenizer": "llama"}, id="sentencepiece"),
        pytest.param(
            {"tokenizer": "llama", "metadata": {"tokenizer.ggml.add_eos_token": True}},
            id="sentencepiece-eos",
        ),
    ],
)
def test_token_ids(tmp_path: Path, options: dict[str, Any]) -> None:
    path = write_tiny_llama_gguf(tmp_path / "model.gguf", layers=1, vocab=420, **options)
    assert_same_ids(path)


@pytest.mark.model
def test_token_ids_of_the_default_model(smollm2_gguf: Path) -> None:
    assert_same_ids(smollm2_gguf)
