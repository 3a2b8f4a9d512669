"""Tiny checkpoints: the same bytes for the same arguments, small, whole, and various."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import tokenizers

from phirt.models.folder import read_folder
from phirt.models.safetensors import SafetensorsFolder
from phirt.testing import DENSE_ARCHITECTURES, TINY_ARCHITECTURES, write_tiny_checkpoint
from phirt.testing.subject import Oracle, random_ids
from phirt.text.chat import ChatTemplate
from phirt.text.tokenizer import Tokenizer

FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]


@pytest.fixture
def llama(tmp_path):
    return write_tiny_checkpoint(tmp_path / "llama", "llama")


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_the_same_arguments_write_the_same_bytes(architecture, tmp_path):
    one = write_tiny_checkpoint(tmp_path / "one", architecture)
    two = write_tiny_checkpoint(tmp_path / "two", architecture)
    assert sorted(path.name for path in one.iterdir()) == FILES
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in FILES)
    assert sum(path.stat().st_size for path in one.iterdir()) < 1_000_000


def test_another_seed_writes_other_weights(tmp_path, llama):
    other = write_tiny_checkpoint(tmp_path / "other", "llama", seed=1)
    same = [name for name in FILES if (llama / name).read_bytes() == (other / name).read_bytes()]
    assert same == [name for name in FILES if name != "model.safetensors"]


def test_architectures_that_there_are_not(tmp_path):
    with pytest.raises(ValueError, match=r"'mamba'.*llama, qwen2"):
        write_tiny_checkpoint(tmp_path / "other", "mamba")


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_phirt_reads_it(architecture, tmp_path):
    folder = read_folder(write_tiny_checkpoint(tmp_path / "tiny", architecture))
    assert folder.artifact.architecture == architecture
    assert folder.facts.num_layers == 2
    with SafetensorsFolder(folder.artifact.path) as weights:
        assert all(np.isfinite(weights.float32(name)).all() for name in weights.names())


@pytest.mark.parametrize("architecture", DENSE_ARCHITECTURES)
def test_greedy_answers_vary(architecture, tmp_path):
    """Most tokens of 48 differ from each other, and most are chosen by more than rounding."""
    oracle = Oracle(write_tiny_checkpoint(tmp_path / "tiny", architecture))
    ids, gaps = random_ids(20), []
    for _ in range(48):
        best = np.sort(oracle.logits(ids)[-1])[-2:]
        gaps.append(best[1] - best[0])
        ids = [*ids, int(oracle.logits(ids)[-1].argmax())]
    assert len(set(ids[20:])) >= 16
    assert np.mean(np.array(gaps) > 1e-2) > 0.9


def test_tokens_far_back_matter(tmp_path):
    """What comes next depends on tokens long before it: a cache that loses them is noticed."""
    for architecture in DENSE_ARCHITECTURES:
        oracle = Oracle(write_tiny_checkpoint(tmp_path / architecture, architecture))
        ids = random_ids(30)
        changed = [*ids[:20], (ids[20] + 1) % 256, *ids[21:]]
        difference = np.abs(oracle.logits(ids)[-1] - oracle.logits(changed)[-1]).max()
        assert difference > 0.1, architecture


@pytest.mark.parametrize(
    "text", ["", "The théâtre\n and you", "<|im_start|>user\nhi<|im_end|>", "😀"]
)
def test_the_tokenizer_gives_a_text_back(llama, text):
    tokenizer = tokenizers.Tokenizer.from_file(str(llama / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_the_tokenizer_merges(llama):
    tokenizer = Tokenizer.from_file(llama / "tokenizer.json")
    config = json.loads((llama / "config.json").read_text(encoding="utf-8"))
    assert tokenizer.vocab_size == config["vocab_size"] == 320
    assert len(tokenizer.encode("the and you")) == 4  # "t", "he", " and", " you"
    assert tokenizer.encode("<|im_end|>") == [config["eos_token_id"]]


def test_the_chat_template(llama):
    config = json.loads((llama / "tokenizer_config.json").read_text(encoding="utf-8"))
    rendered = ChatTemplate(config["chat_template"]).render([{"role": "user", "content": "hi"}])
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_logits_are_of_the_size_of_logits(llama):
    """Neither so flat that sampling is uniform nor so sharp that it is greedy."""
    row = Oracle(llama).logits(random_ids(20))[-1]
    probabilities = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
    entropy = -(probabilities * np.log(probabilities)).sum()
    assert 1 < entropy < math.log(320) - 1
